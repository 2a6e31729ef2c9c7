"""`HilbertAttentionFunction`: what every differentiable call goes through. It saves, launches and returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, torch_backend
from .arguments import HeadOffsets
from .plan import Plan

BACKENDS = {"triton": launch, "torch": torch_backend}
"""Each with `forward` and `backward` of the same signature; the plan says which."""


class HilbertAttentionFunction(torch.autograd.Function):
    """Dilated attention with its exact backward: `apply(q, k, v, plan, scale, index, mask, offsets) -> out, lse`.

    Between forward and backward it keeps q, k, v, out and lse, and no branch's output: with the merged lse, each
    branch is an ordinary flash-attention backward (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        scale: float,
        index: Tensor | None,
        mask: Tensor | None,
        offsets: HeadOffsets,
    ) -> tuple[Tensor, Tensor]:
        """Run the plan's forward; see `launch.forward` for shapes."""
        out, lse = BACKENDS[plan.backend].forward(
            plan, q, k, v, scale=scale, index=index, mask=mask, offsets=offsets
        )
        ctx.save_for_backward(q, k, v, out, lse, index, mask)
        ctx.plan, ctx.scale, ctx.offsets = plan, scale, offsets
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of q, k and v; a gradient of lse is taken in."""
        q, k, v, out, lse, index, mask = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        gradients = BACKENDS[ctx.plan.backend].backward(
            ctx.plan, q, k, v, out, lse, dout, dlse, scale=ctx.scale, index=index, mask=mask, offsets=ctx.offsets
        )
        return (*gradients, None, None, None, None, None)


