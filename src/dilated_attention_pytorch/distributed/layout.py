"""Which rows of which rank meet: arithmetic on the places where a sequence is cut, and the indices that follow.

A *run* is some segments of one branch whose kept rows are brought together, whether they crossed ranks or not; its
*pieces* are dense attentions of equal size, one for each (segment, key/value head, head offset).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..config import Problem, cdiv


@dataclass(frozen=True)
class Shards:
    """How the steps of a sequence are dealt to the ranks of a group.

    Attributes:
        cuts: 0, then the step at which each rank's steps end; the last is N.
        rank: Who asks.
    """

    cuts: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, lengths: Iterable[int], rank: int) -> Shards:
        """From the number of steps of each rank."""
        cuts = [0]
        for length in lengths:
            cuts.append(cuts[-1] + length)
        return cls(tuple(cuts), rank)

    @property
    def length(self) -> int:
        """N, steps of the whole sequence."""
        return self.cuts[-1]

    @property
    def start(self) -> int:
        """First step of this rank."""
        return self.cuts[self.rank]

    @property
    def stop(self) -> int:
        """Step behind the last one of this rank."""
        return self.cuts[self.rank + 1]

    def width(self, segment_length: int) -> int:
        """w as it acts: min(w, N), at least 1."""
        return max(min(segment_length, self.length), 1)

    def inside(self, width: int) -> tuple[int, int]:
        """Steps of the segments that this rank holds whole, the short last one among them."""
        first = cdiv(self.start, width) * width
        last = self.length if self.stop == self.length else self.stop // width * width
        return first, max(first, last)

    def crossing(self, width: int) -> list[int]:
        """First steps of the segments that this rank holds in part: at most two."""
        if self.start == self.stop:
            return []
        touched = {self.start // width * width, (self.stop - 1) // width * width}
        return sorted(s for s in touched if s < self.start or min(s + width, self.length) > self.stop)

    def crosses(self, width: int) -> bool:
        """Some rank holds a segment in part."""
        return any(cut % width for cut in self.cuts[1:-1] if cut < self.length)

    def owners(self, start: int, stop: int) -> list[Owner]:
        """Ranks that hold steps of [start, stop), in their sequence."""
        held = (Owner(rank, max(a, start), min(b, stop)) for rank, (a, b) in enumerate(pairwise(self.cuts)))
        return [owner for owner in held if owner.first < owner.last]


@dataclass(frozen=True)
class Owner:
    """A rank and the steps [first, last) that it holds of a segment."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class Run:
    """Segments of one branch as this rank lays them out; see the module's docstring.

    Attributes:
        branch: Index into the problem's branches.
        start, stop: The steps of the segments.
        senders: Whose kept rows come together, this rank among them, in their sequence: their rows lie in blocks.
        receivers: Other ranks that need this rank's rows.
    """

    branch: int
    start: int
    stop: int
    senders: tuple[Owner, ...]
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Dense attentions of one size. U counts them; each has m query heads and one key/value head.

    Attributes:
        steps: (U, Lq) where the queries lie among this rank's steps.
        heads: (U, m) their heads.
        keys: (U, L) where the keys lie among the rows of the run.
        key_steps: (U, L) the keys' steps in the sequence; of phantom keys, any.
        first: Row of the first query among the keys, where the queries are kept steps.
    """

    steps: Tensor
    heads: Tensor
    keys: Tensor
    key_steps: Tensor
    first: int


@dataclass(frozen=True)
class Rows:
    """The index tensors of a run.

    Attributes:
        blocks: Where each sender's rows begin, and the number of all.
        steps: (R,) where this rank's kept rows lie among its steps.
        heads: (R,) their key/value heads.
        pieces: What is computed from the rows of all senders.
        phantoms: A zero row follows the others; the pieces read it where padding counts as keys.
    """

    blocks: tuple[int, ...]
    steps: Tensor
    heads: Tensor
    pieces: tuple[Piece, ...]
    phantoms: bool


def spans(problem: Problem, shards: Shards, *, in_place: bool) -> dict[tuple[int, int], list[int]]:
    """Branches by the steps [first, last) whose segments this rank holds whole and attends to where they lie.

    Args:
        problem: The call; its length is this rank's.
        shards: Of the whole sequence.
        in_place: False lays all segments out as runs.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for branch, (segment_length, _) in enumerate(problem.branches):
        first, last = shards.inside(shards.width(segment_length))
        if in_place and first < last and not _stands_alone(problem, shards, branch):
            found.setdefault((first, last), []).append(branch)
    return found


def runs(problem: Problem, shards: Shards, *, in_place: bool, prefix: bool) -> list[Run]:
    """What `spans` leaves: the segments that cross ranks, and others that no kernel takes where they lie.

    Args:
        problem: The call; its length is this rank's.
        shards: Of the whole sequence.
        in_place: As for `spans`.
        prefix: A query sees no later step, so that no row travels to an earlier rank.
    """
    found = []
    for branch, (segment_length, _) in enumerate(problem.branches):
        width = shards.width(segment_length)
        for start in shards.crossing(width):
            stop = min(start + width, shards.length)
            owners = shards.owners(start, stop)
            senders = tuple(owner for owner in owners if not prefix or owner.rank <= shards.rank)
            receivers = (o.rank for o in owners if (o.rank > shards.rank if prefix else o.rank != shards.rank))
            found.append(Run(branch, start, stop, senders, tuple(receivers)))
        first, last = shards.inside(width)
        if first < last and (not in_place or _stands_alone(problem, shards, branch)):
            found.append(Run(branch, first, last, (Owner(shards.rank, first, last),), ()))
    return found


