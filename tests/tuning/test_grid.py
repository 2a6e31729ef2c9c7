"""The calls around the workloads: how many, of what size, of which kinds."""

from __future__ import annotations

import itertools
import math

from dilated_attention_pytorch import device, generated
from dilated_attention_pytorch.config import OPS, ProblemKey
from dilated_attention_pytorch.database import NEAREST
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.tuning import grid, problems

H100 = device.simulated("h100")
GRID = problems.of_calls([("grid", problem) for problem in grid.calls()], H100)
FLOPS_A_SECOND = {"bf16": 2.5e14, "fp16": 2.5e14, "fp32": 3e13}
"""What a launch can be expected to reach at least."""


def kinds(key: ProblemKey) -> tuple[object, ...]:
    """What measurements must share that speak for each other."""
    return key.dtype, key.head_dim, key.queries, key.order, key.causal, key.flags


def test_no_more_entries_than_a_review_takes() -> None:
    """A grid that grew; two calls with one key; a forward without its backward."""
    every = problems.of_calls(problems.preset("standard"), H100)
    assert len({task.key for task in every}) == len(every) <= problems.MOST_ENTRIES
    assert sum(task.op in OPS for task in GRID) == len(OPS) * len(grid.calls())


def test_every_kind_that_people_have_is_there() -> None:
    """A dtype, a head dimension, an order or a mask whose problems all run untuned."""
    keys = {task.key for task in GRID}
    found = {kinds(key) for key in keys}
    for head_dim in (48, 64, 96, 128):
        for dtype in ("bf16", "fp16", "fp32"):
            assert (dtype, head_dim, "dilated", "none", False, ()) in found
        assert ("bf16", head_dim, "dilated", "none", True, ()) in found
    for head_dim in (64, 128):
        for order in ("none", "snake", "hilbert"):
            assert ("bf16", head_dim, "all", order, False, ()) in found
            assert ("bf16", head_dim, "dilated", order, False, ()) in found
        for flag in ("full", "mask"):
            assert ("bf16", head_dim, "dilated", "none", False, (flag,)) in found
    ragged = {
        (task.key.head_dim, task.key.causal) for task in GRID if task.problem.length % task.problem.branches[0][0]
    }
    assert ragged == set(itertools.product((64, 128), (False, True)))
    rows = {key.branches[0][0] for key in keys}
    assert min(rows) == 64
    for wanted in (64, 8192, 16384):
        assert min(abs(math.log2(row / wanted)) for row in rows) <= NEAREST / 2


def test_a_launch_is_large_and_short() -> None:
    """Tensors in the level-2 cache, whose measurements mislead; a launch of which the tuner can afford a few only."""
    for task in GRID:
        assert task.bytes > 2 * H100.l2_bytes, task.key
        assert task.flops / FLOPS_A_SECOND[task.key.dtype] < 6e-3, task.key
        problem = task.problem
        asking = problem.rows(0) if problem.queries == "dilated" else problem.segment(0)
        assert 2 * problem.heads * asking * problem.rows(0) <= grid.CHECKED_SCORES, task.key


def test_general_texts_are_measured() -> None:
    """An entry of a text for one segment length, borrowed by all those that run another."""
    for problem in grid.calls():
        for launch in plan(problem, H100, "triton", texts=generated.names()).launches:
            assert launch.variant.name.startswith(("general", "full")), launch.variant.name
