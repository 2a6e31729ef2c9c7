"""cuDNN's attention in the place of our kernels, for calls that are plain attention on views of the segments.

Nobody shall be slower with this package than with what they would have written. The tuner times cuDNN beside our
kernels; where it was faster, a plan hands it the operation. It is handed the merged lse like any branch of ours, so
that either's backward goes with either's forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import BACKWARD, Problem
from . import launch
from .function import no_autocast

if TYPE_CHECKING:
    from .arguments import HeadOffsets
    from .dropout import Dropout
    from .plan import Plan


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
    """As `launch.forward`, by cuDNN where the plan hands it the forward."""
    if not plan.hands_over("fwd"):
        return launch.forward(plan, q, k, v, scale=scale, index=index, mask=mask, offsets=offsets, dropout=dropout)
    problem = plan.problem
    with no_autocast(q.device):
        out, lse = attend(_segments(problem, q), _segments(problem, k), _segments(problem, v), problem.causal, scale)
    rows = lse.reshape(problem.batch, -1, problem.heads, problem.segment(0))
    return _whole(problem, out), rows.transpose(1, 2).reshape(problem.batch, problem.heads, problem.length)


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
    """As `launch.backward`, by cuDNN where the plan hands it the backward; a gradient of lse is none of its inputs."""
    if not plan.hands_over(BACKWARD) or dlse is not None:
        sides: dict[str, Any] = {"index": index, "mask": mask, "offsets": offsets, "dropout": dropout}
        return launch.backward(plan, q, k, v, out, lse, dout, dlse, scale=scale, **sides)
    problem = plan.problem
    rows = lse.view(problem.batch, problem.heads, -1, problem.segment(0)).transpose(1, 2).flatten(0, 1).contiguous()
    saved = _segments(problem, q), _segments(problem, k), _segments(problem, v), _segments(problem, out), rows
    with no_autocast(q.device):
        dq, dk, dv = attend_backward(_segments(problem, dout), saved, problem.causal, scale)
    return _whole(problem, dq), _whole(problem, dk), _whole(problem, dv)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (segments, H, n, D): out likewise, and lse float32 (segments, H, n) or with a last axis of one."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = run(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse


def attend_backward(
    dout: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from these, out and lse (segments, H, n), whoever computed them."""
    q, k, v, out, lse = saved
    run = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
    rows = q.shape[2]
    found = run(
        dout, q, k, v, out, lse.unsqueeze(3), seed, seed, None, None, None, rows, rows, 0.0, causal, scale=scale
    )
    return found[0], found[1], found[2]


def _segments(problem: Problem, x: Tensor) -> Tensor:
    """(B, N, H, D) as (B·segments, H, n, D): a view, unless batch elements lie apart or columns have a stride."""
    cut = x.reshape(-1, problem.segment(0), *x.shape[2:])
    return (cut if cut.stride(3) == 1 else cut.contiguous()).transpose(1, 2)


def _whole(problem: Problem, x: Tensor) -> Tensor:
    """The way back, contiguous as our own results are."""
    return x.transpose(1, 2).reshape(problem.batch, problem.length, *x.shape[1:2], x.shape[3]).contiguous()
