"""The formula of the client's core in whole-tensor operations, for PyTorch's own autograd.

For debugging, and for measuring what a custom backward is worth. Everything is computed in the dtype of the inputs,
and PyTorch keeps every intermediate for the backward: memory grows with N times the keys of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from ..config import cdiv
from ..order import TokenOrder
from .steps import steps_to_tokens


def vectorized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    order: TokenOrder | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of every token over every r-th step of its segment, from the segment's first on, in all branches.

    Args:
        q: (B, N, H, D).
        k, v: (B, N, G, D); G divides H.
        segment_lengths: w of each branch, in steps.
        dilation_rates: r of each branch.
        order: Sequence in which tokens are visited.
        is_causal: Drop keys of later tokens, whatever the order.
        key_padding_mask: (B, N) bool, True = take part.
        dropout_p: Probability with which an attention weight is dropped.

    Returns:
        (B, N, H, D), in token order; 0 where a query has no key.
    """
    length, head_dim = q.shape[1], q.shape[3]
    branches = list(zip(segment_lengths, dilation_rates, strict=True))
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    tokens = torch.arange(length, device=q.device)
    if order is not None:
        tokens = steps_to_tokens(order, length, q.device)
        q, k, v = (x.index_select(1, tokens) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q * head_dim**-0.5, k, v))  # [B, H, steps, D]

    keys = [_segments(k, 2, width)[..., ::rate, :] for width, rate in branches]
    scores = [
        (_segments(q, 2, width) @ key.mT).flatten(2, 3)[:, :, :length]  # [B, H, steps, keys of the branch]
        for (width, _), key in zip(branches, keys, strict=True)
    ]
    weights = _weights(_joined(scores), _allowed(branches, tokens, is_causal, key_padding_mask))
    weights = dropout(weights, dropout_p)
    shares = torch.split(weights, [score.shape[3] for score in scores], dim=3)
    outs = [
        (_segments(share, 2, width) @ _segments(v, 2, width)[..., ::rate, :]).flatten(2, 3)[:, :, :length]
        for (width, rate), share in zip(branches, shares, strict=True)
    ]
    out = torch.stack(outs).sum(0).transpose(1, 2) if len(outs) > 1 else outs[0].transpose(1, 2)
    return out if order is None else torch.zeros_like(out).index_copy(1, tokens, out)


def _weights(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """One softmax over the keys of all branches; rows without a key are 0, where a softmax alone would be NaN."""
    if allowed is None:
        return scores.softmax(dim=3)
    keyless = ~allowed.any(dim=3, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(keyless, 0.0)
    return scores.softmax(dim=3).masked_fill(keyless, 0.0)


def _allowed(
    branches: Sequence[tuple[int, int]], tokens: Tensor, is_causal: bool, key_padding_mask: Tensor | None
) -> Tensor | None:
    """Which keys take part, (B or 1, 1, steps, keys) bool; None where all do."""
    length = len(tokens)
    whole = all(length % max(min(width, length), 1) == 0 for width, _ in branches)
    if whole and not is_causal and key_padding_mask is None:
        return None
    alive = torch.ones_like(tokens, dtype=torch.bool)[None]
    if key_padding_mask is not None:
        alive = key_padding_mask[:, tokens]
    found = []
    for width, rate in branches:
        rows = _segments(alive, 1, width)
        met = rows[..., :, None] & rows[..., None, ::rate]
        if is_causal:
            token = _segments(tokens, 0, width)
            met = met & (token[:, None, ::rate] <= token[:, :, None])
        found.append(met.flatten(1, 2)[:, None, :length])
    return _joined(found)


def _segments(x: Tensor, dim: int, width: int) -> Tensor:
    """Cuts a dimension of steps into (segments, w), the last segment filled up with zeros, which are False."""
    length = x.shape[dim]
    width = max(min(width, length), 1)
    count = cdiv(length, width)
    if missing := count * width - length:
        x = pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    return torch.unflatten(x, dim, (count, width))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=3) if len(parts) > 1 else parts[0]
