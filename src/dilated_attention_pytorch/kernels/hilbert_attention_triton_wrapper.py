"""`HilbertAttentionTritonWrapper`: the attention of `HilbertAttentionCore` for q, k and v of the caller's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..order import TokenOrder, as_order
from .hilbert_attention_core import core_attention
from .settings import branches, check_dropout, check_q


class HilbertAttentionTritonWrapper(nn.Module):
    """Attention of q over k and v in one or several branches, along an order. It has no parameters.

    Args:
        segment_lengths: w of each branch, in steps.
        dilation_rates: r of each branch.
        dropout: Share of attention weights dropped in training.
        num_heads: H.
        head_dim: D. The kernels take multiples of 8 up to 256; others run on the torch backend.
        order: "snake", "hilbert", a `TokenOrder`, or None for none.

    Raises:
        ArgumentError, ArgumentTypeError: An argument is wrong; the message says how to mend it.
    """

    def __init__(
        self,
        segment_lengths: int | Sequence[int],
        dilation_rates: int | Sequence[int],
        dropout: float = 0.0,
        num_heads: int = 8,
        head_dim: int = 64,
        *,
        order: str | TokenOrder | None = "snake",
    ) -> None:
        super().__init__()
        self.segment_lengths, self.dilation_rates = branches(1, segment_lengths, dilation_rates)
        self.dropout = check_dropout(dropout)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.order = as_order(order)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q: (B, N, H, D).
            k, v: (B, N, G, D); G divides H.
            is_causal: Drop keys of later tokens, whatever the order.
            key_padding_mask: (B, N) bool, True = take part.

        Returns:
            (B, N, H, D).

        Raises:
            ArgumentError, ArgumentTypeError: An argument is wrong; the message says how to mend it.
        """
        check_q(q, self.num_heads, self.head_dim)
        return core_attention(
            q,
            k,
            v,
            self.segment_lengths,
            self.dilation_rates,
            order=self.order,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f"{self.segment_lengths}, {self.dilation_rates}, dropout={self.dropout}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, order={self.order!r}"
        )


HilbertAttentionTritonFixed = HilbertAttentionTritonWrapper
"""The name that users of the client's earlier releases import."""
