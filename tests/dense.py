"""A second formulation, written differently from the oracle: one dense softmax with integer multiplicities.

How often query token i of head h meets key token j is index arithmetic on (i, j, h); segments are never formed. The
gradients are the closed formulas of the contract, not autograd. It runs in the dtype of its inputs, so it also tells
what rounding alone costs in bf16 or fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.config import head_offsets

from .tolerances import Results


def meetings(
    length: int,
    heads: int,
    segment_length: int,
    rate: int,
    offsets: Sequence[int],
    *,
    queries: str,
    order: Tensor | None,
    is_causal: bool,
    padding: str,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Key multiplicities (B or 1, H, N, N) and phantom counts (B or 1, H, N) of one branch, in token order."""
    w = min(segment_length, length)
    token = torch.arange(length)
    step = token if order is None else torch.argsort(order.cpu())
    offset = torch.tensor(offsets).view(heads, 1)
    kept = (step % w) % rate == offset  # [H, N]; an absent head's -1 equals no remainder
    asks = kept if queries == "dilated" else (offset >= 0).expand(heads, length)
    same_segment = (step // w).view(-1, 1) == (step // w).view(1, -1)
    met = (asks.unsqueeze(2) & kept.unsqueeze(1) & same_segment).unsqueeze(0)
    phantoms = torch.zeros(1, heads, length, dtype=torch.int64)
    if padding == "zeros" and not is_causal:
        phantoms = ((w + rate - 1) // rate - met.sum(-1)) * asks
    if is_causal:
        met = met & (token.view(1, -1) <= token.view(-1, 1))
    if key_padding_mask is not None:
        alive = key_padding_mask.cpu()
        met = met & alive[:, None, :, None] & alive[:, None, None, :]
        phantoms = phantoms * alive[:, None, :]
    return met.long(), phantoms


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    dout: Tensor,
    dlse: Tensor | None = None,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    dropout_mask: Callable[[int], Tensor] | None = None,
) -> Results:
    """out, lse and, for the incoming dout and dlse, all gradients; arguments as in `reference.dilated_attention`."""
    _, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    repeats = heads // k.shape[2]
    queries_, douts = q.transpose(1, 2), dout.transpose(1, 2)  # [B, H, N, D]
    keys, values = (x.repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (k, v))
    scores = scale * (queries_ @ keys.transpose(2, 3))

    counts, phantoms = [], []
    for branch, (segment_length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        rule = head_offset
        offsets = head_offsets(rule, heads, rate) if isinstance(rule, str) else rule[branch].tolist()
        count, phantom = meetings(
            length,
            heads,
            segment_length,
            rate,
            offsets,
            queries=queries,
            order=order,
            is_causal=is_causal,
            padding=padding,
            key_padding_mask=key_padding_mask,
        )
        counts.append(count)
        phantoms.append(phantom)

    real = scores + torch.stack(torch.broadcast_tensors(*counts)).sum(0).to(scores).log()
    unreal = torch.stack(torch.broadcast_tensors(*phantoms)).sum(0).to(scores).log().expand(scores.shape[:3])
    lse = torch.logsumexp(torch.cat([real, unreal.unsqueeze(3)], dim=3), dim=3)  # [B, H, N]
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - finite_lse.unsqueeze(3))

    shares = []  # of each branch: probabilities (P), dropped probabilities, output
    for branch, count in enumerate(counts):
        p = torch.where(count.to(q.device) > 0, weights * count.to(scores), 0.0)
        kept = 1.0 if dropout_mask is None else dropout_mask(branch).to(scores)
        shares.append((p, kept, (p * kept) @ values))
    out = torch.stack([share[2] for share in shares]).sum(0)

    dq, dk, dv = (torch.zeros_like(x) for x in (queries_, keys, values))
    dp = douts @ values.transpose(2, 3)
    for branch, (p, kept, output) in enumerate(shares):
        if mix_grad == "exact":
            shift = (douts * out).sum(3, keepdim=True)
            if dlse is not None:
                shift = shift - dlse.to(scores).unsqueeze(3)
        else:
            # `output` is exp(lse_b - lse) O_b; the contract's delta_b wants O_b itself.
            mass = p.sum(3, keepdim=True) + (phantoms[branch].to(scores) * torch.exp(-finite_lse)).unsqueeze(3)
            shift = (douts * output).sum(3, keepdim=True) / mass.masked_fill(mass == 0, 1.0)
        ds = p * (kept * dp - shift)
        dv += (p * kept).transpose(2, 3) @ douts
        dq += scale * (ds @ keys)
        dk += scale * (ds.transpose(2, 3) @ queries_)
    grouped = (-1, k.shape[2], repeats, length, head_dim)
    dk, dv = (x.reshape(grouped).sum(2) if x.numel() else x[:, : k.shape[2]] for x in (dk, dv))
    return Results(out.transpose(1, 2), lse, dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))
