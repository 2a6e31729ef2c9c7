"""Modules: attention, and attention with its projections."""

from .attention import DilatedAttention as DilatedAttention
from .multihead import MultiheadDilatedAttention as MultiheadDilatedAttention

__all__ = ["DilatedAttention", "MultiheadDilatedAttention"]
