"""`DilatedAttention` as a module: the oracle's function, its own scale, dropout and head groups."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.modules.attention import group_offsets

from ..tolerances import TOLERANCES, check

BRANCHES = [16, 40], [2, 3]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def heads(count: int = 5) -> list[Tensor]:
    """q, k, v (2, 61, count, 8), float64."""
    return [torch.randn(2, 61, count, 8, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_module_computes_what_the_paper_says(scale: float | None, is_causal: bool) -> None:
    """A scale that is stored and never used, heads without an output, or an output scaled by its own sum."""
    q, k, v = heads()
    out = dap.DilatedAttention(*BRANCHES, softmax_scale=scale)(q, k, v, is_causal=is_causal)
    want, _ = reference.dilated_attention(q, k, v, *BRANCHES, scale=scale, is_causal=is_causal)
    check("out", out, want, TOLERANCES["fp64"].out)


def test_head_groups_give_each_head_one_branch() -> None:
    """Groups that overlap where heads do not divide, so that the last heads attend to nothing."""
    q, k, v = heads(7)
    branches = [9, 20, 61], [1, 2, 3]
    out = dap.DilatedAttention(*branches, head_groups=True)(q, k, v)
    start = 0
    for size, width, rate in zip((3, 2, 2), *branches, strict=True):
        group = slice(start, start + size)
        offsets = torch.tensor([[head % rate for head in range(start, start + size)]])
        of_group = (x[:, :, group] for x in (q, k, v))
        want, _ = reference.dilated_attention(*of_group, [width], [rate], head_offset=offsets)
        check(f"heads {group}", out[:, :, group], want, TOLERANCES["fp64"].out)
        start += size


def test_a_group_may_be_empty() -> None:
    """More branches than heads: a division by nothing."""
    assert group_offsets((1, 2, 3), 2).tolist() == [[0, -1], [-1, 1], [-1, -1]]


def test_the_table_of_groups_is_made_once() -> None:
    """A new tensor a call would be checked anew each time, which waits for the GPU."""
    with torch.inference_mode():
        first = group_offsets((1, 5), 6)
    assert group_offsets((1, 5), 6) is first
    assert not first.is_inference()


def test_dropout_is_for_training() -> None:
    """Dropout in evaluation, or a rate that is stored and never used."""
    q, k, v = heads()
    module = dap.DilatedAttention(*BRANCHES, attention_dropout=0.3)
    plain = dap.DilatedAttention(*BRANCHES)(q, k, v)
    assert not torch.equal(module(q, k, v), plain)
    assert torch.equal(module.eval()(q, k, v), plain)


def test_unequal_branches_are_refused_when_it_is_built() -> None:
    """A model of many layers that fails at its first batch."""
    with pytest.raises(ValueError, match=r"one pair a branch; got \[16, 40\] and \[2\]"):
        dap.DilatedAttention([16, 40], [2])


def test_it_is_printed_and_pickled_whole() -> None:
    """A module that cannot be sent to another process, or whose print hides what it does."""
    module = dap.DilatedAttention(*BRANCHES, softmax_scale=0.5, attention_dropout=0.1, head_groups=True)
    text = "DilatedAttention([16, 40], [2, 3], softmax_scale=0.5, attention_dropout=0.1, head_groups=True)"
    assert repr(pickle.loads(pickle.dumps(module))) == text
    assert repr(dap.DilatedAttention(*BRANCHES)) == "DilatedAttention([16, 40], [2, 3])"
