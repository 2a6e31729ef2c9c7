"""`HilbertAttentionTritonWrapper`: q, k and v of the caller's own, in all branches."""

from __future__ import annotations

import pytest
import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.kernels import HilbertAttentionTritonFixed, HilbertAttentionTritonWrapper


def test_all_branches_masks_and_groups() -> None:
    """A branch, a mask or a group that is left out, or a causality that goes by step."""
    torch.manual_seed(0)
    attention = HilbertAttentionTritonWrapper([16, 40], [2, 3], num_heads=4, head_dim=8, order="hilbert")
    q, k, v = (torch.randn(2, 61, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.rand(2, 61) > 0.3
    out = attention(q, k, v, True, key_padding_mask=mask)
    wanted, _ = reference.dilated_attention(
        q,
        k,
        v,
        [16, 40],
        [2, 3],
        queries="all",
        head_offset="zero",
        order=dap.TokenOrder("hilbert").indices(61),
        is_causal=True,
        key_padding_mask=mask,
    )
    torch.testing.assert_close(out, wanted)


def test_alias_and_state() -> None:
    """The earlier name as a second class, or a module that adds to a checkpoint."""
    assert HilbertAttentionTritonFixed is HilbertAttentionTritonWrapper
    assert HilbertAttentionTritonFixed([128], [1]).state_dict() == {}


def test_other_heads_than_it_was_made_for() -> None:
    """The defaults are 8 heads of 64: whoever forgets them attends with the heads that come."""
    attention = HilbertAttentionTritonWrapper([16], [2])
    q = torch.randn(2, 61, 4, 8)
    with pytest.raises(ArgumentError, match=r"q must have shape \(B, N, 8, 64\)"):
        attention(q, q, q)


def test_unequally_many_branches() -> None:
    """A branch that is dropped because the other list is shorter."""
    with pytest.raises(ArgumentError, match="as many"):
        HilbertAttentionTritonWrapper([16, 32, 64], [1, 2])
