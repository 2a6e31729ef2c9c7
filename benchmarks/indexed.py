"""Gather, attention with lse, scatter, mix: with torch alone, where nothing has to divide anything.

`composition.py` reads through views, which is faster and needs lengths that divide. Here every branch lists its rows
once, ahead of time; segments with equally many rows share one call of torch's flash attention. As in torchscale,
gradients hold the mixing weights constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.config import Problem, head_offsets


@dataclass(frozen=True)
class Group:
    """(segment, head) pairs of one branch with equally many rows; a row is (b·N + token)·H + head.

    Attributes:
        queries: int64 (pairs, query rows).
        keys: int64 (pairs, key rows).
    """

    queries: Tensor
    keys: Tensor


def groups(problem: Problem, device: torch.device, order: Tensor | None = None) -> list[Group]:
    """All rows of a problem that is neither causal nor masked nor padded.

    Args:
        problem: With as many key/value heads as query heads.
        device: Where the rows will be read.
        order: Steps -> tokens, int64 (N,).
    """
    tokens = torch.arange(problem.length) if order is None else order.cpu()
    batches = problem.length * problem.heads * torch.arange(problem.batch)[:, None]
    found = []
    for branch, (_, rate) in enumerate(problem.branches):
        pairs: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for segment in tokens.split(problem.segment(branch)):
            for head, offset in enumerate(head_offsets(problem.head_offset, problem.heads, rate)):
                keys = segment[offset::rate]
                queries = keys if problem.queries == "dilated" else segment
                if len(keys):
                    rows = tuple(batches + x * problem.heads + head for x in (queries, keys))  # [B, rows] each
                    pairs.setdefault((len(queries), len(keys)), []).append((rows[0], rows[1]))
        for alike in pairs.values():
            queries, keys = (torch.cat(rows).to(device) for rows in zip(*alike, strict=True))
            found.append(Group(queries, keys))
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, rows: list[Group]) -> Tensor:
    """Dilated attention of q, k, v (B, N, H, D) by the rows that `groups` lists."""
    flat = [x.reshape(-1, x.shape[3]) for x in (q, k, v)]
    outs, lses = [], []
    for group in rows:
        listed = (group.queries, group.keys, group.keys)
        packed = (_Gather.apply(x, at) for x, at in zip(flat, listed, strict=True))
        out, lse = _flash(*(x[:, None] for x in packed))
        outs.append(out[:, 0])
        lses.append(lse.detach()[:, 0])
    total = torch.full_like(flat[0][:, 0], -torch.inf, dtype=torch.float32)
    for group, lse in zip(rows, lses, strict=True):
        total[group.queries] = torch.logaddexp(total[group.queries], lse)
    result = torch.zeros_like(flat[0])
    for group, out, lse in zip(rows, outs, lses, strict=True):
        weights = torch.exp(lse - total[group.queries])[..., None]
        result.index_add_(0, group.queries.flatten(), (out * weights).to(result.dtype).flatten(0, 1))
    return result.view(q.shape)


class _Gather(torch.autograd.Function):
    """x[rows]; as no row comes twice, its gradient is a copy, where autograd's would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows.flatten(), gradient.flatten(0, 1)), None


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (P, 1, rows, D) and lse (P, 1, rows) of `scaled_dot_product_attention`'s flash kernel."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse
