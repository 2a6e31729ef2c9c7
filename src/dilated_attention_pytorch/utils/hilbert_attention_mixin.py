"""`HilbertAttentionMixin`: token orders and segment attention for an attention class that has its own projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ArgumentTypeError, DilatedAttentionError
from ..kernels.hilbert_attention_core import core_attention
from ..kernels.settings import DilationRate, SegmentSize, branches, check_dropout, check_heads, check_q
from ..kernels.steps import steps_to_tokens
from ..order import TokenOrder, as_order


class HilbertAttentionMixin:
    """A second base, on either side of `nn.Module`. It adds no parameters, buffers or submodules.

    A class calls `setup_hilbert_attention` in its `__init__` and `compute_hilbert_attention` in its `forward`. With
    `use_hilbert_core=False` its own method `_compute_attention(q, k, v)`, where it has one, attends to what this class
    has put in order.
    """

    training: bool
    _hilbert: _Settings | None = None

    def setup_hilbert_attention(
        self,
        hidden_dim: int,
        num_heads: int,
        segment_size: SegmentSize = 128,
        dilation_rate: DilationRate = 1,
        dropout: float = 0.0,
        use_hilbert_core: bool = False,
        use_custom_backward: bool = True,
        *,
        order: str | TokenOrder = "snake",
    ) -> None:
        """Settle what `compute_hilbert_attention` does.

        Args:
            hidden_dim: H·D, over all heads.
            num_heads: H.
            segment_size: w in steps: one, several, or "auto"; for the core alone, like `dilation_rate`.
            dilation_rate: r, one or several.
            dropout: Share of attention weights dropped in training. A `_compute_attention` of the class's own decides
                that for itself.
            use_hilbert_core: True: attention within segments, as in `HilbertAttentionCore`. False: q, k and v are put
                in order, the class attends to them, and the order is undone.
            use_custom_backward: As in `HilbertAttentionCore`.
            order: "snake", "hilbert" or a `TokenOrder`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument is wrong; the message says how to mend it.
        """
        branches(1, segment_size, dilation_rate)
        curve = as_order(order)
        if curve is None:
            raise ArgumentTypeError(
                "order must be 'snake', 'hilbert' or a TokenOrder, got None: compute_hilbert_attention takes tokens as "
                "they stand with use_hilbert_ordering=False"
            )
        self._hilbert = _Settings(
            num_heads=num_heads,
            head_dim=check_heads(hidden_dim, num_heads),
            segment_size=segment_size,
            dilation_rate=dilation_rate,
            dropout=check_dropout(dropout),
            use_hilbert_core=use_hilbert_core,
            use_custom_backward=use_custom_backward,
            order=curve,
        )

    def compute_hilbert_attention(self, q: Tensor, k: Tensor, v: Tensor, use_hilbert_ordering: bool = True) -> Tensor:
        """Attend.

        Args:
            q: (B, N, H, D).
            k, v: (B, N, G, D); G divides H.
            use_hilbert_ordering: False takes tokens as they stand.

        Returns:
            (B, N, H, D), in token order.

        Raises:
            ArgumentError, ArgumentTypeError, OrderError: An argument is wrong; the message says how to mend it.
        """
        settings = self._settings()
        check_q(q, settings.num_heads, settings.head_dim)
        if settings.use_hilbert_core:
            return core_attention(
                q,
                k,
                v,
                *branches(q.shape[1], settings.segment_size, settings.dilation_rate),
                order=settings.order if use_hilbert_ordering else None,
                dropout_p=settings.dropout if self.training else 0.0,
                use_custom_backward=settings.use_custom_backward,
            )
        # Looked up and not inherited: as a first base, a method here would hide that of the class's other bases.
        attend = getattr(self, "_compute_attention", self._dense_attention)
        if not use_hilbert_ordering:
            return attend(q, k, v)
        out = attend(*(self.apply_hilbert_ordering(x) for x in (q, k, v)))
        return self.apply_hilbert_ordering(out, inverse=True)

    def get_hilbert_indices(self, n: int, device: torch.device | str) -> Tensor:
        """int64 (N,) on the device: the token at each step. The tensor is the caller's own."""
        return steps_to_tokens(self._settings().order, n, torch.device(device))

    def get_inverse_hilbert_indices(self, n: int, device: torch.device | str) -> Tensor:
        """int64 (N,) on the device: the step at which each token is visited. The tensor is the caller's own."""
        tokens = self.get_hilbert_indices(n, device)
        return torch.empty_like(tokens).scatter_(0, tokens, torch.arange(n, device=tokens.device))

    def apply_hilbert_ordering(self, t: Tensor, inverse: bool = False, dim: int = 1) -> Tensor:
        """A copy of t with dimension `dim` in order, tokens to steps; `inverse` leads from steps back to tokens."""
        find = self.get_inverse_hilbert_indices if inverse else self.get_hilbert_indices
        return t.index_select(dim, find(t.shape[dim], t.device))

    def _dense_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a class without a `_compute_attention` of its own gets: (B, N, H, D) in and out."""
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self._settings().dropout if self.training else 0.0,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return out.transpose(1, 2)

    def _settings(self) -> _Settings:
        if self._hilbert is None:
            raise DilatedAttentionError(
                f"{type(self).__name__} has no Hilbert attention yet: call self.setup_hilbert_attention(hidden_dim=…, "
                "num_heads=…) in its __init__"
            )
        return self._hilbert


class _Settings(NamedTuple):
    """What `setup_hilbert_attention` was told."""

    num_heads: int
    head_dim: int
    segment_size: SegmentSize
    dilation_rate: DilationRate
    dropout: float
    use_hilbert_core: bool
    use_custom_backward: bool
    order: TokenOrder
