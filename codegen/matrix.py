"""Which variants are rendered, and why these.

A *pattern* is what a model asks for: a segment length, a dilation rate, an order and who asks. Each becomes the
texts from which the plan may choose when it knows N and the block sizes. A pattern that is not listed runs through a
general variant; one line in `PATTERNS`, or `python -m codegen --add 3000:5:hilbert`, gives it texts of its own.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.errors import CodegenError, ConfigError
from dilated_attention_pytorch.variant import ORDERS, QUERIES, Variant

ONE_TILE_ROWS = 128
"""A segment of at most so many kept rows may be held by one tile."""
SMALLEST_TILE = 16
"""Rows that a tile has at least: a tensor core takes no fewer."""
EVEN_ROWS = 64
"""Kept rows are a multiple of this where tiles of 64, the commonest size, shall fill a segment."""

EVEN = "nothing is ragged"
RING = "nothing is ragged, on Hopper"


@dataclass(frozen=True)
class Pattern:
    """A branch that somebody runs, and who.

    Attributes:
        segment: Segment length w in steps, or "full": one segment holds the sequence, however long.
        dilation: Dilation rate r.
        order: "none", "snake" or "hilbert" (any permutation).
        queries: "dilated" or "all".
        reason: The workload that asks for it.
        wider: (segment, dilation) of further branches that are computed in the same pass.
    """

    segment: int | str
    dilation: int
    order: str = "none"
    queries: str = "dilated"
    reason: str = "added"
    wider: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self.variant()

    def variant(self, *, one_tile: bool = False, even: bool = False) -> Variant:
        """One of the pattern's texts in Triton."""
        return Variant(self.segment, self.dilation, self.order, self.queries, one_tile, even, self.wider)

    def texts(self) -> Iterator[tuple[Variant, str]]:
        """The pattern's variants, each with what it relies on."""
        if self.wider:
            yield self.variant(), "one pass"
            even = self.variant(even=True)
            yield even, "one pass, nothing is ragged"
            if even.ringable:
                yield replace(even, ring=True), f"one pass; {RING}"
            return
        rows = self.variant().rows
        whole = isinstance(self.segment, str) or self.segment % self.dilation == 0
        if rows is None or rows > SMALLEST_TILE:  # else one tile holds a segment, whatever the tiles
            yield self.variant(), ""
        if whole and (rows is None or rows % EVEN_ROWS == 0):
            even = self.variant(even=True)
            yield even, EVEN
            if even.ringable:
                yield replace(even, ring=True), RING
        if rows is not None and rows <= ONE_TILE_ROWS:
            yield self.variant(one_tile=True), "one tile holds a segment"
            if whole and rows >= SMALLEST_TILE and rows & (rows - 1) == 0:
                yield self.variant(one_tile=True, even=True), "one tile is a segment"


# One line a pattern. The first fields are Pattern's: segment, dilation, order, queries. A branch that holds the
# sequence of its workload is "full"; on longer sequences it runs the general text, whose segment and rate are
# compile-time constants as well: what a text of its own adds is that the constants can be read in it.
PATTERNS = [
    Pattern(2048, 1, reason="longnet"),
    Pattern(4096, 2, reason="longnet"),
    Pattern(8192, 4, reason="longnet"),
    Pattern(16384, 6, reason="longnet"),
    Pattern("full", 12, reason="longnet"),
    Pattern(1024, 1, reason="gigapath"),
    Pattern(5792, 2, reason="gigapath"),
    Pattern("full", 4, reason="gigapath"),
    Pattern("full", 8, reason="gigapath"),
    Pattern("full", 16, reason="gigapath"),
    Pattern(1024, 1, reason="longvit"),
    Pattern(2048, 2, reason="longvit"),
    Pattern(4096, 4, reason="longvit"),
    Pattern(8192, 8, reason="longvit"),
    Pattern("full", 16, reason="longvit"),
    Pattern(2048, 1, reason="readme"),
    Pattern(4096, 2, reason="readme"),
    Pattern("full", 4, reason="readme"),
    Pattern(2048, 1, reason="wide"),
    Pattern(4096, 2, reason="wide"),
    Pattern(8192, 4, reason="wide"),
    Pattern(16384, 8, reason="wide"),
    Pattern(32768, 16, reason="wide"),
    Pattern(128, 1, "none", "all", reason="core"),
    Pattern(128, 2, "none", "all", reason="core"),
    Pattern(128, 4, "none", "all", reason="core"),
    Pattern(128, 1, "snake", "all", reason="core"),
    Pattern(128, 2, "snake", "all", reason="core"),
    Pattern(128, 4, "snake", "all", reason="core"),
    Pattern(1024, 1, "hilbert", reason="image"),
    Pattern(1024, 2, "hilbert", reason="image"),
    Pattern("full", 1, reason="dense attention, a branch of many"),
    # Several branches in one pass.
    Pattern(2048, 1, reason="longnet, readme, wide", wider=((4096, 2), (8192, 4))),
    Pattern(1024, 1, reason="longvit", wider=((2048, 2),)),
]


