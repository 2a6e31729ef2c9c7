"""The public functions: from q, k, v to out and gradients, and the story of why these kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..order import TokenOrder
from . import graph
from .arguments import Call, cast_like_autocast, unit_stride
from .decide import decide
from .dropout import Dropout
from .function import HilbertAttentionFunction

if TYPE_CHECKING:
    from .plan import Plan


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    queries: str = ...,
    head_offset: str | Tensor = ...,
    order: str | TokenOrder | Tensor | None = ...,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    padding: str = ...,
    mix_grad: str = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    queries: str = ...,
    head_offset: str | Tensor = ...,
    order: str | TokenOrder | Tensor | None = ...,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    padding: str = ...,
    mix_grad: str = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention (LongNet, arXiv 2307.02486): one softmax over the keys that all branches give a token.

    The sequence is cut into segments of w steps, and of each segment a head keeps every r-th step. Nothing has to
    divide anything. Any strides are read in place as long as the last dimension is contiguous; else it is copied once.
    Under `torch.autocast`, q, k and v are cast as in `scaled_dot_product_attention`.

    Args:
        q: Queries (B, N, H, D) in bf16, fp16, fp32 or fp64.
        k: Keys (B, N, G, D); G divides H, and query head h reads key/value head ⌊h·G/H⌋.
        v: Values (B, N, G, D).
        segment_lengths: w of each branch, in steps.
        dilation_rates: r of each branch.
        queries: "dilated": a head asks at the steps it keeps (LongNet); at a step that no branch keeps, out is 0.
            "all": every step asks, keys are thinned.
        head_offset: First step that head h keeps: "cyclic" h mod r, "blocked" ⌊h / ⌈H/r⌉⌋ (torchscale), "zero", or
            integers (branches, H) in [0, r), -1 for a head that takes no part in a branch.
        order: Sequence in which tokens are visited, before segments are cut: None, "snake", "hilbert", a `TokenOrder`,
            or a permutation (N,). Out comes back in token order.
        is_causal: Drop keys of later tokens, whatever the order.
        key_padding_mask: (B, N) bool, True = take part, as a key and as a query.
        dropout_p: Probability with which an attention weight is dropped.
        scale: Factor of the scores; None is D^-0.5.
        padding: "zeros" counts the rows that torchscale pads segments with as keys of score 0 and value 0.
        mix_grad: "exact", or "detached": the weights that mix the branches are constants in the backward.
        return_lse: Return the log of the softmax's denominator too.
        backend: None chooses; "triton", "torch" or "reference" (float64, slow, the definition).

    Returns:
        out (B, N, H, D); with `return_lse` also lse (B, H, N), natural logarithm, float32 (float64 for float64), -inf
        where a query has no key.

    Raises:
        ArgumentError, ArgumentTypeError, OrderError: An argument is wrong; the message says how to mend it.
        UnsupportedError: The backend refuses this problem, with every reason.
    """
    q, k, v = cast_like_autocast(q, k, v)
    if graph.is_traced(q):
        out, lse = graph.attend(
            q,
            k,
            v,
            segment_lengths,
            dilation_rates,
            backend=backend,
            queries=queries,
            head_offset=head_offset,
            order=order,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            scale=scale,
            padding=padding,
            mix_grad=mix_grad,
        )
        return (out, lse) if return_lse else out
    call, chosen = decide(
        q,
        k,
        v,
        segment_lengths,
        dilation_rates,
        backend=backend,
        queries=queries,
        head_offset=head_offset,
        order=order,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        scale=scale,
        padding=padding,
        mix_grad=mix_grad,
    )
    dropout = Dropout.draw(call.dropout_p, q.device) if call.dropout_p else None
    if chosen.backend == "reference":
        out, lse = _reference(q, k, v, call, dropout)
    else:
        q, k, v = unit_stride(q, k, v)
        rest = chosen, call.scale, call.offsets, dropout
        out, lse = HilbertAttentionFunction.apply(q, k, v, call.index, call.mask, rest)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    return_lse: bool = False,
    backend: str | None = None,
) -> Plan:
    """What `dilated_attention` would run for these arguments, and why; nothing is launched.

    Returns:
        The plan; `print` it for the whole story: kernels, configurations, the rung and evidence of each, and what was
        passed over.

    Raises:
        As `dilated_attention`.
    """
    del return_lse  # the kernels always write it
    q, k, v = cast_like_autocast(q, k, v)
    return decide(
        q,
        k,
        v,
        segment_lengths,
        dilation_rates,
        backend=backend,
        queries=queries,
        head_offset=head_offset,
        order=order,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        scale=scale,
        padding=padding,
        mix_grad=mix_grad,
    )[1]


def _reference(q: Tensor, k: Tensor, v: Tensor, call: Call, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    problem = call.problem
    out, lse = reference.dilated_attention(
        q,
        k,
        v,
        [segment for segment, _ in problem.branches],
        [rate for _, rate in problem.branches],
        queries=problem.queries,
        head_offset=problem.head_offset if call.offsets.table is None else call.offsets.table,
        order=None if call.index is None else call.index.long(),
        is_causal=problem.causal,
        key_padding_mask=call.mask,
        scale=call.scale,
        padding=problem.padding,
        mix_grad=problem.mix_grad,
        dropout_mask=None if dropout is None else partial(dropout.multipliers, problem),
    )
    return out.to(q.dtype), lse if q.dtype == torch.float64 else lse.float()
