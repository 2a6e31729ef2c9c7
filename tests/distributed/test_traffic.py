"""What travels: counted in the ranks, and by hand from the definition; docs/scale.md says the same in a formula."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from dilated_attention_pytorch.distributed.layout import Shards
from docs import scale

from .conftest import Outcomes
from .ranks import TRAFFIC, Cut

BYTES = {"fp32": 4, "bf16": 2}


def by_hand(cut: Cut, rank: int) -> tuple[int, int]:
    """Bytes that a rank has to send forward and backward: each kept row of each (key head, offset), by step."""
    case = cut.case
    owner = torch.arange(len(cut.lengths)).repeat_interleave(torch.tensor(cut.lengths)).tolist()
    forward = backward = 0
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
            if owner[step] == rank:
                forward += rows * len(asking) * (row_bytes + case.B * case.mask)
            backward += rows * row_bytes * (rank in asking)
    return forward, backward


@pytest.mark.parametrize("cut", TRAFFIC, ids=lambda cut: cut.id)
def test_only_kept_rows_of_crossing_segments_travel(cut: Cut, outcomes: Outcomes) -> None:
    """Whole tensors sent, rows sent to ranks that do not ask them, or padding."""
    ranks = len(cut.lengths)
    place = [other for other in TRAFFIC if len(other.lengths) == ranks].index(cut)
    counted = [found[place] for found in outcomes(f"traffic of {ranks}")]
    assert counted == [by_hand(cut, rank) for rank in range(ranks)]


@pytest.mark.parametrize("cut", TRAFFIC, ids=lambda cut: cut.id)
def test_the_pages_formula_is_what_is_sent(cut: Cut) -> None:
    """A page that promises less than what travels."""
    case = cut.case
    sizes = scale.Sizes(case.B, case.H, case.kv_heads, case.D, BYTES[case.dtype], case.causal, case.mask)
    for rank in range(len(cut.lengths)):
        shards = Shards((0, *accumulate(cut.lengths)), rank)
        assert scale.bytes_sent(sizes, case.branches, shards) == by_hand(cut, rank)[0]


def test_the_short_form_holds_where_everything_divides() -> None:
    """2·B·e·D·H·(w − n)/r for each branch, whatever N."""
    sizes = scale.Sizes(batch=2, heads=4, kv_heads=4, head_dim=8, element=2)
    for length in (1 << 10, 1 << 20, 1 << 30):
        shards = Shards(tuple(range(0, length + 1, length // 64)), rank=17)
        own = length // 64
        branches = ((own // 2, 2), (own, 4), (4 * own, 8), (length, 16))
        short = sum(2 * 2 * 2 * 8 * 4 * (width - own) // rate for width, rate in branches if width > own)
        assert scale.bytes_sent(sizes, branches, shards) == short


def test_a_rank_with_whole_segments_sends_nothing() -> None:
    """A message, however small, for a branch that needs none."""
    for cuts in ((0, 32, 64, 96), (0, 16, 16, 61)):
        for rank in range(3):
            shards = Shards(cuts, rank)
            assert scale.bytes_sent(scale.Sizes(1, 4, 4, 8, 2), ((16, 1), (8, 2)), shards) == 0
            assert shards.crossing(16) == []
