"""What users of PyTorch do on a GPU: compile, capture, autocast, dropout in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.runtime.dropout import Dropout

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    """Projections around attention."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 32)).unbind(-3)
        dropout_p = self.dropout_p if self.training else 0.0
        out = dap.dilated_attention(q, k, v, [128, 512], [1, 4], order="hilbert", is_causal=True, dropout_p=dropout_p)
        return x + self.out(nn.functional.gelu(out.flatten(-2)))


def step(model: Any, x: Tensor) -> list[Tensor]:
    """out and gradients of one training step under autocast."""
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        out = model(x)
    gradients = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
    return [result.detach().clone() for result in (out, *gradients)]


def close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Within what fusing other operations in bf16 changes."""
    return all((a - b).norm() <= 2e-2 * b.norm() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str) -> None:
    """A kernel launch that generated code cannot hold, or memory that its CUDA graphs do not find again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block().cuda()
    fast = torch.compile(block, fullgraph=True, mode=mode)
    for length in (300, 300, 300, 411):
        x = torch.randn(2, length, 128, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        assert close(step(fast, x), step(block, x))


def test_a_replayed_graph_draws_new_masks() -> None:
    """A seed that is a constant of the graph: every step of a captured training run would drop the same pairs."""
    q, k, v = (torch.randn(1, 300, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend() -> Tensor:
        return dap.dilated_attention(q, k, v, 128, 2, dropout_p=0.5, backend="triton")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    results = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        results.append(out.clone())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_masks_are_the_same_on_every_device() -> None:
    """Integer products that wrap otherwise on a GPU: a run that moves there would drop other pairs."""
    problem = dap.explain(*(torch.empty(2, 300, 4, 64),) * 3, 128, 2, dropout_p=0.3).problem
    seed = torch.tensor([0x123456789ABCDEF])
    on_cpu, on_gpu = (Dropout(0.3, seed.to(device)).multipliers(problem, 1) for device in ("cpu", "cuda"))
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_eager_autocast_and_eval() -> None:
    """Dropout that stays on in eval, or a gradient that is lost there."""
    torch.manual_seed(0)
    block = Block(dropout_p=0.4).cuda().eval()
    x = torch.randn(2, 300, 128, device="cuda")
    first, second = step(block, x), step(block, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(gradient.any() for gradient in first[1:])
    block.train()
    assert not torch.equal(step(block, x)[0], first[0])
