"""Dilated attention: LongNet branches, Hilbert token orders and exact gradients on generated Triton kernels."""

__version__ = "0.1.0"
