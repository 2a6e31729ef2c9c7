"""The geometry behind token orders: walks through all cells of a box, and places of points on a curve.

The Hilbert walk generalises Hilbert's curve to boxes of any sides in one, two and three dimensions: a box is cut into
a few smaller boxes, each walked from one end of its first side to the other, until they are straight lines. The
idea of the cuts is J. Červený's 'gilbert' (https://github.com/jakubcerveny/gilbert). Which cut is taken here follows
a parity argument of our own, so that odd sides break no step either:

    A walk of steps to neighbours from one end of side w to the other end exists only if w is even or all sides are
    odd (colour the cells like a chessboard). Every cut of such a box below yields such boxes alone. Any other box
    yields exactly one part of its own kind; that chain ends in the one diagonal step of the curve.

All tensors live on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[int, int, int]

A, B, C = 1, 2, 3
"""The sides of a box, as directions: its walk leads along A. -A is the way back along A."""

COORDINATE_BITS = 21
"""Bits of a coordinate at most: three of them fill an int64."""
TURN_BITS = 4
"""A square's curve is turned in 4 ways, a cube's in 12."""


class Part(NamedTuple):
    """A box inside a box.

    Attributes:
        corner: The cell where its walk begins, in the outer box's coordinates.
        axes: Which direction of the outer box each of its own sides follows: A, B, C or one of them reversed.
        sides: Its cells along each of its own sides.
    """

    corner: Triple
    axes: Triple
    sides: Triple


class DigitTable(NamedTuple):
    """How the Hilbert curve of a square or cube of side 2^bits visits its cells, for each way it may be turned.

    Attributes:
        bits: Bits of each coordinate that one look-up reads.
        visits: int32 (turns · 2^(dims · bits),): the step that visits a cell and, in the last TURN_BITS, how the curve
            is turned within that cell, should the cell be a smaller square or cube. The index holds the turn and then
            the digit of each coordinate.
        leading: The turns that leading zeros lead through, a cycle that begins with the upright curve.
    """

    bits: int
    visits: Tensor
    leading: tuple[int, ...]

    def first_turn(self, zeros: int) -> int:
        """The turn at which to begin so that the curve is upright after so many leading zero bits."""
        return self.leading[-zeros % len(self.leading)]


def snake_walk(grid: tuple[int, ...], cells: int) -> Tensor:
    """Rows in turn, every second one backwards, and so with layers of rows.

    Args:
        grid: Sides of the grid, all positive: (columns,), (rows, columns) or (layers, rows, columns).
        cells: How many cells exist, in row-major order: the last row may be cut off.

    Returns:
        int64 (cells,): the row-major cell at each step.
    """
    walk = torch.arange(cells, device="cpu")
    for axis in range(1, len(grid)):
        walk = _reverse_odd_slices(walk, grid, axis, cells)
    return walk


def hilbert_walk(grid: tuple[int, ...], cells: int) -> Tensor:
    """The generalised Hilbert curve through a grid; arguments and result as in `snake_walk`.

    Every step leads to a neighbouring cell, but for at most one diagonal step where no walk without it exists. On a
    cut-off grid it is the full grid's curve with the missing cells left out.
    """
    depth, rows, columns = (1,) * (3 - len(grid)) + grid
    axes = sorted([(columns, 1), (rows, columns), (depth, rows * columns)], key=lambda axis: -axis[0])
    # The walk leads along the longest side, or along an even one that is not much shorter: no diagonal step then.
    longest = axes[0][0]
    axes.sort(key=lambda axis: axis[0] % 2 == 1 or 3 * axis[0] < 2 * longest)
    (w, stride_a), (h, stride_b), (d, stride_c) = axes
    along_a, along_b, along_c = _walk((w, h, d), {}).to(torch.int64).unbind()
    walk = (along_a * stride_a).add_(along_b, alpha=stride_b).add_(along_c, alpha=stride_c)
    return walk[walk < cells] if cells < math.prod(grid) else walk


def snake_places(coordinates: Tensor) -> Tensor:
    """Where points lie on the snake of their bounding box; arguments and result as in `hilbert_places`."""
    grid = tuple((coordinates.amax(1) + 1).tolist())
    places = coordinates[0]
    for axis in range(1, len(grid)):
        places = places * grid[axis] + coordinates[axis]
    # A reversal undoes itself, so going from cells to steps takes those of `snake_walk` in the opposite sequence.
    for axis in reversed(range(1, len(grid))):
        places = _reverse_odd_slices(places, grid, axis, math.prod(grid))
    return places


def hilbert_places(coordinates: Tensor) -> Tensor:
    """Where points lie on the Hilbert curve of the smallest square or cube of side 2^bits that holds them.

    Args:
        coordinates: int64 (2 or 3, points), from 0 to below 2^21, at least one point; axes as in a grid.

    Returns:
        int64 (points,): the step of that curve, the one of `hilbert_walk`, at which it visits each point.
    """
    dims = len(coordinates)
    table = _digit_table(dims)
    bits = int(coordinates.max()).bit_length()
    digits = -(-bits // table.bits)
    places = torch.zeros_like(coordinates[0])
    coordinates = coordinates.to(torch.int32)  # half the memory to go through
    turn = torch.full_like(coordinates[0], table.first_turn(digits * table.bits - bits))
    for shift in range((digits - 1) * table.bits, -1, -table.bits):
        entry = turn
        for along in coordinates:
            entry = (entry << table.bits).bitwise_or_((along >> shift).bitwise_and_(2**table.bits - 1))
        visits = table.visits.index_select(0, entry)
        places = places.bitwise_left_shift_(dims * table.bits).bitwise_or_(visits >> TURN_BITS)
        turn = visits.bitwise_and_(2**TURN_BITS - 1)
    return places


def _reverse_odd_slices(numbers: Tensor, grid: tuple[int, ...], axis: int, cells: int) -> Tensor:
    """Mirrors row-major cell numbers within their row (`axis` the last one), or within their layer (one before).

    Only every second row of a layer and every second layer are mirrored; the last may be cut off at `cells`.
    """
    size = math.prod(grid[axis:])
    slices = numbers // size
    first = slices * size
    last = (first + (size - 1)).clamp_(max=cells - 1)
    return torch.where(slices % grid[axis - 1] % 2 == 1, first + last - numbers, numbers)


def _walk(sides: Triple, known: dict[Triple, Tensor]) -> Tensor:
    """int32 (3, cells): the coordinates along each side, step by step. `known` holds each shape's walk once made.

    The parts of a box have few distinct shapes, however many they are, so walks are copied far more often than made.
    """
    walk = known.get(sides)
    if walk is None:
        length = math.prod(sides)
        walk = torch.zeros(3, length, dtype=torch.int32, device="cpu")
        if max(sides) == length:
            walk[sides.index(length)] = torch.arange(length, device="cpu")
        else:
            start = 0
            for part in _cut(*sides):
                steps = _walk(part.sides, known)
                span = walk[:, start : start + steps.shape[1]]
                for own, axis in zip(steps, part.axes, strict=True):
                    torch.mul(own, 1 if axis > 0 else -1, out=span[abs(axis) - 1]).add_(part.corner[abs(axis) - 1])
                start += steps.shape[1]
        known[sides] = walk
    return walk


def _cut(w: int, h: int, d: int) -> list[Part]:
    """The parts of a box that is no straight line, in the sequence of its walk along w. See the module's docstring."""
    a, b, c = _even_half(w), _even_half(h), _even_half(d)
    all_odd = w % 2 == h % 2 == d % 2 == 1
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: there, and on
        return [Part((0, 0, 0), (A, B, C), (a, h, d)), Part((a, 0, 0), (A, B, C), (w - a, h, d))]
    if 3 * h > 4 * d or (all_odd and h >= d):  # tall: up, along, down
        return [
            Part((0, 0, 0), (B, C, A), (b, d, a)),
            Part((0, b, 0), (A, B, C), (w, h - b, d)),
            Part((w - 1, b - 1, 0), (-B, C, -A), (b, d, w - a)),
        ]
    if 3 * d > 4 * h or all_odd:  # deep: in, along, out
        return [
            Part((0, 0, 0), (C, A, B), (c, a, h)),
            Part((0, 0, c), (A, B, C), (w, h, d - c)),
            Part((w - 1, 0, c - 1), (-C, -A, B), (c, w - a, h)),
        ]
    if h % 2 == 0 and d % 2 == 1:  # the two parts that lead along d need it even: see the box from its other side
        swapped = {A: A, B: C, C: B, -A: -A, -B: -C, -C: -B}
        return [
            Part((x, z, y), (swapped[i], swapped[j], swapped[k]), sides)
            for (x, y, z), (i, j, k), sides in _cut_cube(w, d, h)
        ]
    return _cut_cube(w, h, d)