def _stands_alone(problem: Problem, shards: Shards, branch: int) -> bool:
    """Only the short last segment is held whole: by itself it would not know how many phantom keys it has."""
    width = shards.width(problem.branches[branch][0])
    first, last = shards.inside(width)
    return problem.padding == "zeros" and not problem.causal and last - first < width


@lru_cache(maxsize=64)
def rows(
    run: Run,
    shards: Shards,
    problem: Problem,
    offsets: tuple[int, ...],
    *,
    prefix: bool,
    device: torch.device,
) -> Rows | None:
    """The index tensors of a run; None where no head keeps a row.

    Args:
        run: One of `runs`.
        shards: Of the whole sequence.
        problem: The call.
        offsets: First kept step of each query head in this branch, -1 for one that takes no part.
        prefix: As for `runs`.
        device: Of the tensors.
    """
    units = _Units.of(run, shards, problem, offsets)
    if units is None:
        return None
    (own,) = (owner for owner in run.senders if owner.rank == shards.rank)
    phantoms = problem.padding == "zeros" and not problem.causal
    count = units.kept_before(own.last if prefix else run.stop)
    if phantoms:
        count = torch.full_like(count, cdiv(shards.width(problem.branches[run.branch][0]), units.rate))

    blocks, places = [0], torch.full((len(count), int(count.max())), -1)
    for owner in run.senders:
        unit, row = units.rows_in(owner)
        places[unit, row] = torch.arange(blocks[-1], blocks[-1] + len(row))
        blocks.append(blocks[-1] + len(row))
    places[places < 0] = blocks[-1]

    unit, row = units.rows_in(own)
    steps = units.base[unit] + row * units.rate - shards.start
    pieces = _pieces(units, own, count, places, shards, asks_all=problem.queries == "all", device=device)
    return Rows(tuple(blocks), steps.to(device), units.kv_heads[unit].to(device), tuple(pieces), phantoms)


@dataclass(frozen=True)
class _Units:
    """The (segment, key/value head, offset) triples of a run, [U] each.

    Attributes:
        start, stop: Steps of the segment.
        base: Its first kept step.
        kv_heads: Key/value heads.
        heads: The query heads that read them at this offset.
        rate: r.
    """

    start: Tensor
    stop: Tensor
    base: Tensor
    kv_heads: Tensor
    heads: list[list[int]]
    rate: int

    @classmethod
    def of(cls, run: Run, shards: Shards, problem: Problem, offsets: Sequence[int]) -> _Units | None:
        """None where no head takes part."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for head, offset in enumerate(offsets):
            if offset >= 0:
                kinds.setdefault((head * problem.kv_heads // problem.heads, offset), []).append(head)
        if not kinds:
            return None
        kinds = dict(sorted(kinds.items()))
        segment_length, rate = problem.branches[run.branch]
        width = shards.width(segment_length)
        starts = torch.arange(run.start, run.stop, width)
        start = starts.repeat_interleave(len(kinds))
        kv_heads, first = torch.tensor(list(kinds)).repeat(len(starts), 1).unbind(1)
        heads = list(kinds.values()) * len(starts)
        return cls(start, (start + width).clamp(max=run.stop), start + first, kv_heads, heads, rate)

    def kept_before(self, step: int) -> Tensor:
        """Kept rows before a step of the sequence."""
        ends = self.stop.clamp(max=step)
        return (ends - self.base + self.rate - 1).div(self.rate, rounding_mode="floor").clamp(min=0)

    def rows_in(self, owner: Owner) -> tuple[Tensor, Tensor]:
        """Unit and row of every kept row of a rank, by unit."""
        low = self.kept_before(owner.first)
        counts = self.kept_before(owner.last) - low
        unit = torch.arange(len(low)).repeat_interleave(counts)
        return unit, low[unit] + torch.arange(len(unit)) - (counts.cumsum(0) - counts)[unit]


def _pieces(
    units: _Units,
    own: Owner,
    count: Tensor,
    places: Tensor,
    shards: Shards,
    *,
    asks_all: bool,
    device: torch.device,
) -> Iterator[Piece]:
    """Units of equal size together: `count` keys each, at `places` of the run's rows, asked by this rank's steps."""
    if asks_all:
        first_asked = units.start.clamp(min=own.first)
        low, asked, stride = torch.zeros_like(count), units.stop.clamp(max=own.last) - first_asked, 1
    else:
        low = units.kept_before(own.first)
        first_asked, asked, stride = units.base + low * units.rate, units.kept_before(own.last) - low, units.rate
    sizes = torch.stack([count, low, asked, torch.tensor([len(heads) for heads in units.heads])], dim=1)
    for size in torch.unique(sizes, dim=0):
        keys, first, queries, _ = size.tolist()
        if keys == 0 or queries == 0:
            continue
        alike = (sizes == size).all(1).nonzero().flatten()
        steps = first_asked[alike, None] + torch.arange(queries) * stride - shards.start
        key_steps = (units.base[alike, None] + torch.arange(keys) * units.rate).clamp(max=shards.length - 1)
        heads = torch.tensor([units.heads[unit] for unit in alike.tolist()])
        keys_at = places[alike, :keys]
        yield Piece(steps.to(device), heads.to(device), keys_at.to(device), key_steps.to(device), first)
