"""What a generated module is specialised for, and the one owner of its name.

File names, database rows, kernel names in a profile and log lines all come from `Variant.name`; `Variant.from_name`
reads them back. Nothing here imports torch or triton, so that the workshop (`codegen/`) runs without either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError

ORDERS = ("none", "snake", "hilbert")
QUERIES = ("dilated", "all")

_NAME = re.compile(
    r"(?:(?P<general>general)|(?:s(?P<segment>[1-9]\d*)|(?P<full>full))(?:_d(?P<dilation>[1-9]\d*))?)"
    r"(?:_(?P<order>snake|hilbert))?(?P<all>_all)?(?P<one>_one)?(?P<even>_even)?"
)


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
    """

    segment: int | str | None
    dilation: int | None
    order: str = "none"
    queries: str = "dilated"
    one_tile: bool = False
    even: bool = False

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
        if self.one_tile and not isinstance(self.segment, int):
            raise ConfigError("one_tile needs a fixed segment length")
        if self.even and isinstance(self.segment, int) and self.segment % (self.dilation or 1):
            raise ConfigError(f"segment {self.segment} is no multiple of dilation {self.dilation}: it cannot be even")

    @property
    def name(self) -> str:
        """`s2048_d2_hilbert`, `full_d4`, `s128_d1_snake_all_one_even`, `general`, …"""
        if self.segment is None:
            parts = ["general"]
        else:
            parts = ["full" if self.segment == "full" else f"s{self.segment}"]
            if self.dilation is not None:
                parts.append(f"d{self.dilation}")
        if self.order != "none":
            parts.append(self.order)
        if self.queries == "all":
            parts.append("all")
        if self.one_tile:
            parts.append("one")
        if self.even:
            parts.append("even")
        return "_".join(parts)

    @classmethod
    def from_name(cls, name: str) -> Variant:
        """The variant a name stands for.

        Raises:
            ConfigError: The name is none.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"{name!r} is no variant name; expected e.g. 's2048_d2_hilbert'")
        segment: int | str | None = None
        if match["full"]:
            segment = "full"
        elif match["segment"]:
            segment = int(match["segment"])
        return cls(
            segment=segment,
            dilation=int(match["dilation"]) if match["dilation"] else None,
            order=match["order"] or "none",
            queries="all" if match["all"] else "dilated",
            one_tile=bool(match["one"]),
            even=bool(match["even"]),
        )

    def __str__(self) -> str:
        return self.name

    @property
    def rows(self) -> int | None:
        """Kept rows ⌈w/r⌉ of a whole segment, or None where the text does not fix them."""
        if not isinstance(self.segment, int) or self.dilation is None:
            return None
        return -(-self.segment // self.dilation)
