"""What a generated module is specialised for, and the one owner of its name.

File names, database rows, kernel names in a profile and log lines all come from `Variant.name`; `Variant.from_name`
reads them back. Nothing here imports torch or triton, so that the workshop (`codegen/`) runs without either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError

HELD_ROWS = 256
"""Kept rows of a segment that one tile of a loop over queries holds at most: its dK and dV stay in registers."""
ORDERS = ("none", "snake", "hilbert")
QUERIES = ("dilated", "all")

_NAME = re.compile(
    r"(?:(?P<general>general)|(?:s(?P<segments>[1-9]\d*(?:_[1-9]\d*)*)|(?P<full>full))"
    r"(?:_d(?P<dilations>[1-9]\d*(?:_[1-9]\d*)*))?)"
    r"(?:_(?P<order>snake|hilbert))?(?P<all>_all)?(?P<one>_one)?(?P<even>_even)?(?P<ring>_ring)?"
)


def _numbers(match: re.Match[str] | None, group: str) -> list[int]:
    found = match[group] if match else None
    return [int(number) for number in found.split("_")] if found else []


CHAIN_RULE = "each segment length must divide the next, each rate the next, and the largest rate the smallest segment"


def is_chain(branches: Sequence[tuple[int, int]]) -> bool:
    """Whether (segment, dilation) pairs, the narrowest first, can be computed in one pass."""
    nested = all(
        wider % segment == 0 and rate % dilation == 0
        for (segment, dilation), (wider, rate) in itertools.pairwise(branches)
    )
    return nested and branches[0][0] % branches[-1][1] == 0


@dataclass(frozen=True, order=True)
class Variant:
    """One generated module: which numbers and which statements are fixed in its text.

    Attributes:
        segment: Segment length w in steps; "full" where one segment of run-time length N holds everything; None in
            the general variant, which takes it as a `tl.constexpr`.
        dilation: Dilation rate r; None where it is a `tl.constexpr` argument (general variants).
        order: "none"; "snake", computed in the kernel; "hilbert", any permutation read through an index.
        queries: "dilated" or "all", see `dilated_attention`.
        one_tile: One tile holds all keys (and all queries) of a segment: no loop, no online softmax.
        even: Nothing is ragged: the segments fill N, and the tiles fill the segments. No tail mask.
        wider: (segment, dilation) of further branches that are computed in the same pass, a chain: each segment length
            and each dilation rate divides the next, the largest rate the smallest segment.
        ring: Written in Gluon for Hopper, beside the text in Triton: the kernel keeps a ring of tiles of its own. Where
            one tile holds a segment there is but a launch for all gradients.
    """

    segment: int | str | None
    dilation: int | None
    order: str = "none"
    queries: str = "dilated"
    one_tile: bool = False
    even: bool = False
    wider: tuple[tuple[int, int], ...] = ()
    ring: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.segment, str) and self.segment != "full":
            raise ConfigError(f"segment must be a positive int, 'full' or None, got {self.segment!r}")
        for label, value in (("segment", self.segment), ("dilation", self.dilation)):
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{label} must be at least 1, got {value}")
        if isinstance(self.segment, int) and self.dilation is None:
            raise ConfigError(f"a variant of segment {self.segment} must fix its dilation too")
        if self.segment is None and self.dilation is not None:
            raise ConfigError(f"a general variant takes its dilation at compile time, got dilation {self.dilation}")
        if self.order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.queries not in QUERIES:
            raise ConfigError(f"queries must be one of {', '.join(QUERIES)}, got {self.queries!r}")
        if self.one_tile and self.segment == "full":
            raise ConfigError("one_tile needs a segment length that is compiled in")
        if self.even and isinstance(self.segment, int) and self.segment % (self.dilation or 1):
            raise ConfigError(f"segment {self.segment} is no multiple of dilation {self.dilation}: it cannot be even")
        if self.ring and not self.ringable:
            raise ConfigError(
                "in a ring of tiles the kept steps ask: even, or of one branch without an order, general and in loops; "
                "any order is read through an index, in loops; of several branches the first keeps every step"
            )
        if self.wider:
            self._check_chain()

    def _check_chain(self) -> None:
        if not isinstance(self.segment, int) or self.one_tile or (self.order, self.queries) != ("none", "dilated"):
            raise ConfigError("branches share a pass where segments are fixed, steps are tokens, and the kept ones ask")
        if not is_chain(self.levels):
            raise ConfigError(f"branches {list(self.levels)} are no chain: {CHAIN_RULE}")

    @property
    def described(self) -> bool:
        """Its tiles may be loaded by tensor descriptors, whose rows are whole rows of memory."""
        return bool(self.wider) or (self.order == "none" and (self.ring or self.even))

    @property
    def ringable(self) -> bool:
        """There may be a text beside it, or it is that text, whose kernels keep a ring of tiles of their own."""
        if self.queries != "dilated":
            return False
        if self.wider:
            return self.even and self.dilation == 1
        if self.order != "none":
            return self.order == "hilbert" and self.even and not self.one_tile
        general = self.dilation is None and not self.one_tile
        return self.even or general

    @property
    def joinable(self) -> bool:
        """One launch of it may give dq, dk and dv: where one tile may hold all keys that a query sees."""
        every_query = self.queries == "dilated" or self.dilation == 1
        holdable = self.described and every_query and not (self.wider or self.ring) and self.segment != "full"
        return self.one_tile or (holdable and (self.rows is None or self.rows <= HELD_ROWS))

    @property
    def name(self) -> str:
        """`s2048_d2_hilbert`, `full_d4`, `s128_d1_snake_all_one_even`, `s2048_4096_d1_2`, `general`, …"""
        if self.segment is None:
            parts = ["general"]
        else:
            segments, dilations = zip((self.segment, self.dilation), *self.wider, strict=True)
            parts = ["full" if self.segment == "full" else "s" + "_".join(map(str, segments))]
            if self.dilation is not None:
                parts.append("d" + "_".join(map(str, dilations)))
        if self.order != "none":
            parts.append(self.order)
        if self.queries == "all":
            parts.append("all")
        if self.one_tile:
            parts.append("one")
        if self.even:
            parts.append("even")
        if self.ring:
            parts.append("ring")
        return "_".join(parts)

    @classmethod
    def from_name(cls, name: str) -> Variant:
        """The variant a name stands for.

        Raises:
            ConfigError: The name is none.
        """
        match = _NAME.fullmatch(name)
        segments, dilations = (_numbers(match, group) for group in ("segments", "dilations"))
        if match is None or (len(segments) != len(dilations) and len(segments + dilations) > 1):
            raise ConfigError(f"{name!r} is no variant name; expected e.g. 's2048_d2_hilbert'")
        return cls(
            segment="full" if match["full"] else next(iter(segments), None),
            dilation=next(iter(dilations), None),
            order=match["order"] or "none",
            queries="all" if match["all"] else "dilated",
            one_tile=bool(match["one"]),
            even=bool(match["even"]),
            wider=tuple(zip(segments[1:], dilations[1:], strict=True)),
            ring=bool(match["ring"]),
        )

    def __str__(self) -> str:
        return self.name

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(segment, dilation) of all branches of a chain, the narrowest first; empty for a branch alone."""
        if not self.wider or not isinstance(self.segment, int) or self.dilation is None:
            return ()
        return ((self.segment, self.dilation), *self.wider)

    @property
    def rows(self) -> int | None:
        """Kept rows ⌈w/r⌉ of a whole segment, or None where the text does not fix them."""
        if not isinstance(self.segment, int) or self.dilation is None:
            return None
        return -(-self.segment // self.dilation)
