"""`segment_size="auto"`: the rule, its budget, its reach and its table."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_pytorch.config import cdiv
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.kernels import auto_branches
from dilated_attention_pytorch.kernels.auto_branches import GROWTH, SCORES


@given(st.integers(0, 1 << 30), st.integers(64, 5000))
def test_within_budget_from_near_to_everything(length: int, scores: int) -> None:
    """More scores than stated, a last branch that does not span the sequence, or steps that do not grow by α."""
    lengths, rates = auto_branches(length, scores)
    assert sum(cdiv(min(w, length), r) for w, r in zip(lengths, rates, strict=True)) <= scores
    assert lengths[-1] >= length
    assert all(w < length for w in lengths[:-1])
    assert rates == tuple(GROWTH**branch for branch in range(len(rates)))
    assert lengths == tuple(lengths[0] * rate for rate in rates)
    wider = 2 * lengths[0]
    reach, count = wider, 1
    while reach < length:
        reach, count = reach * GROWTH, count + 1
    assert count * wider > scores, "w₀ is not the largest that the budget allows"


def test_documented_table() -> None:
    """A table that tells of an earlier rule."""
    assert auto_branches.__doc__ is not None
    rows = re.findall(r"\| (\d+) to (\d+) \| (.+) \| (\d+) \|", auto_branches.__doc__)
    assert len(rows) == 6
    last = 0
    for low, high, told, scores in rows:
        assert int(low) == last + 1
        last = int(high)
        for length in (int(low), int(high)):
            lengths, rates = auto_branches(length)
            pairs = [f"{w}/{r}" for w, r in zip(lengths, rates, strict=True)]
            first, _, end = told.partition(", …, ")
            assert pairs[: first.count("/")] == first.split(", ")
            assert pairs[-1] == (end or pairs[-1])
            assert end or len(pairs) == first.count("/")
            assert len(pairs) * lengths[0] == int(scores) <= SCORES


def test_few_answers() -> None:
    """A rule that depends on every bit of N would compile a model anew for every N."""
    assert len({auto_branches(length) for length in range(1, 131073, 97)}) == 6


def test_budget_that_long_sequences_exceed() -> None:
    """A rule that never ends."""
    with pytest.raises(ArgumentError, match="at least 64, got 10"):
        auto_branches(1 << 30, 10)
