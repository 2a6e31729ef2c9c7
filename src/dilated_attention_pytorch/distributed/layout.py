"""Which rows of which rank meet: arithmetic on the places where a sequence is cut, and the indices that follow.

A *run* is some segments of one branch whose kept rows are brought together, whether they crossed ranks or not; its
*pieces* are dense attentions of equal size, one for each (segment, key/value head, head offset).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    rate = problem.branches[run.branch][1]
    width = shards.width(problem.branches[run.branch][0])
    kinds = _kinds(offsets, problem)
    if not kinds:
        return None
    starts = torch.arange(run.start, run.stop, width)
    # [U]: one (segment, key/value head, offset) each
    start = starts.repeat_interleave(len(kinds))
    stop = (start + width).clamp(max=run.stop)
    base = start + torch.tensor([offset for _, offset in kinds]).repeat(len(starts))
    kv_heads = torch.tensor([kv_head for kv_head, _ in kinds]).repeat(len(starts))
    query_heads = list(kinds.values()) * len(starts)

    def kept_before(step: Tensor | int) -> Tensor:
        """Kept rows of each unit before a step."""
        return (torch.as_tensor(step).minimum(stop) - base + rate - 1).div(rate, rounding_mode="floor").clamp(min=0)

    (own,) = (owner for owner in run.senders if owner.rank == shards.rank)
    low, high = kept_before(own.first), kept_before(own.last)
    seen = high if prefix else kept_before(run.stop)
    phantoms = problem.padding == "zeros" and not problem.causal
    count = torch.full_like(seen, cdiv(width, rate)) if phantoms else seen

    blocks, places = [0], torch.full((len(base), int(count.max())), -1)
    for owner in run.senders:
        unit, row = _ranges(kept_before(owner.first), kept_before(owner.last))
        places[unit, row] = torch.arange(blocks[-1], blocks[-1] + len(row))
        blocks.append(blocks[-1] + len(row))
        if owner == own:
            own_steps, own_heads = base[unit] + row * rate - shards.start, kv_heads[unit]
    places[places < 0] = blocks[-1]

    if problem.queries == "all":
        first_asked, asked = start.clamp(min=own.first), stop.clamp(max=own.last) - start.clamp(min=own.first)
        stride, low = 1, torch.zeros_like(low)
    else:
        first_asked, asked, stride = base + low * rate, high - low, rate
    sizes = torch.stack([count, low, asked, torch.tensor([len(heads) for heads in query_heads])], dim=1)
    pieces = []
    for size in torch.unique(sizes, dim=0):
        keys, first, queries, _ = size.tolist()
        units = (sizes == size).all(1).nonzero().flatten()
        if queries == 0 or keys == 0:
            continue
        steps = first_asked[units, None] + torch.arange(queries) * stride - shards.start
        key_steps = (base[units, None] + torch.arange(keys) * rate).clamp(max=max(shards.length - 1, 0))
        heads = torch.tensor([query_heads[unit] for unit in units.tolist()])
        places_seen = places[units, :keys]
        pieces.append(Piece(steps.to(device), heads.to(device), places_seen.to(device), key_steps.to(device), first))
    return Rows(tuple(blocks), own_steps.to(device), own_heads.to(device), tuple(pieces), phantoms)


def _kinds(offsets: Sequence[int], problem: Problem) -> dict[tuple[int, int], list[int]]:
    """Query heads by the (key/value head, offset) whose rows they read."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for head, offset in enumerate(offsets):
        if offset >= 0:
            kinds.setdefault((head * problem.kv_heads // problem.heads, offset), []).append(head)
    return dict(sorted(kinds.items()))


def _ranges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Every (unit, row) with low[unit] ≤ row < high[unit], by unit."""
    counts = high - low
    unit = torch.arange(len(low)).repeat_interleave(counts)
    within = torch.arange(len(unit)) - (counts.cumsum(0) - counts)[unit]
    return unit, low[unit] + within
