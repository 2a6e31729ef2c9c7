"""The workloads of the field: every one is a set of problems that a plan can be asked for."""

from __future__ import annotations

import math

import pytest

from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.workloads import WORKLOADS, named, near_square


def test_every_combination_of_a_workload_is_a_problem() -> None:
    """A length, dtype or pattern that is listed and never run is a promise that nobody holds."""
    assert {name: len(workload.problems()) for name, workload in WORKLOADS.items()} == {
        "longnet": 2, "gigapath": 1, "longvit": 1, "readme": 2, "core": 12, "wide": 2, "image": 2,
    }  # fmt: skip


def test_a_workload_changes_only_what_is_asked() -> None:
    """`--length 1000` of a snake has rows of another width; the rest stays."""
    core = named("core").problem(length=1000, pattern=2, dtype="bf16")
    assert (core.length, core.row_width, core.branches, core.dtype) == (1000, 32, ((128, 4),), "bf16")
    assert (core.batch, core.queries, core.order) == (4, "all", "snake")


def test_weights_run_under_the_rules_they_were_trained_under() -> None:
    """Prov-GigaPath's weights under LongNet's offsets or without phantom keys give wrong embeddings."""
    gigapath = named("gigapath").problem()
    assert (gigapath.head_offset, gigapath.padding, gigapath.branches[-1]) == ("blocked", "zeros", (1048576, 16))


def test_an_unknown_workload_is_answered_with_the_known() -> None:
    """A KeyError says nothing of what there is."""
    with pytest.raises(ArgumentError, match="'longent' is no workload; known are longnet, gigapath"):
        named("longent")


@pytest.mark.parametrize("cells", [0, 1, 2, 3, 4, 5, 15, 16, 17, 1000])
def test_near_square_is_the_ceiling_of_the_root(cells: int) -> None:
    """A float root is one off for large squares, and all tokens behind the first row are elsewhere."""
    assert near_square(cells) == max(math.ceil(math.sqrt(cells)), 1)
    assert near_square(cells**2 * 10**12) == max(cells * 10**6, 1)
