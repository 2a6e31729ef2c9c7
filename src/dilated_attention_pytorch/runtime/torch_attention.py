"""Dense attention with its lse, and its backward from a given lse: torch's own kernels, or chunked matrix products.

All tensors are (X, heads, rows, D), X being (batch, segment) pairs; lse is (X, heads, rows). Results are float32, or
float64 for float64 inputs. The backward takes `out` and `lse` of the whole softmax, of which this attention may be
one part: P = exp(S - lse) and delta = rowsum(dout · out) are all that it derives from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arguments import unit_stride
from .dropout import Dropout

SCORES = 1 << 22
"""Scores that the chunked products hold at a time; a single row of queries may hold more."""

FAR = -1e30
"""Score of a masked key: finite, because torch's kernels multiply it, and below any score that inputs can reach."""


@dataclass(frozen=True)
class Drops:
    """Which pairs dropout drops: of an attention (X, heads, rows), or still of a whole branch (B, N, heads).

    Attributes:
        dropout: Decides from what follows.
        queries: Bits of the queries, two tensors.
        keys: Bits of the key tokens.
    """

    dropout: Dropout
    queries: tuple[Tensor, Tensor]
    keys: Tensor

    def masked(self, x: Tensor, rows: slice) -> Tensor:
        """x (X, heads, chunk, Lk) times 1/(1-p) where a pair is kept and 0 where it is dropped."""
        first, second = (bits[:, :, rows].unsqueeze(3) for bits in self.queries)
        kept = self.dropout.kept(first, second, self.keys.unsqueeze(2))
        return (x * self.dropout.kept_scale).masked_fill_(kept.logical_not_(), 0.0)


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees.

    Attributes:
        causal: Key row j ≤ query row i.
        tokens: Query tokens (X, heads, Lq) and key tokens (X, heads, Lk): key token ≤ query token.
        keys: (X, heads, Lk) bool, True = may be seen.
        drops: Pairs that count in the softmax and then are dropped.
    """

    causal: bool = False
    tokens: tuple[Tensor, Tensor] | None = None
    keys: Tensor | None = None
    drops: Drops | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, see: Visibility) -> tuple[Tensor, Tensor]:
    """out and lse; 0 and -inf for a query that sees no key."""
    q, k, v = upcast(q), upcast(k), upcast(v)
    if not has_kernel(q, see):
        return _chunked(q, k, v, scale, see)
    if see.keys is None:
        return _kernel(q, k, v, scale, see.causal)
    # One more column adds a bias to the scores, which torch's kernels take together with causal in no other way.
    q, k, v = pad(q * scale, (0, 1), value=1.0), _append(k, _bias(k, see)), pad(v, (0, 1))
    out, lse = _kernel(q, k, v, 1.0, see.causal)
    keyless = lse < FAR / 2
    return out[..., :-1].masked_fill(keyless.unsqueeze(3), 0.0), lse.masked_fill(keyless, -torch.inf)


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    see: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; lse = +inf marks a query that sees no key."""
    q, k, v, out, dout = (upcast(x) for x in (q, k, v, out, dout))
    if not has_kernel(q, see):
        return _chunked_backward(q, k, v, out, lse, dout, dlse, scale, see)
    if see.keys is None and dlse is None:
        return _kernel_backward(q, k, v, out, lse, dout, scale, see.causal)
    # The column of `attend`; in v and dout it adds dlse to dout·v, and out's zero keeps it from delta.
    dout = pad(dout, (0, 1)) if dlse is None else _append(dout, dlse)
    dq, dk, dv = _kernel_backward(
        pad(q * scale, (0, 1), value=1.0),
        _append(k, _bias(k, see)),
        pad(v, (0, 1), value=1.0),
        pad(out, (0, 1)),
        lse,
        dout,
        1.0,
        see.causal,
    )
    return dq[..., :-1] * scale, dk[..., :-1], dv[..., :-1]


def has_kernel(q: Tensor, see: Visibility) -> bool:
    """Torch has a kernel that returns lse and whose backward takes it."""
    return q.device.type == "cpu" and see.tokens is None and see.drops is None


def upcast(x: Tensor) -> Tensor:
    """float32 for 16-bit rows: torch's CPU kernel adds up gradients in the dtype of its inputs, and is slower there."""
    return x if x.dtype == torch.float64 else x.float()


def _bias(k: Tensor, see: Visibility) -> Tensor:
    """What is added to the scores of each key, (X, heads, Lk)."""
    return torch.zeros_like(k[..., 0]) if see.keys is None else torch.where(see.keys, 0.0, FAR)


def _append(x: Tensor, column: Tensor) -> Tensor:
    return torch.cat([x, column.to(x.dtype).unsqueeze(3)], dim=3)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch multiplies -inf of a later key by the scale: by one that is not positive, it makes inf or NaN of it."""
    # Torch's pad and cat may put a column beside rows of a single element in another layout; its kernels do not look.
    q, k, v = unit_stride(q, k, v)
    if causal and scale <= 0.0:
        q, scale = q * scale, 1.0
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _kernel_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, dout = unit_stride(q, k, v, out, dout)
    if causal and scale <= 0.0:
        dq, dk, dv = _kernel_backward(q * scale, k, v, out, lse, dout, 1.0, causal)
        return dq * scale, dk, dv
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _chunked(q: Tensor, k: Tensor, v: Tensor, scale: float, see: Visibility) -> tuple[Tensor, Tensor]:
    """`attend` in plain matrix products, some rows of queries at a time."""
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for rows in _chunks(q, k):
        scores = _scores(q, k, scale, see, rows)
        peak = scores.amax(dim=3, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(dim=3, keepdim=True)
        lse[:, :, rows] = (peak + total.log()).squeeze(3)
        if see.drops is not None:
            weights = see.drops.masked(weights, rows)
        out[:, :, rows] = (weights @ v).div_(total.masked_fill_(total == 0, 1.0))
    return out, lse


def _chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    see: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in plain matrix products, some rows of queries at a time."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _chunks(q, k):
        p = _scores(q, k, scale, see, rows).sub_(lse[:, :, rows].unsqueeze(3)).exp_()
        douts = dout[:, :, rows]
        shift = (douts * out[:, :, rows]).sum(dim=3)  # delta - dlse
        if dlse is not None:
            shift -= dlse[:, :, rows]
        dp = douts @ v.transpose(2, 3)
        kept = p
        if see.drops is not None:
            dp, kept = see.drops.masked(dp, rows), see.drops.masked(p, rows)
        ds = dp.sub_(shift.unsqueeze(3)).mul_(p).mul_(scale)
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(2, 3) @ q[:, :, rows]
        dv += kept.transpose(2, 3) @ douts
    return dq, dk, dv


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the query rows, so many that no more than `SCORES` scores exist at a time."""
    size = max(SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    return [slice(first, first + size) for first in range(0, q.shape[2], size)]


def _scores(q: Tensor, k: Tensor, scale: float, see: Visibility, rows: slice) -> Tensor:
    """scale·q·k (X, heads, chunk, Lk), -inf where a key is not seen."""
    scores = (q[:, :, rows] * scale) @ k.transpose(2, 3)
    if see.causal:
        first = torch.arange(q.shape[2], device=q.device)[rows].unsqueeze(1)
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > first, -torch.inf)
    if see.tokens is not None:
        asking, keeping = see.tokens
        scores.masked_fill_(keeping.unsqueeze(2) > asking[:, :, rows].unsqueeze(3), -torch.inf)
    if see.keys is not None:
        scores.masked_fill_(~see.keys.unsqueeze(2), -torch.inf)
    return scores