def expand(patterns: Iterable[Pattern]) -> dict[Variant, str]:
    """Every variant that is rendered, with its reasons; patterns that share a variant join theirs."""
    who: dict[Variant, list[str]] = {}
    what: dict[Variant, str] = {}
    for pattern in patterns:
        for variant, relies_on in pattern.texts():
            reasons = who.setdefault(variant, [])
            if pattern.reason not in reasons:
                reasons.append(pattern.reason)
            what[variant] = relies_on
    reasons_of = {variant: "; ".join(filter(None, (", ".join(who[variant]), what[variant]))) for variant in who}
    for order in ORDERS:
        for queries in QUERIES:
            for even in (False, True):
                unlisted = ("any other segment and dilation", "one segment, any other dilation")
                for segment, reason in zip((None, "full"), unlisted, strict=True):
                    variant = Variant(segment, None, order, queries, even=even)
                    reasons_of[variant] = f"{reason}; {EVEN}" if even else reason
                    if variant.ringable:
                        reasons_of[replace(variant, ring=True)] = f"{reason}; {RING if even else 'on Hopper'}"
    for queries, even in itertools.product(QUERIES, (False, True)):
        reason = "any other segment, one tile is one" if even else "any other segment that one tile holds"
        variant = Variant(None, None, queries=queries, one_tile=True, even=even)
        reasons_of[variant] = reason
        if variant.ringable:
            reasons_of[replace(variant, ring=True)] = f"any segment, one tile is one; {RING}"
    return dict(sorted(reasons_of.items(), key=lambda item: _reading_order(item[0])))


def _reading_order(variant: Variant) -> tuple[int, ...]:
    """The general ones, then full ones, then segments by number: as a person would look one up."""
    length = variant.segment if isinstance(variant.segment, int) else -1 if variant.segment == "full" else -2
    words = ORDERS.index(variant.order), QUERIES.index(variant.queries)
    return len(variant.wider), length, variant.dilation or 0, *words, variant.one_tile, variant.even, variant.ring


VARIANTS = expand(PATTERNS)


def parse(spec: str) -> Pattern:
    """The pattern that `--add` is given: `segment:dilation[:order][:queries]`, such as `3000:5:hilbert:all`.

    Branches that share a pass are joined by a plus, the narrowest first: `2048:1+4096:2`.

    Raises:
        CodegenError: The text is none; the message says which part.
    """
    if "+" in spec:
        (first, *others), joined = map(parse, spec.split("+")), "+ joins segment:dilation pairs alone"
        if any((other.segment == "full", other.order, other.queries) != (False, "none", "dilated") for other in others):
            raise CodegenError(f"{spec!r}: {joined}, e.g. 2048:1+4096:2")
        try:
            return replace(first, wider=tuple((int(other.segment), other.dilation) for other in others))
        except ConfigError as error:
            raise CodegenError(f"{spec!r}: {error}") from error
    usage = "expected segment:dilation[:order][:queries], e.g. 3000:5:hilbert, full:3 or 2048:1+4096:2"
    segment, *rest = spec.split(":")
    if not rest:
        raise CodegenError(f"{spec!r} has no dilation rate; {usage}")
    dilation, *words = rest
    chosen: dict[str, Any] = {}
    for word in words:
        field = "order" if word in ORDERS else "queries" if word in QUERIES else None
        if field is None:
            raise CodegenError(f"{word!r} in {spec!r} is neither an order nor a kind of queries; {usage}")
        if field in chosen:
            raise CodegenError(f"{spec!r} names {field} twice; {usage}")
        chosen[field] = word
    for label, value in (("segment", segment), ("dilation", dilation)):
        if not re.fullmatch(r"[1-9][0-9]{0,9}", value) and (label, value) != ("segment", "full"):
            raise CodegenError(f"{label} {value!r} in {spec!r} is no positive integer; {usage}")
    if segment != "full" and int(dilation) > int(segment):
        raise CodegenError(f"{spec!r} keeps one step a segment at most: the general variants do for that; {usage}")
    return Pattern(segment if segment == "full" else int(segment), int(dilation), **chosen)


def with_pattern(source: str, pattern: Pattern) -> str:
    """This file's text with one more line at the end of `PATTERNS`."""
    end = next(
        node.value.end_lineno
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PATTERNS"
    )
    assert end is not None
    words = [repr(pattern.segment).replace("'", '"'), str(pattern.dilation)]
    if (pattern.order, pattern.queries) != ("none", "dilated"):
        words.append(f'"{pattern.order}"')
    if pattern.queries != "dilated":
        words.append(f'"{pattern.queries}"')
    words.append(f'reason="{pattern.reason}"')
    if pattern.wider:
        words.append(f"wider={pattern.wider}")
    lines = source.splitlines(keepends=True)
    lines.insert(end - 1, f"    Pattern({', '.join(words)}),\n")
    return "".join(lines)


def add(pattern: Pattern, file: Path = Path(__file__)) -> None:
    """Write the pattern's line into this file."""
    file.write_text(with_pattern(file.read_text(encoding="utf-8"), pattern), encoding="utf-8", newline="\n")
