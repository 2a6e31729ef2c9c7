"""The autograd function, and calls that go past it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad

import dilated_attention_pytorch as dap


def test_forward_mode_is_refused() -> None:
    """A tangent that a call without an autograd node drops: a derivative of zero."""
    q = torch.randn(1, 10, 2, 8)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        dap.dilated_attention(forward_ad.make_dual(q, q), q, q, 4, 2)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: dap.dilated_attention(x, q, q, 4, 2), (q,), (q,))


@pytest.mark.parametrize("needed", range(3))
def test_any_input_alone_has_its_gradient(needed: int) -> None:
    """A call that counts as unrecorded because q needs no gradient."""
    given = [torch.randn(1, 10, 2, 8, requires_grad=place == needed) for place in range(3)]
    out = dap.dilated_attention(*given, 4, 2)
    assert torch.autograd.grad(out.sum() + out.square().sum(), given[needed])[0].any()
    with torch.no_grad():
        assert not dap.dilated_attention(*given, 4, 2).requires_grad


def test_an_edited_mask_is_refused() -> None:
    """Gradients of another call than the forward: what a backward reads is saved where edits are counted."""
    q = torch.randn(1, 10, 2, 8, requires_grad=True)
    mask = torch.ones(1, 10, dtype=torch.bool)
    out = dap.dilated_attention(q, q, q, 4, 2, key_padding_mask=mask)
    mask[0, 3] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_backward_lets_its_tensors_go() -> None:
    """Memory of a step that lives until its loss is forgotten."""
    q = torch.randn(1, 10, 2, 8, requires_grad=True)
    mask = torch.ones(1, 10, dtype=torch.bool)
    seen = weakref.ref(mask)
    loss = dap.dilated_attention(q, q, q, 4, 2, key_padding_mask=mask).sum()
    loss.backward()
    del mask
    gc.collect()
    assert seen() is None and loss.grad_fn is not None
