"""The autograd function, and calls that go past it."""

from __future__ import annotations

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
