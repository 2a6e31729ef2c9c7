"""Cut a problem into dense attention calls: which rows of which tensors meet in one call of a torch kernel.

w tokens at dilation r are dense attention over ⌈w/r⌉ rows of stride r, so the rows of all heads with the same offset
are a strided view of (B, N, heads, D): nothing is gathered unless a token order asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..config import Problem, cdiv

WORKSPACE = 1 << 19
"""Elements of one operand that a call may always hold; more only where the device would run out of parallel work."""


@dataclass(frozen=True)
class Rows:
    """Rows of some heads, the same number L from each of several equally long segments.

    Attributes:
        batch: Batch elements.
        heads: Heads of the tensor that is read.
        start: First step of the first segment.
        segments: C, number of segments.
        length: Steps a segment.
        first: First row within a segment.
        step: Distance of two rows.
        repeat: How often a single head is presented (grouped key/value heads), else 1.
        tokens: (C, L) tokens to read instead of the strided rows, where the order is not the tokens' own.
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

    @property
    def count(self) -> int:
        """L, rows a segment."""
        return len(range(self.first, self.length, self.step))

    def read(self, x: Tensor) -> Tensor:
        """(B, N, heads, …) -> (B·C, L, heads, …): a view wherever strides can say it, else a copy."""
        if self.tokens is None:
            rows = self._view(x).flatten(0, 1)
        else:
            rows = x[self.batch, :, self.heads].index_select(1, self.tokens.flatten())
            rows = rows.view(-1, self.count, *rows.shape[2:])
        return rows.expand(-1, -1, self.repeat, *rows.shape[3:]) if self.repeat > 1 else rows

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Store what `read` would give."""
        if self.tokens is None:
            self._view(x).copy_(self._by_segment(rows))
        else:
            x[self.batch, :, self.heads].index_copy_(1, self.tokens.flatten(), self._flat(rows).to(x.dtype))

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add to what `read` gives; repeats of one head are summed first."""
        if self.repeat > 1:
            rows = rows.sum(dim=2, keepdim=True)
        if self.tokens is None:
            self._view(x).add_(self._by_segment(rows))
        else:
            x[self.batch, :, self.heads].index_add_(1, self.tokens.flatten(), self._flat(rows).to(x.dtype))

    def blend(self, x: Tensor, rows: Tensor, weight: Tensor) -> None:
        """x <- x + weight · (rows - x) in the precision of `rows`, rounded once."""
        present = self.read(x)
        if self.tokens is None and x.dtype == rows.dtype:
            present.lerp_(rows, weight)
        else:
            self.write(x, present.to(rows.dtype).lerp(rows, weight))

    def read_per_token(self, x: Tensor) -> Tensor:
        """(B, N) -> (B·C, L), what does not depend on the head."""
        return replace(self, heads=slice(None), repeat=1).read(x.unsqueeze(2)).squeeze(2)

    def _view(self, x: Tensor) -> Tensor:
        segments = x[self.batch, self.start : self.start + self.segments * self.length, self.heads]
        segments = segments.view(segments.shape[0], self.segments, self.length, *segments.shape[2:])
        return segments[:, :, self.first :: self.step]

    def _by_segment(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.segments, *rows.shape[1:])

    def _flat(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.segments * self.count, *rows.shape[2:])


@dataclass(frozen=True)
class Call:
    """One dense attention: (segment, head) pairs that share an offset.

    Attributes:
        queries: Rows of q, out and lse.
        keys: Rows of k and v.
        causal: Query row i sees the key rows j ≤ i.
        by_token: Causal, but rows are not in token order: tokens must be compared.
        phantoms: Keys of score 0 and value 0 that every query sees.
    """

    queries: Rows
    keys: Rows
    causal: bool
    by_token: bool
    phantoms: int


