"""The client's classes under `torch.compile`: one graph, for every length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dilated_attention_pytorch.kernels import HilbertAttentionCore
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.utils import HilbertAttentionMixin


class Ordered(nn.Module, HilbertAttentionMixin):
    """A class of the client's that puts tokens in order itself."""

    def __init__(self, order: TokenOrder | str) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.setup_hilbert_attention(24, 3, order=order)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).unbind(2)
        return self.compute_hilbert_attention(q, k, v).flatten(2)


PERMUTED = TokenOrder.from_permutation(torch.randperm(61, generator=torch.Generator().manual_seed(0)))
LENGTHS = (61, 70, 96)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "core": (lambda: HilbertAttentionCore(24, 3, [16, 64], [1, 3], order="hilbert"), LENGTHS),
    "auto": (lambda: HilbertAttentionCore(24, 3, "auto"), (1100, 1300, 2048)),
    "ordering only": (lambda: Ordered("hilbert"), LENGTHS),
    "ordering only, permutation": (lambda: Ordered(PERMUTED), (61,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_one_graph_for_every_length(name: str) -> None:
    """A graph that breaks, holds for one length alone, or learns something else."""
    torch._dynamo.reset()
    make, lengths = MODULES[name]
    module = make()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for length in lengths:
        x = torch.randn(2, length, 24, requires_grad=True)
        dout = torch.randn_like(x)
        leaves = [x, *module.parameters()]
        mine, wanted = ((out := call(x), *torch.autograd.grad(out, leaves, dout)) for call in (compiled, module))
        for actual, expected in zip(mine, wanted, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


def test_operator_of_orders() -> None:
    """An operator whose shape, device or aliasing is told otherwise than it runs."""
    operator = torch.ops.dilated_attention_pytorch.steps_to_tokens.default
    for given in (("hilbert", [6, 10], 1, 61), ("snake", None, 0, 61)):
        torch.library.opcheck(operator, (*given, torch.device("cpu")))
