"""Which text runs a branch, and where an order is none, against the sets of tokens themselves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from codegen.matrix import PATTERNS, expand, parse
from dilated_attention_pytorch import generated
from dilated_attention_pytorch.config import LaunchConfig, Problem
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.runtime.variants import acting_order, chain, text_for, variant_for
from dilated_attention_pytorch.variant import Variant
from dilated_attention_pytorch.workloads import near_square

from ..kernels import ops_of

TEXTS = generated.names()
SQUARE = LaunchConfig(64, 64)


def problem(length: int, segment: int, dilation: int, **more: object) -> Problem:
    facts = {"dtype": "bf16", "batch": 1, "heads": 4, "kv_heads": 4, "head_dim": 64}
    return Problem(length=length, branches=((segment, dilation),), **facts, **more)  # type: ignore[arg-type]


def grouped(asked: Problem) -> Problem:
    """Two query heads a key/value head."""
    return replace(asked, kv_heads=2)


def name(asked: Problem, config: LaunchConfig = SQUARE, op: str = "fwd", texts: frozenset[str] = TEXTS) -> str:
    found = variant_for(asked, 0, op, config, texts)
    assert found is not None
    return found.name


@pytest.mark.parametrize(
    ("asked", "config", "op", "expected"),
    [
        (problem(8192, 2048, 2), SQUARE, "fwd", "s2048_d2_even"),
        (problem(8191, 2048, 2), SQUARE, "fwd", "s2048_d2"),
        (problem(8192, 2048, 3), SQUARE, "fwd", "general"),
        (problem(1000, 2048, 4), SQUARE, "fwd", "full_d4"),
        (problem(1024, 2048, 4), SQUARE, "fwd", "full_d4_even"),
        (problem(1024, 4096, 7), SQUARE, "fwd", "full"),
        (problem(2048, 4096, 2), SQUARE, "fwd", "s2048_d2_even"),
        (problem(1000, 1000, 1, query_range=(3, 17)), SQUARE, "fwd", "full_d1"),
        (problem(8192, 2048, 2, query_range=(2048, 6144)), SQUARE, "dq", "s2048_d2_even"),
        (problem(8192, 2048, 2, query_range=(2048, 6143)), SQUARE, "dq", "s2048_d2"),
        (problem(8192, 2048, 1, head_offset="table"), SQUARE, "fwd", "general"),
        (problem(8192, 8192, 1, head_offset="table"), SQUARE, "fwd", "full"),
        (problem(8192, 2048, 2, head_offset="table"), SQUARE, "fwd", "s2048_d2"),
        (problem(1024, 128, 2, queries="all"), SQUARE, "fwd", "s128_d2_all_one_even"),
        (problem(1024, 128, 2, queries="all"), LaunchConfig(64, 32), "fwd", "s128_d2_all_even"),
        (problem(1024, 128, 2, queries="all"), LaunchConfig(64, 128), "fwd", "s128_d2_all_one"),
        (problem(1000, 128, 2, queries="all"), SQUARE, "fwd", "s128_d2_all_one"),
        (problem(1024, 128, 2, queries="all"), SQUARE, "dkdv", "s128_d2_all_even"),
        (problem(1024, 128, 2, queries="all"), LaunchConfig(128, 64), "dkdv", "s128_d2_all_one_even"),
        (problem(1024, 128, 2, queries="all"), LaunchConfig(256, 64), "dkdv", "s128_d2_all_one"),
        (grouped(problem(1024, 128, 2, queries="all")), LaunchConfig(128, 64), "dkdv", "s128_d2_all_one"),
        (grouped(problem(1024, 128, 2, queries="all")), LaunchConfig(128, 64), "fwd", "s128_d2_all_one_even"),
        (problem(1024, 128, 2, queries="all"), LaunchConfig(256, 64), "fwd", "s128_d2_all_one"),
        (problem(8192, 1024, 2, order="hilbert"), SQUARE, "fwd", "s1024_d2_hilbert_even"),
        (problem(8192, 1024, 3, order="hilbert"), SQUARE, "fwd", "general_hilbert"),
    ],
)
def test_the_most_special_text_runs(asked: Problem, config: LaunchConfig, op: str, expected: str) -> None:
    """A promise that is not kept reads past a segment; one that is overlooked runs a loop for nothing."""
    assert name(asked, config, op) == expected


def test_without_its_texts_a_pattern_runs_through_the_general_one() -> None:
    """A checkout with one text must still run everything of its order; with none, nothing."""
    asked = problem(8192, 2048, 2)
    assert name(asked, texts=frozenset({"general"})) == "general"
    assert variant_for(asked, 0, "fwd", SQUARE, frozenset({"general_hilbert", "delta"})) is None


@pytest.mark.parametrize("added", [[], ["3000:5:hilbert", "64:4", "full:3", "100:3", "128:16:all", "2048:1+4096:2"]])
def test_every_attention_text_can_run(added: list[str]) -> None:
    """A text that no problem leads to: dead weight in git, or tests that fail after a user's `--add`."""
    texts = frozenset(variant.name for variant in expand([*PATTERNS, *map(parse, added)])) | {"delta"}
    assert texts == TEXTS if not added else texts > TEXTS
    reached = set()
    for text in sorted(texts - {"delta"}):
        variant = Variant.from_name(text)
        if variant.levels:
            length = 2 * variant.levels[-1][0] - (not variant.even)
            asked = replace(problem(length, 1, 1), branches=variant.levels)
            found = chain(asked, texts & {text, text.removesuffix("_ring").removesuffix("_even")})
            assert found == tuple(range(len(variant.levels)))
            tiles = LaunchConfig(64, 64, num_stages=2, loads="ring") if variant.ring else SQUARE
            reached.add(str(text_for(asked, found, "fwd", tiles, texts)))
            continue
        dilation = variant.dilation or 5
        of_any = (
            (64 * dilation if variant.even else 333) if variant.one_tile else 192 * dilation if variant.even else 775
        )
        segment = variant.segment if isinstance(variant.segment, int) else of_any
        length = segment if variant.segment == "full" else 2 * segment
        if variant.even and variant.segment == "full":
            segment = length = 64 * dilation
        length -= 0 if variant.even else 1
        asked = problem(length, segment, dilation, order=variant.order,
                        queries=variant.queries, row_width=23 * (variant.order == "snake"))  # fmt: skip
        for block_m, block_n in itertools.product((16, 64), (16, 32, 64, 128)):
            reached.add(name(asked, LaunchConfig(block_m, block_n), texts=texts))
        if variant.ring:
            reached.add(name(asked, LaunchConfig(64, 64, loads="ring"), ops_of(variant)[0], texts=texts))
    assert reached >= texts - {"delta"}


