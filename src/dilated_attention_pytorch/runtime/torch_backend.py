"""Dilated attention by torch's own kernels: CPUs, float64, and wherever the generated kernels do not run.

Memory is linear in N. Every branch is a few dense attentions over strided views (`torch_calls`), whose results are
blended into one out and lse as they come; the backward is exact from these two alone, so no branch output is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import GRID_CAP, Problem
from .arguments import unit_stride
from .dropout import key_bits
from .torch_attention import Drops, Visibility, attend, attend_backward, upcast
from .torch_calls import Budget, Bundle, Call, calls

if TYPE_CHECKING:
    from .arguments import HeadOffsets
    from .dropout import Dropout
    from .plan import Plan


@torch.no_grad()
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
    out = None
    lse = q.new_full((problem.batch, problem.heads, problem.length), -torch.inf, dtype=upcast(q[:0]).dtype)
    for place, (branch_calls, dropped) in enumerate(
        _branches(problem, offsets, index, dropout, _budget(q, pairs=1, share=8))
    ):
        for call in branch_calls:
            if out is None and call.is_whole:
                rows, row_lse = _attend(call, problem, q, k, v, scale, mask, dropped)
                out = _as_tensor(rows, q)
                call.queries.write(lse.transpose(1, 2), row_lse)
                del rows, row_lse
                continue
            out = q.new_zeros(q.shape) if out is None else out
            merge = _store if place == 0 else _blend
            merge(call.queries, out, lse, *_attend(call, problem, q, k, v, scale, mask, dropped))
    return q.new_zeros(q.shape) if out is None else out, lse


@torch.no_grad()
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
    q, k, v = unit_stride(q, k, v)
    totals: list[Tensor] = []
    keyless = lse == -torch.inf
    by_row = lse.masked_fill(keyless, torch.inf).transpose(1, 2)  # exp(S - inf) = 0
    dlse_by_row = None if dlse is None else dlse.masked_fill(keyless, 0.0).transpose(1, 2)
    for branch_calls, dropped in _branches(problem, offsets, index, dropout, _budget(q, pairs=2, share=8)):
        for call in branch_calls:
            if not call.has_keys:
                continue
            if problem.mix_grad == "detached":
                branch_out, _ = _attend(call, problem, q, k, v, scale, mask, dropped)
            else:
                branch_out = call.queries.read(out)
            gradients = attend_backward(
                call.queries.pack(q),
                call.keys.pack(k),
                call.keys.pack(v),
                branch_out,
                call.queries.read(by_row),
                call.queries.read(dout),
                None if dlse_by_row is None else call.queries.read(dlse_by_row),
                scale,
                _visibility(call, problem, mask, dropped, q.device),
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


def _store(queries: Bundle, out: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor) -> None:
    """The first branch's result."""
    queries.write(out, rows)
    queries.write(lse.transpose(1, 2), row_lse)


def _blend(queries: Bundle, out: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor) -> None:
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
    dropped: Drops | None,
) -> tuple[Tensor, Tensor]:
    """out (B·C, heads, L, D) and lse (B·C, heads, L) of one call, phantom keys and masked queries included."""
    queries = call.queries.pack(q)
    if call.has_keys:
        see = _visibility(call, problem, mask, dropped, q.device)
        out, lse = attend(queries, call.keys.pack(k), call.keys.pack(v), scale, see)
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
    call: Call, problem: Problem, mask: Tensor | None, dropped: Drops | None, device: torch.device
) -> Visibility:
    keys = None if mask is None else call.keys.read(_by_head(mask, problem.kv_heads))
    tokens = drops = None
    if call.by_token:
        numbers = torch.arange(problem.length, device=device).expand(problem.batch, -1)
        tokens = (
            call.queries.read(_by_head(numbers, problem.heads)),
            call.keys.read(_by_head(numbers, problem.kv_heads)),
        )
    if dropped is not None:
        first, second = (call.queries.read(bits) for bits in dropped.queries)
        drops = Drops(dropped.dropout, (first, second), call.keys.read(dropped.keys))
    return Visibility(call.causal, tokens, keys, drops)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, N) -> (B, N, heads), the same for each head."""
    return x.unsqueeze(2).expand(-1, -1, heads)


def _budget(q: Tensor, *, pairs: int, share: int) -> Budget:
    """Calls of so many pairs a thread at least, and of one in `share` of q where their operands are copied, else two.

    Torch's forward kernel also divides the rows of a pair among threads, the backward does not.
    """
    pairs = pairs * torch.get_num_threads() if q.device.type == "cpu" else GRID_CAP
    return Budget(pairs, q.numel() // share, 2 * q.numel() // share)


def _branches(
    problem: Problem, offsets: HeadOffsets, index: Tensor | None, dropout: Dropout | None, budget: Budget
) -> Iterator[tuple[Iterator[Call], Drops | None]]:
    """The calls of each branch, the branch that keeps most first: it is stored, the others are blended in."""
    tokens = None if index is None else index.long()
    if dropout is not None:
        keys = _by_head(key_bits(problem.length, dropout.seed.device).expand(problem.batch, -1), problem.kv_heads)

    def share(branch: int) -> float:
        return sum(offset >= 0 for offset in offsets.rows[branch]) / problem.branches[branch][1]

    for branch in sorted(range(len(problem.branches)), key=share, reverse=True):
        dropped = None
        if dropout is not None:
            dropped = Drops(dropout, dropout.row_bits(problem, branch), keys)
        yield calls(problem, branch, offsets.rows[branch], tokens, budget), dropped