def calls(problem: Problem, branch: int, offsets: Sequence[int], index: Tensor | None, pairs: int) -> Iterator[Call]:
    """The calls of one branch; no two of them share a (query, head).

    Args:
        problem: Sizes and options.
        branch: Which branch.
        offsets: s_h of every head, -1 where a head is absent.
        index: Tokens by step, or None.
        pairs: (batch, segment, head) pairs below which the device would idle.
    """
    width, rate = problem.segment(branch), problem.branches[branch][1]
    whole, tail = divmod(problem.length, width)
    for start, segments, length in ((0, whole, width), (whole * width, 1, tail)):
        if not segments or not length:
            continue
        for offset, q_heads, kv_heads, repeat in head_runs(offsets, problem.heads, problem.kv_heads):
            heads = len(range(*q_heads.indices(problem.heads)))
            size = heads * cdiv(length, rate) * problem.head_dim
            together = max(cdiv(pairs, heads), WORKSPACE // size, 1)
            mergeable = segments == 1 or segments * width == problem.length
            samples = max(together // segments, 1) if mergeable else 1
            for sample in range(0, problem.batch, samples):
                for first in range(0, segments, together):
                    queries = Rows(
                        slice(sample, sample + samples),
                        q_heads,
                        start + first * length,
                        min(together, segments - first),
                        length,
                        offset,
                        rate,
                    )
                    yield from _calls_of(problem, queries, kv_heads, repeat, cdiv(width, rate), index)


def _calls_of(
    problem: Problem, kept: Rows, kv_heads: slice, repeat: int, padded: int, index: Tensor | None
) -> Iterator[Call]:
    """The calls of the queries that meet the kept rows of some segments."""
    everything = problem.queries == "all"
    causal, by_token = problem.causal, False
    tokens = all_tokens = None
    if index is not None:
        stop = kept.start + kept.segments * kept.length
        all_tokens = index[kept.start : stop].view(kept.segments, kept.length)
        tokens = all_tokens[:, kept.first :: kept.step]
        by_token = causal and everything
        causal = causal and not everything
        if causal:
            # Attention does not depend on the order of its keys: sorted by token, causal is a triangle again.
            tokens = tokens.sort(dim=1).values
    keys = replace(kept, heads=kv_heads, repeat=repeat, tokens=tokens)
    phantoms = padded - keys.count if problem.padding == "zeros" and not problem.causal else 0

    if not everything:
        asking = [replace(kept, tokens=tokens)]
    elif causal:
        # Queries of one residue class modulo r see a triangle of the kept rows; those before the first kept row see
        # one row less, which is the triangle of the same class without its first query.
        firsts = (residue if residue >= kept.first else residue + kept.step for residue in range(kept.step))
        asking = [replace(kept, first=first) for first in firsts if first < kept.length]
    else:
        asking = [replace(kept, first=0, step=1, tokens=all_tokens)]
    for queries in asking:
        if queries.count and (keys.count or phantoms):
            yield Call(queries, keys, causal, by_token, phantoms)


def head_runs(offsets: Sequence[int], heads: int, kv_heads: int) -> Iterator[tuple[int, slice, slice, int]]:
    """Runs of heads of one offset that are slices of both the query and the key/value heads.

    Yields:
        offset, slice of the query heads, slice of the key/value heads, and how often the latter's single head repeats.
    """
    for offset in sorted(set(offsets) - {-1}):
        pairs = [(head, head * kv_heads // heads) for head in range(heads) if offsets[head] == offset]
        while pairs:
            strides = (pairs[1][0] - pairs[0][0], pairs[1][1] - pairs[0][1]) if len(pairs) > 1 else (1, 1)
            count = 1
            while count < len(pairs) and pairs[count] == (
                pairs[0][0] + count * strides[0],
                pairs[0][1] + count * strides[1],
            ):
                count += 1
            q_heads = slice(pairs[0][0], pairs[count - 1][0] + 1, strides[0])
            kv = slice(pairs[0][1], pairs[count - 1][1] + 1, max(strides[1], 1))
            yield offset, q_heads, kv, count if strides[1] == 0 else 1
            del pairs[:count]
