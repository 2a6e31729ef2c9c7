"""`segment_size="auto"`: segments and dilations that grow geometrically until one holds the whole sequence."""

from __future__ import annotations

from ..errors import ArgumentError

SCORES = 1024
"""Scores a query token and head at most, unless told otherwise."""

GROWTH = 4
"""α. The paper's experiments double; 4 reaches as far with half the branches, each of which is a kernel launch."""


def auto_branches(length: int, scores: int = SCORES) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Branches for N tokens by LongNet's geometric rule (arXiv 2307.02486, section 2.2), within a budget.

    Branch i has segments of wᵢ = w₀·αⁱ steps at dilation rate rᵢ = αⁱ with α = 4, for i = 0..k, where k is the least
    with w_k ≥ N: near tokens are all seen, far ones ever more sparsely, and the last branch spans the sequence. Each
    branch has w₀ keys a segment, so a token that asks all branches has at most (k + 1)·w₀ scores a head, and w₀ is the
    largest power of two for which that is within the budget. A sequence no longer than the budget is thus attended
    whole. With the budget of 1024:

    | N | w / r | scores |
    | --- | --- | --- |
    | 1 to 1024 | 1024/1 | 1024 |
    | 1025 to 2048 | 512/1, 2048/4 | 1024 |
    | 2049 to 4096 | 256/1, 1024/4, 4096/16 | 768 |
    | 4097 to 16384 | 256/1, 1024/4, 4096/16, 16384/64 | 1024 |
    | 16385 to 32768 | 128/1, 512/4, 2048/16, 8192/64, 32768/256 | 640 |
    | 32769 to 131072 | 128/1, 512/4, …, 131072/1024 | 768 |

    It compares N and multiplies, nothing else: the same N gives the same branches everywhere, and `torch.compile`
    compiles once a row of the table.

    Args:
        length: N, in tokens.
        scores: The budget, at least 64; a power of two is used best.

    Returns:
        Segment lengths and dilation rates, as `dilated_attention` takes them.

    Raises:
        ArgumentError: The budget is below 64.
    """
    if scores < 64:
        raise ArgumentError(f"scores must be at least 64, got {scores}: long sequences have up to 17 branches")
    first = 1 << scores.bit_length() - 1
    while (count := _branches_to(length, first)) * first > scores:
        first //= 2
    rates = tuple(GROWTH**branch for branch in range(count))
    return tuple(first * rate for rate in rates), rates


def _branches_to(length: int, first: int) -> int:
    """k + 1: how many segments from `first` on until one holds the sequence."""
    count = 1
    while first < length:
        first *= GROWTH
        count += 1
    return count
