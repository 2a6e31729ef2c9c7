"""`HilbertAttentionFunction`: what every differentiable call goes through. It saves, launches and returns."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UnsupportedError
from . import launch, ops, torch_backend
from .arguments import HeadOffsets, autocasts
from .dropout import Dropout
from .plan import Plan

BACKENDS: dict[str, Any] = {"triton": launch, "torch": torch_backend, "deferred": ops}
"""Each with `forward` and `backward` of the same signature; the plan says which."""


class HilbertAttentionFunction(torch.autograd.Function):
    """Dilated attention with its exact backward: `apply(q, k, v, plan, scale, index, mask, offsets, dropout)`.

    Between forward and backward it keeps q, k, v, out and lse, and no branch's output: with the merged lse, each
    branch is an ordinary flash-attention backward (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan | ops.Deferred,
        scale: float | None,
        index: Tensor | None,
        mask: Tensor | None,
        offsets: HeadOffsets | Tensor | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the plan's forward, out and lse; see `launch.forward` for shapes."""
        with no_autocast(q.device):
            out, lse = BACKENDS[plan.backend].forward(
                plan, q, k, v, scale=scale, index=index, mask=mask, offsets=offsets, dropout=dropout
            )
        ctx.save_for_backward(q, k, v, out, lse, index, mask)
        ctx.plan, ctx.scale, ctx.offsets, ctx.dropout = plan, scale, offsets, dropout
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v; a gradient of lse is taken in."""
        if dout is None and dlse is None:
            return (None,) * 9
        return (*_gradients(ctx, dout, dlse, *ctx.saved_tensors), *(None,) * 6)


@once_differentiable
def _gradients(
    ctx: Any,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. What was saved is an argument, so that torch sees a second derivative through q, k or v coming."""
    if dlse is not None and ctx.plan.mix_grad == "detached":
        raise UnsupportedError('mix_grad="detached" has no gradient of lse; detach lse, or use mix_grad="exact"')
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    with no_autocast(q.device):
        dq, dk, dv = BACKENDS[ctx.plan.backend].backward(
            ctx.plan,
            q,
            k,
            v,
            out,
            lse,
            dout,
            dlse,
            scale=ctx.scale,
            index=index,
            mask=mask,
            offsets=ctx.offsets,
            dropout=ctx.dropout,
        )
    return dq, dk, dv


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The inputs are cast once, before; autocast would also round the float32 that backends compute in."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
