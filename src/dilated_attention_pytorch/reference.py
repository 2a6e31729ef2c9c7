"""The oracle: dilated attention in float64, with plain loops over branches, heads and segments.

Everything else in this package is compared with this file, so it is written to be read aloud, not to be fast.
Gradients are PyTorch's own autograd through the formulas below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import cdiv, head_offsets

DropoutMask = Callable[[int], Tensor]
"""branch -> multipliers (B, H, N query tokens, N key tokens): 0 where dropped, 1/(1-p) where kept."""


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    dropout_mask: DropoutMask | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of q over k and v as one softmax over the keys of all branches.

    Args:
        q: Queries (B, N, H, D).
        k: Keys (B, N, G, D); query head h reads key/value head ⌊h·G/H⌋.
        v: Values (B, N, G, D).
        segment_lengths: w of each branch, in steps.
        dilation_rates: r of each branch.
        queries: "dilated" (a head asks at the steps it keeps) or "all" (it asks at every step).
        head_offset: "cyclic", "blocked", "zero", or integers (branches, H) with -1 for an absent head.
        order: Steps -> tokens, int64 (N,); None visits the tokens as they stand.
        is_causal: Drop keys of later tokens, whatever the order.
        key_padding_mask: (B, N) bool, True = take part.
        scale: Factor of the scores; None is D^-0.5.
        padding: "zeros" adds torchscale's phantom keys to segments that keep less than ⌈w/r⌉ steps.
        mix_grad: "detached" holds the mixing weights of the branches constant in the backward; lse then carries no
            gradient.
        dropout_mask: Multipliers of the attention probabilities, by branch.
        dtype: What everything is computed in; a narrow one tells what rounding alone costs.

    Returns:
        out (B, N, H, D) and lse (B, H, N), both of `dtype` and in token order; 0 and -inf where a query has no key.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    tokens = torch.arange(length, device=q.device) if order is None else order.to(q.device)
    alive = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        alive = key_padding_mask.to(q.device)

    outs, lses = [], []
    for branch, (segment_length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        if isinstance(head_offset, str):
            offsets = head_offsets(head_offset, heads, rate)
        else:
            offsets = tuple(head_offset[branch].tolist())
        branch_outs, branch_lses = [], []
        for head, offset in enumerate(offsets):
            group = head * k.shape[2] // heads
            out, lse = _one_head(
                q[:, :, head],
                k[:, :, group],
                v[:, :, group],
                max(min(segment_length, length), 1),
                rate,
                offset,
                tokens=tokens,
                alive=alive,
                all_queries=queries == "all",
                is_causal=is_causal,
                scale=scale,
                phantoms=padding == "zeros" and not is_causal,
                multipliers=None if dropout_mask is None else dropout_mask(branch)[:, head].to(dtype),
            )
            branch_outs.append(out)
            branch_lses.append(lse)
        outs.append(torch.stack(branch_outs, dim=2))
        lses.append(torch.stack(branch_lses, dim=1))

    mix, lse = _softmax(torch.stack(lses, dim=-1))  # [B, H, N, branches], [B, H, N]
    if mix_grad == "detached":
        mix, lse = mix.detach(), lse.detach()
    out = (torch.stack(outs, dim=-1) * mix.transpose(1, 2).unsqueeze(3)).sum(dim=-1)
    return out, lse


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_length: int,
    rate: int,
    offset: int,
    *,
    tokens: Tensor,
    alive: Tensor,
    all_queries: bool,
    is_causal: bool,
    scale: float,
    phantoms: bool,
    multipliers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (B, N, D) and lse (B, N) of one head in one branch, in token order."""
    batch, length, _ = q.shape
    asked, outs, lses = [], [], []
    for start in range(0, length if offset >= 0 else 0, segment_length):
        stop = min(start + segment_length, length)
        key_tokens = tokens[start + offset : stop : rate]
        query_tokens = tokens[start:stop] if all_queries else key_tokens
        padded = cdiv(segment_length, rate) - len(key_tokens) if phantoms else 0
        if len(query_tokens) == 0 or len(key_tokens) + padded == 0:
            continue

        allowed = alive[:, query_tokens, None] & alive[:, None, key_tokens]  # [B, queries, keys]
        if is_causal:
            allowed = allowed & (key_tokens[None, :] <= query_tokens[:, None])
        # A phantom key is a row of zeros that every living query sees: score 0, value 0.
        allowed = torch.cat([allowed, alive[:, query_tokens, None].expand(-1, -1, padded)], dim=2)
        zeros = k.new_zeros(batch, padded, k.shape[2])
        keys = torch.cat([k[:, key_tokens], zeros], dim=1)
        values = torch.cat([v[:, key_tokens], zeros], dim=1)

        scores = scale * q[:, query_tokens] @ keys.transpose(1, 2)
        probabilities, lse = _softmax(scores.masked_fill(~allowed, -torch.inf))
        if multipliers is not None:
            kept = multipliers[:, query_tokens[:, None], key_tokens[None, :]]
            probabilities = probabilities * torch.nn.functional.pad(kept, (0, padded), value=1.0)
        asked.append(query_tokens)
        outs.append(probabilities @ values)
        lses.append(lse)

    out, lse = torch.zeros_like(q), torch.full_like(q[:, :, 0], -torch.inf)
    if asked:
        rows = torch.cat(asked)
        out = out.index_copy(1, rows, torch.cat(outs, dim=1))
        lse = lse.index_copy(1, rows, torch.cat(lses, dim=1))
    return out, lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; rows of -inf alone give 0 and -inf, and no NaN gradient."""
    peak = scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf)
    return weights / total, lse.squeeze(-1)
