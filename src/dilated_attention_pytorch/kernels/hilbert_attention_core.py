"""`HilbertAttentionCore`: self-attention within segments along a token order, with its projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..order import TokenOrder, as_order
from ..order import create_hilbert_mapping as create_hilbert_mapping
from ..runtime.api import dilated_attention
from ..runtime.function import HilbertAttentionFunction as HilbertAttentionFunction
from .settings import DilationRate, SegmentSize, branches, check_dropout, check_heads
from .vectorized import vectorized_attention

__all__ = [
    "HilbertAttentionCore",
    "HilbertAttentionFunction",
    "core_attention",
    "create_hilbert_mapping",
    "hilbert_attention_kernel",
    "standard_attention_kernel",
]

_kernel_attention = partial(dilated_attention, queries="all", head_offset="zero")


class HilbertAttentionCore(nn.Module):
    """Self-attention in which every token asks every r-th step of its segment, segments being cut along an order.

    Gradients flow in training and in evaluation, whatever the flags. Parameters: `qkv_proj.weight` (3·C, C), its rows
    laid out (q | k | v, heads, head_dim), and `out_proj.weight` (C, C); no biases, no buffers.

    Args:
        hidden_dim: C, a multiple of `num_heads`. The kernels take head dimensions C / num_heads that are multiples of
            8 up to 256; others run on the torch backend.
        num_heads: H.
        segment_size: w in steps: one, several (then several branches share one softmax), or "auto" (`auto_branches`).
        dilation_rate: r, one or several; a single value goes with every one of the other.
        dropout: Share of attention weights dropped in training.
        use_custom_backward: False computes in whole-tensor operations under PyTorch's own autograd
            (`vectorized_attention`): slow, for debugging.
        order: "snake", "hilbert", a `TokenOrder`, such as one with the grid of an image, or None for none.
        device, dtype: Of the parameters.

    Raises:
        ArgumentError, ArgumentTypeError: An argument is wrong; the message says how to mend it.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        segment_size: SegmentSize = 128,
        dilation_rate: DilationRate = 1,
        dropout: float = 0.0,
        use_custom_backward: bool = True,
        *,
        order: str | TokenOrder | None = "snake",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = check_heads(hidden_dim, num_heads)
        branches(1, segment_size, dilation_rate)
        self.segment_size = segment_size
        self.dilation_rate = dilation_rate
        self.dropout = check_dropout(dropout)
        self.use_custom_backward = use_custom_backward
        self.order = as_order(order)
        self.qkv_proj = nn.Linear(hidden_dim, 3 * hidden_dim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=False, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        use_hilbert: bool = True,
        *,
        segment_size: SegmentSize | None = None,
        dilation_rate: DilationRate | None = None,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Hidden states (..., N, C): (N, C), (B, N, C) or with more leading dimensions.
            use_hilbert: Cut segments along the order; False takes tokens as they stand.
            segment_size, dilation_rate: For this call, in place of the module's. "auto" brings its own dilation rates.
            is_causal: Drop keys of later tokens, whatever the order.
            key_padding_mask: (..., N) bool, True = take part.

        Returns:
            Hidden states shaped like x.

        Raises:
            ArgumentError, ArgumentTypeError, OrderError: An argument is wrong; the message says how to mend it.
        """
        if x.ndim < 2 or x.shape[-1] != self.hidden_dim:
            raise ArgumentError(f"x must have shape (..., N, {self.hidden_dim}), got {tuple(x.shape)}")
        if segment_size is None:
            segment_size = self.segment_size
        if dilation_rate is None:
            dilation_rate = 1 if segment_size == "auto" else self.dilation_rate
        batch, length = math.prod(x.shape[:-2]), x.shape[-2]
        lengths, rates = branches(length, segment_size, dilation_rate)
        q, k, v = self.qkv_proj(x).reshape(batch, length, 3, self.num_heads, self.head_dim).unbind(2)
        if key_padding_mask is not None:
            if key_padding_mask.shape != x.shape[:-1]:
                raise ArgumentError(
                    f"key_padding_mask must have shape {tuple(x.shape[:-1])} for x of shape {tuple(x.shape)}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            key_padding_mask = key_padding_mask.reshape(batch, length)
        out = core_attention(
            q,
            k,
            v,
            lengths,
            rates,
            order=self.order if use_hilbert else None,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            use_custom_backward=self.use_custom_backward,
        )
        attended: Tensor = self.out_proj(out.reshape(x.shape))
        return attended

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f"{self.hidden_dim}, num_heads={self.num_heads}, segment_size={self.segment_size!r}, "
            f"dilation_rate={self.dilation_rate!r}, dropout={self.dropout}, order={self.order!r}"
        )


def core_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    order: TokenOrder | None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    use_custom_backward: bool = True,
) -> Tensor:
    """What the client's classes compute: every token asks, heads keep each segment's first step and every r-th on.

    Args:
        q: (B, N, H, D).
        k, v: (B, N, G, D); G divides H.
        segment_lengths, dilation_rates, order, is_causal, key_padding_mask, dropout_p: As in `dilated_attention`.
        use_custom_backward: False is `vectorized_attention`.

    Returns:
        (B, N, H, D).
    """
    attend = _kernel_attention if use_custom_backward else vectorized_attention
    return attend(
        q,
        k,
        v,
        segment_lengths,
        dilation_rates,
        order=order,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
    )


@torch.no_grad()
def hilbert_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hilbert_map: Tensor,
    segment_size: int | Sequence[int],
    dilation_rate: int | Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Forward alone, along an order; for gradients see `HilbertAttentionCore` or `dilated_attention`.

    Args:
        q, k, v: (B, N, H, D).
        hilbert_map: The token at each step, integers (N,), such as `create_hilbert_mapping(N)`.
        segment_size: w in steps; of each branch.
        dilation_rate: r; of each branch.
        scale: Factor of the scores; None is D^-0.5.

    Returns:
        (B, N, H, D), in token order.

    Raises:
        As `dilated_attention`.
    """
    return _kernel_attention(q, k, v, segment_size, dilation_rate, order=hilbert_map, scale=scale)


@torch.no_grad()
def standard_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_size: int | Sequence[int],
    dilation_rate: int | Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """As `hilbert_attention_kernel`, tokens taken as they stand."""
    return _kernel_attention(q, k, v, segment_size, dilation_rate, scale=scale)
