"""The settings that the client's classes have in common, checked in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..errors import ArgumentError
from .auto_branches import auto_branches

SegmentSize = int | Sequence[int] | Literal["auto"]
DilationRate = int | Sequence[int]


def check_heads(hidden_dim: int, num_heads: int) -> int:
    """The head dimension.

    Raises:
        ArgumentError: There is none.
    """
    if num_heads < 1 or hidden_dim < 1 or hidden_dim % num_heads:
        raise ArgumentError(
            f"hidden_dim must be a multiple of num_heads, got {hidden_dim} and {num_heads}: "
            "each head takes hidden_dim / num_heads of it"
        )
    return hidden_dim // num_heads


def check_dropout(dropout: float) -> float:
    """The probability itself.

    Raises:
        ArgumentError: It is outside [0, 1).
    """
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError(f"dropout must lie in [0, 1), got {dropout}: it is the share of weights that are dropped")
    return dropout


def check_q(q: Tensor, num_heads: int, head_dim: int) -> None:
    """Refuses queries of other heads than a module was made for.

    Raises:
        ArgumentError: The message says which shape fits.
    """
    if q.ndim != 4 or q.shape[2:] != (num_heads, head_dim):
        raise ArgumentError(
            f"q must have shape (B, N, {num_heads}, {head_dim}), as num_heads and head_dim were given, "
            f"got {tuple(q.shape)}"
        )


def branches(
    length: int, segment_size: SegmentSize, dilation_rate: DilationRate
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segment lengths and dilation rates of N tokens, one pair a branch.

    Args:
        length: N, which matters to "auto" alone.
        segment_size: w in steps: one, several, or "auto" for `auto_branches`.
        dilation_rate: r: one or several. A single value goes with every one of the other.

    Raises:
        ArgumentError: A value is not a positive integer, there are unequally many, or "auto" with a dilation rate.
    """
    if segment_size == "auto":
        if dilation_rate != 1:
            raise ArgumentError(
                f"segment_size='auto' chooses the dilation rates too: leave dilation_rate at 1, got {dilation_rate!r}"
            )
        return auto_branches(length)
    lengths, rates = _integers("segment_size", segment_size), _integers("dilation_rate", dilation_rate)
    if len(lengths) == 1:
        lengths *= len(rates)
    elif len(rates) == 1:
        rates *= len(lengths)
    if len(lengths) != len(rates):
        raise ArgumentError(
            f"segment_size and dilation_rate must be as many, or one of them single; got {lengths} and {rates}"
        )
    return lengths, rates


def _integers(label: str, given: int | str | Sequence[int]) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, Sequence) else (given,)
    if not values or not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values):
        auto = " or 'auto'" if label == "segment_size" else ""
        raise ArgumentError(f"{label} must be a positive integer, a sequence of them{auto}, got {given!r}")
    return values  # type: ignore[return-value]
