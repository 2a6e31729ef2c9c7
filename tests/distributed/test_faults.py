"""Ranks that differ, are absent or die: a sentence on every rank that is left, and no hang."""

from __future__ import annotations

import pytest

from .conftest import Outcomes

SAID = {
    "rates": "dilation_rates is [1, 2] on rank 0; [1, 3] on rank 1",
    "heads": "the number of heads is 4 on rank 0; 2 on rank 1",
    "refused": "rank 1 refuses its arguments: dropout_p must lie in [0, 1), got 1.5",
    "gradients": "whether gradients are recorded is True on rank 0; False on rank 1",
    "order": "but order is TokenOrder.from_permutation(<24 tokens>) with digest",
    "calls": "the call is dilated_attention on rank 0; unshard on rank 1",
    "database": "the database digest is",
    "stray file": "rank 1 refuses its arguments",
    "dim": "rank 1 refuses its arguments: dim must be one of x's 4 dimensions, got 7",
    "no dim": "rank 1 refuses its arguments: dim must be an integer, got 'steps'",
    "no tensor": "rank 1 refuses its arguments: x must be a tensor, got NoneType",
    "miss": "rank 1 refuses its arguments: nothing was measured here",
    "reference": "refuses its arguments: across ranks backend must be",
    "triton": "the triton backend refuses across ranks: dropout goes by",
}


@pytest.mark.parametrize("fault", SAID)
def test_ranks_that_differ_are_told_so(fault: str, outcomes: Outcomes) -> None:
    """One rank waits for a message that the other never sends; or each is told something else."""
    first, *others = (told[fault] for told in outcomes("disagreements"))
    assert SAID[fault] in first
    assert others == [first]


def test_a_stray_file_on_one_rank_is_named(outcomes: Outcomes) -> None:
    """A broken database that only its own rank hears of."""
    for told in outcomes("disagreements"):
        assert "x.yaml:1: no lookup would find this file" in told["stray file"]


def test_plans_that_suit_all_ranks_are_no_fault(outcomes: Outcomes) -> None:
    """A call under on_miss="error" that is refused, or waits, though nothing is missing."""
    assert {told["no miss"] for told in outcomes("disagreements")} == {"nothing was raised"}


def test_a_disagreement_ends_one_call(outcomes: Outcomes) -> None:
    """A group that is of no use after a mistake was caught."""
    assert {told["agreed"] for told in outcomes("disagreements")} == {"nothing was raised"}


def test_a_rank_that_stays_away_ends_the_others(outcomes: Outcomes) -> None:
    """A hang, or torch's words without who waited for what."""
    for rank, told in enumerate(outcomes("absent")[:-1]):
        assert told.startswith(f"LostRankError: rank {rank} of 4 waited in vain for")
        assert "imed out" in told or "onnection closed" in told  # the first one's timeout ends the others


def test_a_rank_that_dies_ends_the_others(outcomes: Outcomes) -> None:
    """The same for a process that is gone."""
    for rank, told in enumerate(outcomes("dead")):
        assert told.startswith(f"LostRankError: rank {rank} of 4 waited in vain for the other ranks' arguments")
