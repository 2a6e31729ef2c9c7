"""Dilated attention by torch's own kernels: CPUs, float64, and wherever the generated kernels do not run.

Memory is linear in N. Every branch is a few dense attentions over strided views (`torch_calls`), whose results are
blended into one out and lse as they come; the backward is exact from these two alone, so no branch output is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Problem
from .arguments import unit_stride
from .dropout import key_bits
from .function import without_autocast
from .torch_attention import Drops, Visibility, attend, attend_backward, upcast
from .torch_calls import Budget, Bundle, Call, calls, is_whole

if TYPE_CHECKING:
    from .arguments import HeadOffsets
    from .dropout import Dropout
    from .plan import Plan


@torch.no_grad()
@without_autocast
def forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all branches as one softmax.

    Args:
        plan: Its problem is what is computed.
        q: Queries (B, N, H, D), any strides.
        k: Keys (B, N, G, D).
        v: Values (B, N, G, D).
        scale: Factor of the scores.
        index: Steps -> tokens, (N,) integers, wherever the problem has an order; else None.
        mask: Key padding mask (B, N) bool, or None.
        offsets: First kept step of each head by branch.
        dropout: What drops attention probabilities, or None.

    Returns:
        out (B, N, H, D) in q's dtype and lse (B, H, N) in float32, or float64 for float64 inputs.
    """
    problem = plan.problem
    q, k, v = unit_stride(q, k, v)
    lse = q.new_full((problem.batch, problem.heads, problem.length), -torch.inf, dtype=upcast(q[:0]).dtype)
    if lse.numel() == 0:
        return q.new_zeros(q.shape), lse
    branches = _Branches(plan, "fwd", q, index, offsets, dropout)
    first, ahead, behind = branches.sequence()
    waiting = [
        (call.queries, *_attend(call, problem, q, k, v, scale, mask, drops))
        for branch in ahead
        for call, drops in branches.calls(branch, alone=True)
    ]
    out = None
    for branch in (first, *behind):
        for call, drops in branches.calls(branch):
            rows, row_lse = _attend(call, problem, q, k, v, scale, mask, drops)
            if out is None and call.is_whole:
                out = _as_tensor(rows, q)
                call.queries.write(lse.transpose(1, 2), row_lse)
            else:
                out = q.new_zeros(q.shape) if out is None else out
                merge = _store if branch == first else _blend
                merge(out, lse, call.queries, rows, row_lse)
            del rows, row_lse  # before the next call makes its own
        while waiting:
            assert out is not None, "who waits, waits for the first branch"
            _blend(out, lse, *waiting.pop())
    return q.new_zeros(q.shape) if out is None else out, lse


@torch.no_grad()
@without_autocast
def backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the merged out and lse.

    Args:
        plan: The forward's; so are q, k, v, scale, index, mask, offsets and dropout.
        out: What `forward` returned; so is lse.
        dout: Gradient of out, any strides.
        dlse: Gradient of lse (B, H, N), or None; None where `problem.mix_grad` is "detached".

    Returns:
        dq, dk and dv, shaped and typed like q, k and v.
    """
    problem = plan.problem
    if lse.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, k, v = unit_stride(q, k, v)
    totals: list[Tensor] = []
    keyless = lse == -torch.inf
    by_row = lse.masked_fill(keyless, torch.inf).transpose(1, 2)  # exp(S - inf) = 0
    dlse_by_row = None if dlse is None else dlse.masked_fill(keyless, 0.0).transpose(1, 2)
    branches = _Branches(plan, "dkdv", q, index, offsets, dropout)
    for branch in branches.by_share:
        for call, drops in branches.calls(branch):
            if not call.has_keys:
                continue
            if problem.mix_grad == "detached":
                branch_out, _ = _attend(call, problem, q, k, v, scale, mask, drops)
            else:
                branch_out = call.queries.read(out)
            gradients = attend_backward(
                call.operand(call.queries, q),
                call.operand(call.keys, k),
                call.operand(call.keys, v),
                branch_out,
                call.queries.read(by_row),
                call.queries.read(dout),
                None if dlse_by_row is None else call.queries.read(dlse_by_row),
                scale,
                _visibility(call, problem, mask, drops, q.device),
            )
            if call.is_whole and not totals:
                totals = [_as_tensor(gradient, x) for gradient, x in zip(gradients, (q, k, v), strict=True)]
            else:
                totals = totals or [x.new_zeros(x.shape) for x in (q, k, v)]
                call.queries.add(totals[0], gradients[0])
                call.keys.add(totals[1], gradients[1])
                call.keys.add(totals[2], gradients[2])
            del branch_out, gradients  # before the next call makes its own
    dq, dk, dv = totals or [x.new_zeros(x.shape) for x in (q, k, v)]
    return dq, dk, dv


def _store(out: Tensor, lse: Tensor, queries: Bundle, rows: Tensor, row_lse: Tensor) -> None:
    """The first branch's result."""
    queries.write(out, rows)
    queries.write(lse.transpose(1, 2), row_lse)


