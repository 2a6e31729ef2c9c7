"""The code of the client's two documents, run as it stands there, and what each block's module must compute.

`documents/` holds them word for word. A block's `...` are filled in; every other character is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.utils.hilbert_attention_mixin import HilbertAttentionMixin

from ..tolerances import TOLERANCES, check

DOCUMENTS = Path(__file__).parent / "documents"
README, GUIDE = "kernels_readme.md", "integration_guide.md"
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

HIDDEN = (1, 150, 48)
HEADED = (1, 150, 3, 16)
"""150 tokens lie in rows of 13, which segments of 128 cut: the snake is no no-op."""

Module = Callable[..., Tensor]


@dataclass(frozen=True)
class Block:
    """A block of code, and what it is held to.

    Attributes:
        document, place: Where it stands: the file, and which of its blocks of Python.
        given: Names and shapes of the tensors that the module takes.
        make: The module, from the names that the block has defined.
        truth: What the module must return, from the module and its inputs in float64.
        fill: What stands for each `...`.
    """

    document: str
    place: int
    given: dict[str, tuple[int, ...]]
    make: Callable[[dict[str, Any]], Module]
    truth: Callable[..., Tensor]
    fill: Sequence[str] = ()

    def run(self, device: str) -> tuple[Module, list[Tensor]]:
        """Execute the block's text on a device."""
        code = FENCED.findall((DOCUMENTS / self.document).read_text(encoding="utf-8"))[self.place]
        assert code.count("...") == len(self.fill)
        for filling in self.fill:
            code = code.replace("...", filling, 1)
        torch.manual_seed(0)
        with torch.device(device):
            inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in self.given.items()}
            names: dict[str, Any] = {
                "torch": torch,
                "nn": nn,
                "HilbertAttentionMixin": HilbertAttentionMixin,  # imported in an earlier block
                "create_hilbert_mapping": dap.create_hilbert_mapping,
                "my_attention_function": own_attention,
                **inputs,
            }
            exec(compile(code, f"{self.document}, block {self.place}", "exec"), names)
            return self.make(names), list(inputs.values())


def own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The caller's "existing attention computation": one that an order changes."""
    return dap.dilated_attention(q, k, v, 64, 3, queries="all", head_offset="zero")


def attended(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], rates: Sequence[int]) -> Tensor:
    """The oracle's attention along the snake, every token asking."""
    order = dap.TokenOrder("snake").indices(q.shape[1])
    return reference.dilated_attention(q, k, v, segments, rates, queries="all", head_offset="zero", order=order)[0]


def projected(
    x: Tensor, into: nn.Linear, heads: int, segments: Sequence[int], rates: Sequence[int], out_of: nn.Linear
) -> Tensor:
    """The oracle between two projections, the rows of the first laid out (q | k | v, heads, head_dim)."""
    q, k, v = linear(x, into).unflatten(2, (3, heads, -1)).unbind(2)
    return linear(attended(q, k, v, segments, rates).flatten(2), out_of)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A layer in float64."""
    return nn.functional.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())


def before(names: dict[str, Any]) -> Module:
    """The class that the guide upgrades, with the method that it calls and does not show."""

    class Before(names["RingDilatedAttentionHilbertOptimizedFixed"]):  # type: ignore[misc]
        def _apply_hilbert_ordering(self, t: Tensor) -> Tensor:
            return t[:, self._generate_hilbert_indices(t.shape[1])]

    module: Module = Before().forward
    return module


def after(names: dict[str, Any]) -> Module:
    """The class that the guide arrives at, of three heads."""
    upgraded = names["RingDilatedAttentionHilbertOptimizedFixed"]
    upgraded.dim, upgraded.heads = 48, 3
    module: Module = upgraded()
    return module


def cored(module: Any, x: Tensor) -> Tensor:
    """The oracle of a `HilbertAttentionCore`."""
    segments, rates = [module.segment_size], [module.dilation_rate]
    return projected(x, module.qkv_proj, module.num_heads, segments, rates, module.out_proj)


OLD_FORWARD = """\
out = my_attention_function(q_ordered, *map(self._apply_hilbert_ordering, (k, v)))
        return out[:, torch.argsort(self._generate_hilbert_indices(q.shape[1]))]"""

QKV = {"q": HEADED, "k": HEADED, "v": HEADED}

BLOCKS = {
    "core": Block(README, 0, {"x": (1, 150, 768)}, lambda names: names["attention"], cored),
    "wrapper": Block(
        README,
        1,
        dict.fromkeys("qkv", (1, 150, 8, 64)),
        lambda names: names["attention"],
        lambda module, q, k, v: attended(q, k, v, [128, 256], [1, 2]),
    ),
    "mixin": Block(
        GUIDE,
        0,
        {"x": HIDDEN},
        lambda names: names["MyAttention"](48, 3),
        lambda module, x: projected(x, module.qkv, 3, [128], [1], module.out_proj),
    ),
    "direct": Block(
        GUIDE,
        1,
        {"x": HIDDEN},
        lambda names: names["MyRingAttention"](48, 3),
        lambda module, x: cored(module.hilbert_attn, x),
    ),
    "ordering": Block(
        GUIDE,
        2,
        QKV,
        lambda names: names["MyAttentionWithOrdering"](),
        lambda module, q, k, v: attended(q, k, v, [64], [3]),
    ),
    "before": Block(
        GUIDE,
        3,
        QKV,
        before,
        lambda module, q, k, v: attended(q, k, v, [64], [3]),
        fill=("return create_hilbert_mapping(n)", OLD_FORWARD),
    ),
    "after": Block(
        GUIDE,
        4,
        QKV,
        after,
        lambda module, q, k, v: attended(q, k, v, [128], [1]),
        fill=("dim=None, heads=None",),
    ),
}

CHECKPOINTS = {"plain": None, "checkpoint": False, "reentrant": True}
"""How a module is called: as it is, or under `torch.utils.checkpoint` with `use_reentrant`."""


def hold(name: str, device: str, *, training: bool, checkpoints: str) -> None:
    """Run a block, and hold the module's results and all gradients to the oracle.

    A module that drops weights is held to itself: the same seed must drop the same weights, whoever checkpoints.
    """
    block = BLOCKS[name]
    module, inputs = block.run(device)
    learned: list[Tensor] = []
    if isinstance(module, nn.Module):
        module.train(training)
        learned = list(module.parameters())
    reentrant = CHECKPOINTS[checkpoints]

    def call(*tensors: Tensor) -> Tensor:
        if reentrant is None:
            return module(*tensors)
        out: Tensor = checkpoint(module, *tensors, use_reentrant=reentrant)
        return out

    actual = results(call, inputs, learned)
    if training and getattr(module, "dropout", 0.0):
        wanted = results(module, inputs, learned)
        module.eval()  # type: ignore[attr-defined]
        assert not torch.allclose(actual[0], module(*inputs)), "nothing was dropped in training"
    else:
        wanted = results(lambda *tensors: block.truth(module, *(x.double() for x in tensors)), inputs, learned)
    tolerance = TOLERANCES["fp32"]
    check("out", actual[0], wanted[0], tolerance.out)
    for place, (mine, true) in enumerate(zip(actual[1:], wanted[1:], strict=True)):
        check(f"gradient {place}", mine, true, tolerance.grad)


def results(call: Module, inputs: list[Tensor], learned: list[Tensor]) -> list[Tensor]:
    """out, and the gradients of inputs and parameters for a seeded dout."""
    leaves = [*inputs, *learned]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(1)
    out = call(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(dout)  # `torch.autograd.grad` is refused by reentrant checkpoints
    return [out.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]
