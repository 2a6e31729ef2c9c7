"""The client's documents and modules on this machine's GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.kernels import HilbertAttentionCore
from dilated_attention_pytorch.utils import HilbertAttentionMixin

from ..client.blocks import BLOCKS, CHECKPOINTS, hold

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, training: bool, checkpoints: str) -> None:
    """Code of the client's that fails on a GPU, or computes something else there."""
    hold(name, "cuda", training=training, checkpoints=checkpoints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_core_runs_on_kernels(dtype: torch.dtype) -> None:
    """A module that falls back to the torch backend, or whose kernels and formula differ."""
    torch.manual_seed(0)
    core = HilbertAttentionCore(384, 6, [128, 500], [1, 3], order="hilbert", device="cuda", dtype=dtype)
    x = torch.randn(2, 1000, 384, device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = core.qkv_proj(x).unflatten(-1, (3, 6, 64)).unbind(2)
    story = dap.explain(q, k, v, [128, 500], [1, 3], queries="all", head_offset="zero", order="hilbert")
    assert story.backend == "triton"

    def results() -> list[Tensor]:
        out = core(x)
        return [out, *torch.autograd.grad(out, [x, *core.parameters()], torch.ones_like(out))]

    kernels = results()
    core.use_custom_backward = False
    for mine, formula in zip(kernels, results(), strict=True):
        assert (mine - formula).norm() <= {torch.float32: 1e-4}.get(dtype, 3e-2) * formula.norm()


def test_mappings_follow_their_tensors() -> None:
    """An index from one device that is handed out on another."""

    class Ordered(HilbertAttentionMixin, torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.setup_hilbert_attention(48, 3, order="hilbert")

    module = Ordered()
    for device in ("cpu", "cuda", "cuda:0", "cpu"):
        x = torch.randn(2, 77, 3, 16, device=device)
        assert module.get_hilbert_indices(77, device).device == x.device
        assert torch.equal(module.apply_hilbert_ordering(module.apply_hilbert_ordering(x), inverse=True), x)