def _cut_cube(w: int, h: int, d: int) -> list[Part]:
    """Up, in, along, out, down: the cut of a box whose sides differ little and of which d, or w but not h, is even."""
    a, b, c = _even_half(w), _even_half(h), _even_half(d)
    if d % 2 == 1:  # parts along an odd d must be odd throughout
        a = w // 2 | 1
    return [
        Part((0, 0, 0), (B, C, A), (b, c, a)),
        Part((0, b, 0), (C, A, B), (d, a, h - b)),
        Part((0, b - 1, d - 1), (A, -B, -C), (w, b, d - c)),
        Part((w - 1, b, d - 1), (-C, -A, B), (d, w - a, h - b)),
        Part((w - 1, b - 1, 0), (-B, C, -A), (b, c, w - a)),
    ]


def _even_half(n: int) -> int:
    """About half of n, even where n > 2."""
    half = n // 2
    return half + 1 if half % 2 == 1 and n > 2 else half


@functools.lru_cache(maxsize=2)
def _digit_table(dims: int) -> DigitTable:
    """The table of the square's (dims = 2) or the cube's (3) curve, read off the cuts of a box of side 4."""
    bits = 6 if dims == 2 else 4  # tables of a few 100 kB, which stay in cache
    turns: list[tuple[Triple, Triple]] = [((A, B, C), (2, 2, 2 if dims == 3 else 1))]
    place: list[list[int]] = []
    turn: list[list[int]] = []
    for axes, sides in turns:  # grows while it is read
        place.append([0] * 2**dims)
        turn.append([0] * 2**dims)
        for step, part in enumerate(_parts_of_volume(_doubled(axes, sides), volume=2**dims)):
            if (part.axes, part.sides) not in turns:
                turns.append((part.axes, part.sides))
            cell = sum(along // 2 << axis for axis, along in enumerate(part.corner))  # A is the last coordinate
            place[-1][cell] = step
            turn[-1][cell] = turns.index((part.axes, part.sides))

    leading = [0]
    while turn[leading[-1]][0] != 0:
        leading.append(turn[leading[-1]][0])

    shape = (len(turns),) + (2,) * dims
    one_place = torch.tensor(place, device="cpu").view(shape)
    one_turn = torch.tensor(turn, device="cpu").view(shape)
    places, next_turns = one_place, one_turn
    for known in range(1, bits):  # one more leading bit: (turns, 2, …, K, …) to (turns, 2K, …)
        places = (one_place << dims * known).view(shape + (1,) * dims) + places[one_turn]
        next_turns = next_turns[one_turn]
        interleaved = [0] + [axis for lead in range(1, dims + 1) for axis in (lead, lead + dims)]
        size = (len(turns),) + (2 << known,) * dims
        places, next_turns = (table.permute(interleaved).reshape(size) for table in (places, next_turns))
    visits = (places << TURN_BITS | next_turns).flatten().to(torch.int32)
    return DigitTable(bits, visits, tuple(leading))


def _doubled(axes: Triple, sides: Triple) -> Part:
    """The box of sides 4 where `sides` has 2 (a flat side stays), its lowest corner at 0, turned as `axes` say."""
    a, b, c = (4 if side == 2 else 1 for side in sides)
    corner = _outside(Part((0, 0, 0), axes, (a, b, c)), (a - 1, b - 1, c - 1))
    x, y, z = (max(-along, 0) for along in corner)
    return Part((x, y, z), axes, (a, b, c))


def _parts_of_volume(box: Part, volume: int) -> Iterator[Part]:
    """The box cut down to parts of that many cells, in the sequence of its walk, seen from outside the box."""
    if math.prod(box.sides) == volume:
        yield box
        return
    for part in _cut(*box.sides):
        i, j, k = (box.axes[abs(axis) - 1] * (1 if axis > 0 else -1) for axis in part.axes)
        yield from _parts_of_volume(Part(_outside(box, part.corner), (i, j, k), part.sides), volume)


def _outside(box: Part, cell: Triple) -> Triple:
    """A cell of a box, in the coordinates of the box around it."""
    outside = list(box.corner)
    for axis, along in zip(box.axes, cell, strict=True):
        outside[abs(axis) - 1] += along if axis > 0 else -along
    x, y, z = outside
    return x, y, z
