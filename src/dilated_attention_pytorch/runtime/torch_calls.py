"""Cut a problem into dense attention calls: which rows of which heads meet in one call of a torch kernel.

w tokens at dilation r are dense attention over ⌈w/r⌉ rows of stride r, so the rows that all heads of one offset keep
are a strided view of (B, N, heads, D); only a token order has to gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ..call_config import CallConfig
from ..config import GRID_CAP, Problem, cdiv


@dataclass(frozen=True)
class Budget:
    """How large a call should be.

    Attributes:
        pairs: (batch, segment, head) pairs below which the device would idle.
        elements: That an operand may hold, unless `pairs` asks for more.
        pack: Operands are copied, and hold the rows of as many offsets as there is room for.
    """

    pairs: int
    elements: int
    pack: bool

    @classmethod
    def of(cls, config: CallConfig, elements: int, device: str, *, alone: bool = False) -> Budget:
        """Of a configuration, for so many elements of q on a kind of device; `alone` in memory, before there is out."""
        pack = config.rows == "pack"
        pairs = config.pairs * torch.get_num_threads() if device == "cpu" else GRID_CAP
        return cls(pairs, elements // (config.share * (2 if pack and not alone else 1)), pack)


@dataclass(frozen=True)
class Rows:
    """Rows of heads with one offset, the same number L from each of several equally long segments; or of several runs
    of such heads, each as far from the one before.

    Attributes:
        batch: Batch elements.
        heads: Heads of the tensor that is read.
        start: First step of the first segment.
        segments: C, number of segments.
        length: Steps a segment.
        first: First row within a segment.
        step: Distance of two rows.
        repeat: How often a single head is presented (grouped key/value heads), else 1.
        tokens: (C, L) tokens to read instead of the strided rows, where there is a token order.
        runs: Runs of heads, of which `first` and `heads` are the first one's.
        spread: Rows and heads from one run to the next.
    """

    batch: slice
    heads: slice
    start: int
    segments: int
    length: int
    first: int
    step: int
    repeat: int = 1
    tokens: Tensor | None = None
    runs: int = 1
    spread: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        """L, rows a segment."""
        return len(range(self.first, self.length, self.step))

    @property
    def width(self) -> int:
        """Heads that `read` gives."""
        return self.runs * _length(self.heads) * self.repeat

    def read(self, x: Tensor) -> Tensor:
        """(B, N, heads, …) -> (B·C, heads, L, …): a view of one run wherever strides can say it, else packed."""
        if self.tokens is None:
            rows = self._view(x).flatten(2, 3).flatten(0, 1)
        else:
            rows = x[self.batch, :, self.heads].index_select(1, self.tokens.flatten())
            rows = rows.view(-1, self.count, *rows.shape[2:]).transpose(1, 2)
        return rows.expand(-1, self.repeat, *rows.shape[2:]) if self.repeat > 1 else rows

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Store what `read` would give."""
        if self.tokens is None:
            self._view(x).copy_(self._split(rows))
        else:
            x[self.batch, :, self.heads].index_copy_(1, self.tokens.flatten(), self._listed(rows).to(x.dtype))

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add to what `read` gives; repeats of one head are summed first."""
        if self.repeat > 1:
            rows = rows.sum(dim=1, keepdim=True)
        if self.tokens is None:
            self._view(x).add_(self._split(rows))
        else:
            x[self.batch, :, self.heads].index_add_(1, self.tokens.flatten(), self._listed(rows).to(x.dtype))

    def blend(self, x: Tensor, rows: Tensor, weight: Tensor) -> None:
        """x <- x + weight · (rows - x) in the precision of `rows`, rounded once."""
        if self.tokens is None and x.dtype == rows.dtype:
            self._view(x).lerp_(self._split(rows), self._split(weight))
        else:
            self.write(x, self.read(x).to(rows.dtype).lerp(rows, weight))

    def _view(self, x: Tensor) -> Tensor:
        """(B, N, heads, …) -> (B, C, runs, heads, L, …), nothing copied."""
        b, n, h, *rest = x.stride()
        size = (_length(self.batch), self.segments, self.runs, _length(self.heads), self.count)
        strides = (b, self.length * n, self.spread[0] * n + self.spread[1] * h, self.heads.step * h, self.step * n)
        offset = self.batch.start * b + (self.start + self.first) * n + self.heads.start * h
        return x.as_strided((*size, *x.shape[3:]), (*strides, *rest), x.storage_offset() + offset)

    def _split(self, rows: Tensor) -> Tensor:
        """(B·C, heads, L, …) as `_view` has it."""
        return rows.view(-1, self.segments, self.runs, rows.shape[1] // self.runs, *rows.shape[2:])

    def _listed(self, rows: Tensor) -> Tensor:
        """(B·C, heads, L, …) -> (B, C·L, heads, …)."""
        return rows.transpose(1, 2).reshape(-1, self.segments * self.count, rows.shape[1], *rows.shape[3:])


@dataclass(frozen=True)
class Bundle:
    """Rows of several runs of heads, as many of each, side by side as heads of one tensor."""

    parts: tuple[Rows, ...]

    @classmethod
    def of(cls, parts: Sequence[Rows]) -> Bundle:
        """Runs that are evenly spread are one part."""
        first, *others = parts
        if others and first.tokens is None and first.repeat == 1:
            rows, heads = others[0].first - first.first, others[0].heads.start - first.heads.start
            spread = [
                replace(first, first=first.first + place * rows, heads=_shifted(first.heads, place * heads))
                for place in range(len(parts))
            ]
            # Strides are never negative, and no row of a view may be there twice: of key heads that runs share,
            # gradients are added up.
            apart = rows > 0 or heads >= first.heads.stop - first.heads.start
            if heads >= 0 and apart and spread == list(parts):
                return cls((replace(first, runs=len(parts), spread=(rows, heads)),))
        return cls(tuple(parts))

    def read(self, x: Tensor) -> Tensor:
        """(B, N, heads, …) -> (B·C, heads, L, …): a view of a single run, else packed."""
        rows = [part.read(x) for part in self.parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Store what `read` would give."""
        for part, own in self._split(rows):
            part.write(x, own)

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add to what `read` gives."""
        for part, own in self._split(rows):
            part.add(x, own)

    def blend(self, x: Tensor, rows: Tensor, weight: Tensor) -> None:
        """x <- x + weight · (rows - x)."""
        for (part, own), (_, own_weight) in zip(self._split(rows), self._split(weight), strict=True):
            part.blend(x, own, own_weight)

    def _split(self, rows: Tensor) -> list[tuple[Rows, Tensor]]:
        return list(zip(self.parts, torch.split(rows, [part.width for part in self.parts], dim=1), strict=True))


@dataclass(frozen=True)
class Call:
    """One dense attention of (segment, head) pairs that keep equally many rows.

    Attributes:
        queries: Rows of q, out and lse.
        keys: Rows of k and v.
        causal: Query row i sees the key rows j ≤ i.
        by_token: Causal, but rows are not in token order: tokens must be compared.
        phantoms: Keys of score 0 and value 0 that every query sees.
        packed: A kernel gets copies of the rows.
        is_whole: All rows of all heads take part, as they lie: a kernel's results have the layout of q, k and v.
    """

    queries: Bundle
    keys: Bundle
    causal: bool
    by_token: bool
    phantoms: int
    packed: bool = False
    is_whole: bool = False

    @property
    def has_keys(self) -> bool:
        """Not all keys are phantoms."""
        return self.keys.parts[0].count > 0

    def operand(self, side: Bundle, x: Tensor) -> Tensor:
        """What a kernel gets of x by the rows of one side."""
        rows = side.read(x)
        return rows.contiguous() if self.packed else rows


def calls(
    problem: Problem, branch: int, offsets: Sequence[int], index: Tensor | None, budget: Budget
) -> Iterator[Call]:
    """The calls of one branch; no two of them share a (query, head).

    Args:
        problem: Sizes and options.
        branch: Which branch.
        offsets: s_h of every head, -1 where a head is absent.
        index: Tokens by step, or None.
        budget: How large a call should be.
    """
    length, rate = problem.segment(branch), problem.branches[branch][1]
    whole, tail = divmod(problem.length, length)
    runs = list(head_runs(offsets, problem.heads, problem.kv_heads))
    if is_whole(problem, branch, offsets, index):
        # Nothing is copied and the results are the outputs themselves: such a call needs no workspace.
        (run,) = runs
        everything = Rows(slice(0, problem.batch, 1), run.queries, 0, whole, length, 0, 1)
        side = Bundle((everything,))
        yield Call(side, side, problem.causal, False, 0, is_whole=True)
        return

    for start, segments, steps in ((0, whole, length), (whole * length, 1, tail)):
        if not segments or not steps:
            continue
        row_size = (steps if problem.queries == "all" else cdiv(steps, rate)) * problem.head_dim
        # Batch elements and segments are one dimension of a view where the segments fill the sequence.
        mergeable = segments == 1 or segments * steps == problem.length
        for bundle in _bundles(runs, rate, steps, segments, row_size, budget):
            heads = sum(run.heads for run in bundle)
            together = max(cdiv(budget.pairs, heads), budget.elements // (heads * row_size), 1)
            samples = max(together // segments, 1) if mergeable else 1
            for sample in range(0, problem.batch, samples):
                for first in range(0, segments, together):
                    piece = Rows(
                        batch=slice(sample, min(sample + samples, problem.batch), 1),
                        heads=slice(0, 0, 1),
                        start=start + first * steps,
                        segments=min(together, segments - first),
                        length=steps,
                        first=0,
                        step=rate,
                    )
                    yield from _calls_of(problem, piece, bundle, cdiv(length, rate), index, budget.pack)


def is_whole(problem: Problem, branch: int, offsets: Sequence[int], index: Tensor | None) -> bool:
    """One call holds all of a branch, and nothing is left out of q, k and v; arguments as of `calls`."""
    segment, rate = problem.segment(branch), problem.branches[branch][1]
    return (
        rate == 1
        and problem.length % segment == 0
        and index is None
        and problem.kv_heads == problem.heads
        and -1 not in offsets
    )


@dataclass(frozen=True)
class HeadRun:
    """Heads of one offset that are slices of both the query and the key/value heads.

    Attributes:
        offset: s_h.
        queries: Slice of the query heads.
        keys: Slice of the key/value heads.
        repeat: How often the single key/value head is presented; 1 where there are as many as query heads.
    """

    offset: int
    queries: slice
    keys: slice
    repeat: int

    @property
    def heads(self) -> int:
        """Query heads of the run."""
        return _length(self.queries)

    def cut(self, most: int) -> Iterator[HeadRun]:
        """The run in pieces of at most so many heads."""
        for first in range(0, self.heads, most):
            count = min(most, self.heads - first)
            keys, repeat = (self.keys, count) if self.repeat > 1 else (_part(self.keys, first, count), 1)
            yield HeadRun(self.offset, _part(self.queries, first, count), keys, repeat)


def head_runs(offsets: Sequence[int], heads: int, kv_heads: int) -> Iterator[HeadRun]:
    """Every present head in one run, by offset."""
    for offset in sorted(set(offsets) - {-1}):
        pairs = [(head, head * kv_heads // heads) for head in range(heads) if offsets[head] == offset]
        while pairs:
            (head, kv_head), count = pairs[0], 1
            step, kv_step = (pairs[1][0] - head, pairs[1][1] - kv_head) if len(pairs) > 1 else (1, 1)
            while count < len(pairs) and pairs[count] == (head + count * step, kv_head + count * kv_step):
                count += 1
            last, kv_last = pairs[count - 1]
            yield HeadRun(
                offset,
                slice(head, last + 1, step),
                slice(kv_head, kv_last + 1, max(kv_step, 1)),
                repeat=1 if kv_step else count,
            )
            del pairs[:count]


def _part(heads: slice, first: int, count: int) -> slice:
    start = heads.start + first * heads.step
    return slice(start, start + (count - 1) * heads.step + 1, heads.step)


def _shifted(heads: slice, by: int) -> slice:
    return slice(heads.start + by, heads.stop + by, heads.step)


def _length(part: slice) -> int:
    return len(range(part.start, part.stop, part.step))


def _bundles(
    runs: Sequence[HeadRun], rate: int, steps: int, segments: int, row_size: int, budget: Budget
) -> Iterator[list[HeadRun]]:
    """Runs that keep equally many rows of a segment: as many as the device needs, or as may be packed."""
    heads = max(budget.elements // row_size, cdiv(budget.pairs, segments), 1)
    pieces = (piece for run in runs for piece in run.cut(heads))
    for _, alike in groupby(pieces, key=lambda run: len(range(run.offset, steps, rate))):
        bundle: list[HeadRun] = []
        for run in alike:
            pairs = segments * sum(run.heads for run in bundle)
            full = not budget.pack or (pairs + segments * run.heads) * row_size > budget.elements
            if bundle and pairs >= budget.pairs and full:
                yield bundle
                bundle = []
            bundle.append(run)
        yield bundle


def _calls_of(
    problem: Problem, piece: Rows, bundle: list[HeadRun], padded: int, index: Tensor | None, packed: bool
) -> Iterator[Call]:
    """The calls of all queries that meet the kept rows of a piece: its segments, for the heads of a bundle."""
    packed = packed and index is None  # which gathers
    by_token = problem.causal and problem.queries == "all" and index is not None
    causal = problem.causal and not by_token
    stop = piece.start + piece.segments * piece.length
    tokens = None if index is None else index[piece.start : stop].view(piece.segments, piece.length)

    def kept_tokens(offset: int) -> Tensor | None:
        if tokens is None:
            return None
        # Attention does not depend on the order of its rows: sorted by token, causal is a triangle again.
        kept = tokens[:, offset :: piece.step]
        return kept.sort(dim=1).values if causal else kept

    keys = [
        replace(piece, heads=run.keys, first=run.offset, repeat=run.repeat, tokens=kept_tokens(run.offset))
        for run in bundle
    ]
    phantoms = padded - keys[0].count if problem.padding == "zeros" and not problem.causal else 0
    if problem.queries == "all" and causal:
        # The queries at distances j, j + r, … behind the first kept row see a triangle of the kept rows; those before
        # it see nothing.
        for run, key in zip(bundle, keys, strict=True):
            for distance in range(min(piece.step, piece.length - run.offset)):
                rows = replace(piece, heads=run.queries, first=run.offset + distance)
                yield Call(Bundle((rows,)), Bundle((key,)), causal, by_token, phantoms, packed)
        return

    if problem.queries == "all":
        asking = [replace(piece, heads=run.queries, step=1, tokens=tokens) for run in bundle]
    else:
        asking = [replace(key, heads=run.queries, repeat=1) for run, key in zip(bundle, keys, strict=True)]
    if asking[0].count and (keys[0].count or phantoms):
        yield Call(Bundle.of(asking), Bundle.of(keys), causal, by_token, phantoms, packed)
