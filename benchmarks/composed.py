"""What one writes today on a GPU: gather, a library's attention on packed rows, scatter, mix. In its best honest form.

A branch's kept rows are gathered through diagonal views: one copy a tensor and branch, none where r = 1; or, `apart`,
the kernel is called for each residue of the heads on strided views, without a copy of q, k and v. Segments and heads
with equally many rows share a call, so nothing has to divide anything but the heads. The outputs are weighted while
they are still sparse and added where they belong, in place; so are the gradients. As in torchscale, gradients hold the
mixing weights constant, which costs less time and memory than the exact ones.

The same functions run eagerly and under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.rows import Attend
from dilated_attention_pytorch.config import Problem, cdiv

Kernel = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""q (P, H, rows, D), k, v, causal -> out (P, H, rows, D) and lse (P, H, rows)."""


@dataclass(frozen=True)
class Part:
    """Segments of one branch that are equally long.

    Attributes:
        start: First step.
        segments: C.
        segment: Steps of each.
        rate: r.
        rule: "cyclic", "blocked" or "zero".
    """

    start: int
    segments: int
    segment: int
    rate: int
    rule: str

    @property
    def groups(self) -> list[int]:
        """Residues of the heads in each group of heads with equally many rows: the first heads may keep one more."""
        if self.rate == 1 or self.rule == "zero":
            return [1]
        rest = self.segment % self.rate
        return [rest, self.rate - rest] if rest else [self.rate]

    def views(self, x: Tensor) -> list[list[Tensor]]:
        """The kept rows of x (B, N, H, …) by group of heads: views (B, C, heads…, rows, …) that follow each other."""
        stop = self.start + self.segments * self.segment
        x = x[:, self.start : stop].unflatten(1, (self.segments, self.segment))  # [B, C, w, H, …]
        if self.rate == 1 or self.rule == "zero":
            return [[x[:, :, :: self.rate].movedim(3, 2)]]
        heads = x.shape[3] // self.rate
        x = x.unflatten(3, (heads, self.rate) if self.rule == "cyclic" else (self.rate, heads))
        residue = 4 if self.rule == "cyclic" else 3
        whole, rest = divmod(self.segment, self.rate)
        body = x[:, :, : whole * self.rate].unflatten(2, (whole, self.rate))
        body = body.diagonal(dim1=3, dim2=residue + 1).movedim(-1, 2).transpose(3, 4)  # [B, C, r, H/r, rows, …]
        if not rest:
            return [[body]]
        last = x[:, :, whole * self.rate :].narrow(residue, 0, rest)
        last = last.diagonal(dim1=2, dim2=residue).movedim(-1, 2).unsqueeze(4)  # [B, C, rest, H/r, 1, …]
        return [[body[:, :, :rest], last], [body[:, :, rest:]]]

    def read(self, x: Tensor) -> list[Tensor]:
        """Packed rows of each group: (B·C, heads, rows, …), a view where the strides allow."""
        found = []
        for views in self.views(x):
            at = _rows_at(views[0], x)
            rows = views[0] if len(views) == 1 else torch.cat(views, dim=at)
            found.append(rows.flatten(2, at - 1).flatten(0, 1))
        return found

    def apart(self, x: Tensor) -> list[Tensor]:
        """Packed rows of each residue: strided views of x (B, N, H, D), (B·C, heads, rows, D)."""
        if len(self.groups) == 1 and self.groups[0] == 1:
            return self.read(x)
        stop = self.start + self.segments * self.segment
        x = x[:, self.start : stop].unflatten(1, (self.segments, self.segment))
        split = (-1, self.rate) if self.rule == "cyclic" else (self.rate, -1)
        residue = 4 if self.rule == "cyclic" else 3
        kept = [x[:, :, s :: self.rate].unflatten(3, split).select(residue, s) for s in range(self.rate)]
        return [rows.transpose(2, 3).flatten(0, 1) for rows in kept]

    def change(self, x: Tensor, packed: Sequence[Tensor], by: Callable[[Tensor, Tensor], object]) -> None:
        """Call `by(view, rows)` on all views of x and the packed rows that belong there."""
        for views, rows in zip(self.views(x), packed, strict=True):
            at = _rows_at(views[0], x)
            lengths = [view.shape[at] for view in views]
            for view, piece in zip(views, rows.split(lengths, dim=2), strict=True):
                by(view, piece.reshape(view.shape))


def _rows_at(view: Tensor, x: Tensor) -> int:
    """Which dimension of a view of x holds rows: what follows it is x's from the fourth on."""
    return view.dim() - 1 - (x.dim() - 3)


def parts(problem: Problem, branch: int, *, keys: bool) -> list[Part]:
    """A branch's whole segments, and the short one behind them.

    Raises:
        NotImplementedError: Heads that the rate does not divide, or zero padding inside of more than one segment.
    """
    width, rate = problem.segment(branch), problem.branches[branch][1]
    rule = problem.head_offset
    if rule not in ("cyclic", "blocked", "zero") or (rule != "zero" and problem.heads % rate):
        raise NotImplementedError(f"{rule} offsets of {problem.heads} heads at rate {rate}")
    if problem.queries == "all":
        if rule != "zero":
            raise NotImplementedError("all queries of heads that keep different keys")
        rate = rate if keys else 1
    if problem.padding == "zeros" and not problem.causal:
        segments = problem.segments(branch)
        if segments > 1 and width % rate:
            raise NotImplementedError("zeros inside of several segments")
        return [Part(0, segments, cdiv(width, rate) * rate, rate, rule)]
    whole, rest = divmod(problem.length, width)
    found = [Part(0, whole, width, rate, rule)]
    return found + ([Part(whole * width, 1, rest, rate, rule)] if rest else [])


def attention(
    problem: Problem,
    kernel: Kernel,
    *,
    apart: bool = False,
    order: Tensor | None = None,
    wrap: Callable[[Any], Any] = lambda step: step,
) -> Attend:
    """A function of q, k, v (B, N, H, D).

    Args:
        problem: Unmasked, with as many key/value heads as query heads; its gradient's rule is "detached".
        kernel: The library's attention.
        apart: Strided views instead of gathered copies.
        order: Steps -> tokens, int64 (N,), on the device.
        wrap: Put around what comes before the kernels and what comes behind: `torch.compile` where a kernel cannot be
            traced.
    """
    every = range(len(problem.branches))
    asked = [part for b in every for part in parts(problem, b, keys=False)]
    keyed = [part for b in every for part in parts(problem, b, keys=True)]
    padded = max(problem.length, *(part.start + part.segments * part.segment for part in keyed))
    inverse = None if order is None else torch.argsort(order)

    def gather(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
        found = []
        for x, of in zip(tensors, (asked, keyed, keyed), strict=True):
            steps = x if order is None else _applied(_Permute, x, order, inverse)
            if padded > problem.length:
                steps = pad(steps, (0, 0, 0, 0, 0, padded - problem.length))
            found.append(_applied(_Pack, steps, of, apart))
        return found

    def mix(outs: Sequence[Tensor], lses: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        if apart:
            outs, lses = (_joined(asked, rows) for rows in (outs, lses))
        lses = [lse.detach() for lse in lses]
        out = _applied(_Mix, asked, shape, len(every) > 1, *outs, *lses)[:, : problem.length]
        return out if order is None else _applied(_Permute, out, inverse, order)

    gather, mix = wrap(gather), wrap(mix)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        results = [kernel(*rows, problem.causal) for rows in zip(*gather(q, k, v), strict=True)]
        outs, lses = ([result[place] for result in results] for place in (0, 1))
        return mix(outs, lses, (q.shape[0], padded, *q.shape[2:]))

    return attend


def packed(problem: Problem, x: Tensor, order: Tensor | None = None) -> Tensor:
    """Rows of a problem with one branch in which everything divides: (segments, H, rows, D), contiguous."""
    (part,) = parts(problem, 0, keys=True)
    (rows,) = part.read(x if order is None else x[:, order])
    return rows.contiguous()


def _joined(parts: Sequence[Part], rows: Sequence[Tensor]) -> list[Tensor]:
    """Packed rows of each group of heads from those of each residue."""
    left = iter(rows)
    together = [[next(left) for _ in range(count)] for part in parts for count in part.groups]
    return [torch.cat(some, dim=1) if len(some) > 1 else some[0] for some in together]


def _by_part(parts: Sequence[Part], packed: Sequence[Tensor]) -> list[tuple[Part, list[Tensor]]]:
    """Parts with the packed rows of their groups."""
    left = iter(packed)
    return [(part, [next(left) for _ in part.groups]) for part in parts]


def _spread(parts: Sequence[Part], packed: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The sum over parts of rows put where they belong, zeros elsewhere."""
    pairs = _by_part(parts, packed)
    first, (rows, *_) = pairs[0]
    if first.rate == 1 and first.segments * first.segment == shape[1]:
        # The first branch holds every row: it is what the others are added to.
        dense = rows.unflatten(0, (shape[0], first.segments)).movedim(2, 3).reshape(shape)
        pairs = pairs[1:]
    else:
        dense = packed[0].new_zeros(shape)
    for part, rows in pairs:
        part.change(dense, rows, Tensor.add_)
    return dense


def _applied(function: type[torch.autograd.Function], *given: Any) -> Any:
    """What a function gives; without gradients it is not recorded, nor is `torch.compile` shown that it could be."""
    return function.apply(*given) if torch.is_grad_enabled() else function.forward(_Unkept(), *given)


class _Unkept:
    """In place of what a backward would need."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Nothing is kept."""


class _Pack(torch.autograd.Function):
    """Rows of all parts; their gradients are added up in place, where autograd's would fill a tensor for each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Part], apart: bool) -> tuple[Tensor, ...]:
        ctx.parts, ctx.apart, ctx.shape = parts, apart, x.shape
        return tuple(rows for part in parts for rows in (part.apart(x) if apart else part.read(x)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows = _joined(ctx.parts, gradients) if ctx.apart else gradients
        return _spread(ctx.parts, rows, ctx.shape), None, None


class _Mix(torch.autograd.Function):
    """Outputs weighted by exp(lse - total lse) and added up; the weights are constants in the backward."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], shape: Sequence[int], several: bool, *tensors: Tensor) -> Tensor:
        outs, lses = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.parts, ctx.several = parts, several
        if not several:
            return _spread(parts, outs, shape)
        total = torch.full(shape[:3], -torch.inf, dtype=torch.float32, device=outs[0].device)
        for part, rows in _by_part(parts, lses):
            part.change(total, rows, lambda view, lse: view.copy_(torch.logaddexp(view, lse)))
        totals = [rows for part in parts for rows in part.read(total)]
        weights = [torch.exp(lse - of_rows).unsqueeze(3) for lse, of_rows in zip(lses, totals, strict=True)]
        ctx.save_for_backward(*weights)
        weighted = [(out * weight).to(out.dtype) for out, weight in zip(outs, weights, strict=True)]
        return _spread(parts, weighted, shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows = [of_part for part in ctx.parts for of_part in part.read(gradient)]
        if ctx.several:
            rows = [(x * weight).to(x.dtype) for x, weight in zip(rows, ctx.saved_tensors, strict=True)]
        return None, None, None, *rows, *(None for _ in rows)


class _Permute(torch.autograd.Function):
    """x[:, index]; the gradient gathers too, where autograd's would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(1, ctx.saved_tensors[0]), None, None


# ---- torchscale's own way --------------------------------------------------------------------------------------------


def torchscale(problem: Problem, kernel: Kernel) -> Attend:
    """The steps of torchscale's `DilatedAttention`, eager: pad with zeros, gather, attend, spread every branch's output
    and lse over all tokens and heads, mix all of them.

    Args:
        problem: With queries "dilated" and no order; its zeros take part as keys whatever `problem.padding` says.
        kernel: Flash attention, as torchscale has it.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, heads, _ = q.shape
        outs, lses = [], []
        for branch, (_, rate) in enumerate(problem.branches):
            width, segments = problem.segment(branch), problem.segments(branch)
            rows = [_sparse(x, width, segments, rate, problem.head_offset) for x in (q, k, v)]
            out, lse = kernel(*rows, problem.causal)
            out, lse = (_dense(x, heads, rate, problem.head_offset)[:, :width] for x in (out, lse.unsqueeze(3)))
            outs.append(out.reshape(batch, -1, heads, out.shape[3])[:, :length])
            lses.append(lse.reshape(batch, -1, heads, 1)[:, :length])
        if len(outs) == 1:
            return outs[0]
        with torch.no_grad():
            lses = [lse.masked_fill(lse == 0, -1e8) for lse in lses]
            peak = torch.stack(lses).amax(0)
            shares = [torch.exp(lse - peak) for lse in lses]
            total = torch.stack(shares).sum(0)
            shares = [share / total for share in shares]
        return reduce(torch.add, (out * share.type_as(out) for out, share in zip(outs, shares, strict=True)))

    return attend


def _sparse(x: Tensor, width: int, segments: int, rate: int, rule: str) -> Tensor:
    """(B, N, H, D) -> (B·C, H, ⌈w/r⌉, D)."""
    x = pad(x, (0, 0, 0, 0, 0, segments * width - x.shape[1])).reshape(-1, width, *x.shape[2:])
    x = pad(x, (0, 0, 0, 0, 0, -width % rate))
    return Part(0, 1, x.shape[1], rate, rule).read(x)[0]


def _dense(rows: Tensor, heads: int, rate: int, rule: str) -> Tensor:
    """(B·C, H, rows, …) -> (B·C, rows·r, H, …), zeros where nothing is kept."""
    if rate == 1:
        return rows.transpose(1, 2)
    x = rows.unflatten(1, (rate, heads // rate)).movedim(3, 1)  # [P, rows, r, H/r, …]
    x = torch.diag_embed(x.movedim(2, -1))  # [P, rows, H/r, …, r of steps, r of heads]
    x = x.movedim(-2, 2)
    x = x.movedim(-1, 4) if rule == "cyclic" else x.movedim(-1, 3)
    return x.flatten(3, 4).flatten(1, 2)
