"""What travels: counted in the ranks, and by hand from the definition; docs/scale.md says the same in a formula."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from benchmarks import scale_out
from dilated_attention_pytorch.distributed.layout import Shards
from docs import scale

from .conftest import Outcomes
from .ranks import TRAFFIC, Cut

BYTES = {"fp32": 4, "bf16": 2}


def by_hand(cut: Cut, rank: int) -> tuple[list[int], list[int]]:
    """Bytes of each message of a rank, forward and backward: each kept row of each (key head, offset), by step."""
    case = cut.case
    owner = torch.arange(len(cut.lengths)).repeat_interleave(torch.tensor(cut.lengths)).tolist()
    sent: Counter[tuple[int, ...]] = Counter()
    returned: Counter[tuple[int, ...]] = Counter()
    for branch, (width, rate) in enumerate(case.branches):
        kept = {(head * case.kv_heads // case.H, case.offsets[branch][head]) for head in range(case.H)}
        width = min(width, case.N)
        for step in range(case.N):
            segment = range(step // width * width, min(step // width * width + width, case.N))
            asking = {owner[other] for other in segment} - {owner[step]}
            if case.causal:
                asking = {other for other in asking if other > owner[step]}
            rows = sum(step % width % rate == offset for _, offset in kept)
            row_bytes = 2 * case.B * case.D * BYTES[case.dtype]
            for other in asking if owner[step] == rank else ():
                sent[branch, segment.start, other, 0] += rows * row_bytes
                sent[branch, segment.start, other, 1] += rows * case.B * case.mask  # a message of its own
            if rank in asking:
                returned[branch, segment.start, owner[step]] += rows * row_bytes
    forward, backward = (sorted(size for size in messages.values() if size) for messages in (sent, returned))
    return forward, backward


@pytest.mark.parametrize("cut", TRAFFIC, ids=lambda cut: cut.id)
def test_only_kept_rows_of_crossing_segments_travel(cut: Cut, outcomes: Outcomes) -> None:
    """Whole tensors sent, rows sent to ranks that do not ask them, padding, or a message without bytes."""
    ranks = len(cut.lengths)
    place = [other for other in TRAFFIC if len(other.lengths) == ranks].index(cut)
    counted = [found[place] for found in outcomes(f"traffic of {ranks}")]
    assert counted == [by_hand(cut, rank) for rank in range(ranks)]


@pytest.mark.parametrize("cut", TRAFFIC, ids=lambda cut: cut.id)
def test_the_pages_formula_is_what_is_sent(cut: Cut) -> None:
    """A page that promises less than what travels, or twice as much where causal rows go one way."""
    case = cut.case
    sizes = scale.Sizes(case.B, case.H, case.kv_heads, case.D, BYTES[case.dtype], case.causal, case.mask)
    for rank in range(len(cut.lengths)):
        shards = Shards((0, *accumulate(cut.lengths)), rank)
        counted = (
            sorted(scale.sent(sizes, case.branches, shards)),
            sorted(scale.returned(sizes, case.branches, shards)),
        )
        assert counted == by_hand(cut, rank)


def test_the_short_form_holds_where_everything_divides() -> None:
    """2·B·e·D·H·(w − n)/r for each branch, whatever N."""
    sizes = scale.Sizes(batch=2, heads=4, kv_heads=4, head_dim=8, element=2)
    for length in (1 << 10, 1 << 20, 1 << 30):
        shards = Shards(tuple(range(0, length + 1, length // 64)), rank=17)
        own = length // 64
        branches = ((own // 2, 2), (own, 4), (4 * own, 8), (length, 16))
        short = sum(2 * 2 * 2 * 8 * 4 * (width - own) // rate for width, rate in branches if width > own)
        assert sum(scale.sent(sizes, branches, shards)) == sum(scale.returned(sizes, branches, shards)) == short


def test_a_rank_with_whole_segments_sends_nothing() -> None:
    """A message, however small, for a branch that needs none."""
    for cuts in ((0, 32, 64, 96), (0, 16, 16, 61)):
        for rank in range(3):
            shards = Shards(cuts, rank)
            sizes, branches = scale.Sizes(1, 4, 4, 8, 2), ((16, 1), (8, 2))
            assert scale.sent(sizes, branches, shards) == scale.returned(sizes, branches, shards) == []
            assert shards.crossing(16) == []


def test_a_committed_result_counts_what_travels() -> None:
    """A column that was computed by a count which has changed, or times a model that no longer stands beside them."""
    chosen = {one.name: one for one in scale_out.series(1 << 18, 1 << 16)}
    for path in scale.RESULTS.glob("scale_out_*.json"):
        alone: dict[str, Any] = {}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            alone = row if row["ranks"] == 1 else alone
            problem = chosen[row["series"]].at(row["ranks"])
            assert row == scale_out.scaled(row | scale_out.travelling(problem, row["ranks"]), alone)


def test_causal_rows_travel_one_way() -> None:
    """Of two ranks the first sends forward alone and the second backward alone: counted twice, or not at all."""
    causal = replace(scale_out.series(64, 64)[2].at(2), causal=True)
    both = scale_out.travelling(replace(causal, causal=False), 2)
    assert scale_out.travelling(causal, 2) == {name: count // 2 for name, count in both.items()}
    assert both["messages"] == 2
