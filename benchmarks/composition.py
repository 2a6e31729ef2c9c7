"""The alternative everybody can write with torch alone: gather, attention with lse, scatter, mix.

Written to be hard to beat: one gather a tensor and branch through a diagonal view (none where r = 1), one kernel call
a branch on packed rows, weights taken from the lse that the kernel returns anyway, and results weighted while they are
still sparse and added in place. As in torchscale, gradients hold the mixing weights constant: that costs this
composition less time and memory than the exact gradient would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept(x: Tensor, segment: int, rate: int, rule: str) -> Tensor:
    """View of the rows that the heads keep: (B, N, H, …) -> (B, segments, rows, H/r, …, r).

    N must be a multiple of the segment, the segment and H multiples of the rate.
    """
    batch, length, heads = x.shape[:3]
    split = (heads // rate, rate) if rule == "cyclic" else (rate, heads // rate)
    x = x.view(batch, length // segment, segment // rate, rate, *split, *x.shape[3:])
    return x.diagonal(dim1=3, dim2=5 if rule == "cyclic" else 4)


def pack(x: Tensor, segment: int, rate: int, rule: str) -> Tensor:
    """The same rows, (B·segments, H, rows, D): a view where r = 1, one copy elsewhere."""
    if rate == 1:
        return x.view(-1, segment, *x.shape[2:]).transpose(1, 2)
    rows = kept(x, segment, rate, rule)  # [B, C, L, H/r, D, r]
    return rows.permute(0, 1, 5, 3, 2, 4).reshape(-1, x.shape[2], segment // rate, x.shape[3])


def unpack(rows: Tensor, batch: int, segment: int, rate: int) -> Tensor:
    """(B·segments, H, rows, …) as a view shaped like `kept`."""
    rows = rows.view(batch, -1, rate, rows.shape[1] // rate, segment // rate, *rows.shape[3:])
    return rows.permute(0, 1, 4, 3, *range(5, rows.dim()), 2)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offset: str = "cyclic",
    is_causal: bool = False,
) -> Tensor:
    """LongNet's attention (B, N, H, D) on a CPU; branch 0 must have rate 1, and everything must divide."""
    batch, length, heads, _ = q.shape
    total = None
    outs, lses = [], []
    for segment, rate in zip(segment_lengths, dilation_rates, strict=True):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(pack(x, segment, rate, head_offset) for x in (q, k, v)), 0.0, is_causal
        )
        outs.append(out)
        lses.append(lse.contiguous())
    with torch.no_grad():
        total = lses[0].transpose(1, 2).reshape(batch, length, heads)
        for lse, segment, rate in list(zip(lses, segment_lengths, dilation_rates, strict=True))[1:]:
            rows = kept(total, segment, rate, head_offset)
            rows.copy_(torch.logaddexp(rows, unpack(lse, batch, segment, rate)))
        weights = []
        for lse, segment, rate in zip(lses, segment_lengths, dilation_rates, strict=True):
            packed = pack(total.unsqueeze(3), segment, rate, head_offset).squeeze(3)
            weights.append(torch.exp(lse - packed).unsqueeze(3))
    del lses, lse, out

    result = (outs[0] * weights[0]).transpose(1, 2).reshape(q.shape)
    for branch in range(1, len(outs)):
        segment, rate = segment_lengths[branch], dilation_rates[branch]
        rows = unpack(outs[branch] * weights[branch], batch, segment, rate)
        kept(result, segment, rate, head_offset).add_(rows)
    return result