def _blend(out: Tensor, lse: Tensor, queries: Bundle, rows: Tensor, row_lse: Tensor) -> None:
    """Mix a branch's result into what the branches before it gave, in place."""
    by_row = lse.transpose(1, 2)
    before = queries.read(by_row)
    # exp(lse_b - logaddexp(lse, lse_b)); where both are -inf nothing changes.
    weight = torch.sigmoid(row_lse - before).nan_to_num_(0.0)
    queries.blend(out, rows, weight.unsqueeze(3))
    queries.write(by_row, torch.logaddexp(before, row_lse))


def _attend(
    call: Call,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    drops: Drops | None,
) -> tuple[Tensor, Tensor]:
    """out (B·C, heads, L, D) and lse (B·C, heads, L) of one call, phantom keys and masked queries included."""
    queries = call.operand(call.queries, q)
    if call.has_keys:
        see = _visibility(call, problem, mask, drops, q.device)
        out, lse = attend(queries, call.operand(call.keys, k), call.operand(call.keys, v), scale, see)
    else:
        out = torch.zeros_like(upcast(queries))
        lse = torch.full_like(out[..., 0], -torch.inf)
    if call.phantoms:
        total = torch.logaddexp(lse, torch.full_like(lse, math.log(call.phantoms)))
        out, lse = out * torch.exp(lse - total).unsqueeze(3), total
    if mask is not None:
        masked = ~call.queries.read(_by_head(mask, problem.heads))
        out, lse = out.masked_fill(masked.unsqueeze(3), 0.0), lse.masked_fill(masked, -torch.inf)
    return out, lse


def _as_tensor(rows: Tensor, like: Tensor) -> Tensor:
    """All rows (B·C, heads, L, D) as (B, N, heads, D): no copy where a kernel wrote them in that layout."""
    return rows.transpose(1, 2).reshape(like.shape).to(like.dtype)


def _visibility(
    call: Call, problem: Problem, mask: Tensor | None, of_branch: Drops | None, device: torch.device
) -> Visibility:
    keys = None if mask is None else call.keys.read(_by_head(mask, problem.kv_heads))
    tokens = drops = None
    if call.by_token:
        numbers = torch.arange(problem.length, device=device).expand(problem.batch, -1)
        tokens = (
            call.queries.read(_by_head(numbers, problem.heads)),
            call.keys.read(_by_head(numbers, problem.kv_heads)),
        )
    if of_branch is not None:
        first, second = (call.queries.read(bits) for bits in of_branch.queries)
        drops = Drops(of_branch.dropout, (first, second), call.keys.read(of_branch.keys))
    return Visibility(call.causal, tokens, keys, drops)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, N) -> (B, N, heads), the same for each head."""
    return x.unsqueeze(2).expand(-1, -1, heads)


class _Branches:
    """The branches of a plan, as calls."""

    def __init__(
        self, plan: Plan, op: str, q: Tensor, index: Tensor | None, offsets: HeadOffsets, dropout: Dropout | None
    ) -> None:
        self._plan, self._op, self._q, self._offsets, self._dropout = plan, op, q, offsets, dropout
        self._index = None if index is None else index.long()
        problem = plan.problem
        if dropout is not None:
            bits = key_bits(problem.length, dropout.seed.device)
            self._keys = _by_head(bits.expand(problem.batch, -1), problem.kv_heads)
        self._shares = [
            sum(offset >= 0 for offset in row) / (rate * problem.heads)
            for row, (_, rate) in zip(offsets.rows, problem.branches, strict=True)
        ]
        self.by_share = sorted(range(len(self._shares)), key=lambda branch: -self._shares[branch])
        """The branch that keeps most first: it is stored, the others are blended in or added."""

    def sequence(self) -> tuple[int, list[int], list[int]]:
        """The first branch of a forward, those to be computed ahead of it, and those behind it.

        Where the first one's result becomes out, there is no out before it and so room for large calls of the sparsest
        branches, whose results wait packed: half of q at most.
        """
        first, *others = self.by_share
        problem = self._plan.problem
        ahead: list[int] = []
        if problem.queries == "dilated" and is_whole(problem, first, self._offsets.rows[first], self._index):
            while others and sum(self._shares[branch] for branch in (*ahead, others[-1])) <= 0.5:
                ahead.append(others.pop())
        return first, ahead, others

    def calls(self, branch: int, *, alone: bool = False) -> Iterator[tuple[Call, Drops | None]]:
        """The calls of a branch, with what is dropped of it; `alone` in memory, they may be larger."""
        plan, q, row = self._plan, self._q, self._offsets.rows[branch]
        config = plan.call_config(self._op, branch)
        budget = Budget.of(config, q.numel(), q.device.type, alone=alone)
        drops = None
        if self._dropout is not None:
            drops = Drops(self._dropout, self._dropout.row_bits(plan.problem, branch), self._keys)
        cut = _kept_calls if self._index is None else calls
        for call in cut(plan.problem, branch, row, self._index, budget):
            yield call, drops


@lru_cache(maxsize=256)
def _kept_calls(*arguments: Any) -> tuple[Call, ...]:
    """Those of `calls` that hold no tensor."""
    return tuple(calls(*arguments))