# ---- Orders that change nothing --------------------------------------------------------------------------------------


def segments_of(order: TokenOrder | None, length: int, segment: int) -> list[frozenset[int]]:
    tokens = list(range(length)) if order is None else order.indices(length).tolist()
    return [frozenset(tokens[start : start + segment]) for start in range(0, length, segment)]


def test_a_snake_is_left_out_exactly_where_its_segments_hold_the_same_tokens() -> None:
    """Left out wrongly, the result is another function; kept wrongly, tokens are computed for nothing."""
    dropped = 0
    for length, prefix, width, segment in itertools.product(range(1, 26), (0, 1, 3, 4), range(1, 8), range(1, 27)):
        if prefix > length:
            continue
        asked = problem(length, segment, 1, order="snake", row_width=width, prefix=prefix)
        tokens = snake(length, width, prefix)
        same = all(
            frozenset(tokens[start : start + segment]) == frozenset(range(start, min(start + segment, length)))
            for start in range(0, length, segment)
        )
        assert (acting_order(asked, 0) == "none") == same, (length, prefix, width, segment)
        dropped += same
    assert dropped > 1000


def snake(length: int, width: int, prefix: int) -> list[int]:
    """Tokens by step: behind the prefix every second row of `width` runs backwards, the last as far as it goes."""
    tokens = list(range(prefix))
    for row, start in enumerate(range(prefix, length, width)):
        cells = range(start, min(start + width, length))
        tokens += reversed(cells) if row % 2 else cells
    return tokens


@pytest.mark.parametrize(("length", "prefix"), [(37, 0), (50, 3), (64, 0), (81, 17)])
def test_the_snake_of_these_tests_is_the_package_s(length: int, prefix: int) -> None:
    """The test above would prove its own picture of a snake alone."""
    tokens = TokenOrder("snake", prefix=prefix).indices(length).tolist()
    assert tokens == snake(length, near_square(length - prefix), prefix)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "none"),
        ({"causal": True, "mask": True}, "none"),
        ({"branches": ((100, 2),)}, "hilbert"),
        ({"branches": ((99, 1),)}, "hilbert"),
        ({"query_range": (0, 100)}, "none"),
        ({"query_range": (0, 50)}, "hilbert"),
    ],
)
def test_any_order_of_one_whole_segment_is_left_out(changes: dict[str, object], expected: str) -> None:
    """Part of a segment's steps, or thinned ones, are other tokens in another order."""
    asked = replace(problem(100, 100, 1, order="hilbert"), **changes)  # type: ignore[arg-type]
    assert acting_order(asked, 0) == expected


def test_an_order_left_out_needs_no_ordered_text() -> None:
    """The recognised case must reach the unordered kernel, not only its name."""
    asked = problem(1024, 128, 1, order="snake", row_width=32, queries="all")
    assert name(asked, LaunchConfig(64, 64)) == "s128_d1_all_even"
    assert name(replace(asked, row_width=33), LaunchConfig(64, 64)) == "s128_d1_snake_all_even"
