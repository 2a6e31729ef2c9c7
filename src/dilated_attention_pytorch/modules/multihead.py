"""Multi-head dilated attention with its projections, laid out like the package of the same name (docs/peers.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .attention import DilatedAttention

if TYPE_CHECKING:
    from ..distributed.agreement import Group


class MultiheadDilatedAttention(nn.Module):
    """Projections, dilated attention, MAGNETO's inner layer norm (arXiv 2210.06423), and the output projection.

    Args:
        embed_dim: Width of queries, keys, values and output.
        num_heads: H; divides embed_dim.
        dilation_rates: r of each branch.
        segment_lengths: w of each branch, in tokens.
        dropout: Probability with which an attention weight is dropped, in training alone.
        bias: The four projections have a bias.
        layer_norm: Normalise the heads' outputs before the output projection.
        layer_norm_eps: Its epsilon.
        gamma_init: Gain of the Xavier initialisation of value and output projection (MAGNETO, figure 2).
        device: Where the parameters lie.
        dtype: Their type.
        group: Ranks that share each sequence, as for `DilatedAttention`.

    Raises:
        ArgumentError: num_heads does not divide embed_dim, or branches are not given in pairs.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ArgumentError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.num_heads = num_heads
        self.gamma_init = gamma_init

        def linear() -> nn.Linear:
            return nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
        self.attention = DilatedAttention(segment_lengths, dilation_rates, attention_dropout=dropout, group=group)
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps, device=device, dtype=dtype) if layer_norm else None
        self.out_proj = linear()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights, with gain `gamma_init` in value and output projection; biases 0."""
        for projection, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            nn.init.xavier_normal_(projection.weight, gain=gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (B, N, embed_dim).
            key: (B, N, embed_dim).
            value: (B, N, embed_dim).
            is_causal: Drop keys of later tokens.

        Returns:
            The output (B, N, embed_dim), and None where `torch.nn.MultiheadAttention` has weights.

        Raises:
            ArgumentError, UnsupportedError: As `dilated_attention`.
        """
        heads = (self.num_heads, -1)
        q = self.q_proj(query).unflatten(-1, heads)
        k = self.k_proj(key).unflatten(-1, heads)
        v = self.v_proj(value).unflatten(-1, heads)
        x = self.attention(q, k, v, is_causal=is_causal).flatten(-2)
        if self.norm is not None:
            x = self.norm(x)
        return self.out_proj(x), None
