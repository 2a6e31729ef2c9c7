"""Help for attention classes of one's own."""

from .hilbert_attention_mixin import HilbertAttentionMixin as HilbertAttentionMixin

__all__ = ["HilbertAttentionMixin"]
