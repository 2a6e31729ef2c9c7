"""`ShardedAttention`: one rank's share of a differentiable call. Rows travel while whole segments are computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UnsupportedError
from ..runtime.arguments import unit_stride
from ..runtime.function import no_autocast
from . import exchange
from .layout import Rows, Run, Shards, rows, runs, spans
from .parts import Gathered, Share, Span


class ShardedAttention(torch.autograd.Function):
    """Dilated attention of this rank's steps: `apply(q, k, v, share, shards, group)`.

    Besides q, k, v, out and lse it keeps the rows that were gathered. With the merged lse each part is an ordinary
    flash-attention backward, so the gradients of gathered rows are all that travels back.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: Share, shards: Shards, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """out (B, n, H, D) and lse (B, H, n) of this rank's steps."""
        q, k, v = unit_stride(q, k, v)
        laid = _laid(share, shards, q.device)
        with no_autocast(q.device):
            gathered, pending = exchange.gather(k, v, share.mask, laid, shards, group)
            mixed = _Mixed(q)
            for span in _spans(share, shards, q.device):
                mixed.add(span, *span.forward(q, k, v))
            pending.wait()
            for (run, indices), (flat, seen) in zip(laid, gathered, strict=True):
                for part in _pieces(share, run, indices):
                    mixed.add(part, *part.forward(q, flat, seen))
            out, lse = mixed.results()
        ctx.share, ctx.shards, ctx.group = share, shards, group
        flats = [x for pair in gathered for x in pair]
        ctx.save_for_backward(q, k, v, out, lse, *flats)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        share, shards = ctx.share, ctx.shards
        if dlse is not None and share.problem.mix_grad == "detached":
            raise UnsupportedError('mix_grad="detached" has no gradient of lse; detach lse, or use mix_grad="exact"')
        q, k, v, out, lse, *flats = ctx.saved_tensors
        dout = out.new_zeros(()).expand(out.shape) if dout is None else dout
        whole = out, lse.transpose(1, 2), dout, None if dlse is None else dlse.transpose(1, 2)
        sums = _Sums(q, k, v)
        laid = _laid(share, shards, q.device)
        gradients = []
        with no_autocast(q.device):
            for (run, indices), flat, seen in zip(laid, flats[::2], flats[1::2], strict=True):
                dflat = flat.new_zeros(flat.shape)
                for part in _pieces(share, run, indices):
                    sums.add_gathered(part, part.backward(q, flat, seen, *whole, dflat))
                gradients.append(dflat)
            returned, pending = exchange.scatter(gradients, laid, shards, ctx.group)
            for span in _spans(share, shards, q.device):
                sums.add(span, *span.backward(q, k, v, *whole))
            pending.wait()
        dq, dk, dv = sums.results()
        for (_, indices), parts in zip(laid, returned, strict=True):
            exchange.add_rows(dk, dv, parts, indices)
        return dq, dk, dv, None, None, None


def plan_parts(share: Share, shards: Shards, device: torch.device) -> None:
    """Plan what this rank would compute.

    Raises:
        DilatedAttentionError: A plan refuses.
    """
    for _ in _spans(share, shards, device):
        pass
    for run, indices in _laid(share, shards, device):
        for _ in _pieces(share, run, indices):
            pass


def _laid(share: Share, shards: Shards, device: torch.device) -> list[tuple[Run, Rows]]:
    """The runs of this rank with their index tensors."""
    found = []
    for run in runs(share.problem, shards, in_place=share.in_place, prefix=share.prefix):
        offsets = share.offsets.rows[run.branch]
        with torch.device("cpu"):  # whatever the caller's default is
            indices = rows(run, shards, share.problem, offsets, prefix=share.prefix, device=device)
        if indices is not None:
            found.append((run, indices))
    return found


def _spans(share: Share, shards: Shards, device: torch.device) -> Iterable[Span]:
    """The longest first: it may be all of the rank's steps."""
    found = spans(share.problem, shards, in_place=share.in_place).items()
    for (first, last), branches in sorted(found, key=lambda span: span[0][0] - span[0][1]):
        yield Span(share, branches, first - shards.start, last - shards.start, device)


def _pieces(share: Share, run: Run, indices: Rows) -> Iterable[Gathered]:
    return (Gathered(share, run.branch, piece) for piece in indices.pieces)


class _Mixed:
    """out and lse of the parts so far, as one softmax."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._found: tuple[Tensor, Tensor] | None = None

    def results(self) -> tuple[Tensor, Tensor]:
        """out (B, n, H, D) and lse (B, H, n); 0 and -inf where no part had a key."""
        out, lse = self._start() if self._found is None else self._found
        return out, lse.transpose(1, 2).contiguous()

    def add(self, part: Span | Gathered, rows: Tensor, row_lse: Tensor) -> None:
        """Mix a part in, in place and in the precision of lse. A first part of all queries is the result so far."""
        if self._found is None and part.is_whole:
            self._found = rows, row_lse
            return
        self._found = out, lse = self._start() if self._found is None else self._found
        before = part.read(lse)
        # exp(lse_b - logaddexp(lse, lse_b)); where both are -inf nothing changes.
        weight = torch.sigmoid(row_lse - before).nan_to_num_(0.0).unsqueeze(3)
        part.write(out, part.read(out).to(lse.dtype).lerp(rows.to(lse.dtype), weight).to(out.dtype))
        part.write(lse, torch.logaddexp(before, row_lse))

    def _start(self) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if self._q.dtype == torch.float64 else torch.float32
        lse = torch.full(self._q.shape[:3], -torch.inf, dtype=dtype, device=self._q.device)
        return self._q.new_zeros(self._q.shape), lse


class _Sums:
    """Gradients of q, k and v of the parts so far; those of gathered rows wait for the first of another kind."""

    def __init__(self, *inputs: Tensor) -> None:
        self._inputs = inputs
        self._found: tuple[Tensor, ...] = ()
        self._waiting: list[tuple[Gathered, Tensor]] = []

    def results(self) -> tuple[Tensor, ...]:
        """dq, dk and dv."""
        if not self._found:
            self._start(tuple(x.new_zeros(x.shape) for x in self._inputs))
        return self._found

    def add_gathered(self, part: Gathered, dq: Tensor) -> None:
        """Add a part's dq, once there is something to add it to."""
        if self._found:
            self._add(part, dq)
        else:
            self._waiting.append((part, dq))

    def add(self, part: Span, *gradients: Tensor) -> None:
        """Add a part's dq, dk and dv. A first part of everything is the sum so far: nothing is filled with zeros."""
        if not self._found and part.is_whole:
            self._start(gradients)
        else:
            self.results()
            self._add(part, *gradients)

    def _start(self, whole: tuple[Tensor, ...]) -> None:
        self._found = whole
        for part, dq in self._waiting:
            self._add(part, dq)
        self._waiting.clear()

    def _add(self, part: Span | Gathered, *gradients: Tensor) -> None:
        for x, gradient in zip(self._found, gradients, strict=False):
            part.write(x, (part.read(x) + gradient).to(x.dtype))
