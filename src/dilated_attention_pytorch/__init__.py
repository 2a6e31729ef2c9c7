"""Dilated attention: LongNet branches, Hilbert token orders and exact gradients on generated Triton kernels.

`dilated_attention` computes, `explain` tells what it would run and why, `options` steers the choice, and `TokenOrder`
lays tokens along a curve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import LaunchConfig as LaunchConfig
from .errors import DilatedAttentionError as DilatedAttentionError
from .modules import DilatedAttention as DilatedAttention
from .modules import MultiheadDilatedAttention as MultiheadDilatedAttention
from .order import TokenOrder as TokenOrder
from .order import create_hilbert_mapping as create_hilbert_mapping
from .runtime.api import dilated_attention as dilated_attention
from .runtime.api import explain as explain
from .runtime.digest import db_digest as db_digest
from .runtime.options import options as options

if TYPE_CHECKING:
    from . import distributed as distributed

__version__ = "0.1.0"

__all__ = [
    "DilatedAttention",
    "DilatedAttentionError",
    "LaunchConfig",
    "MultiheadDilatedAttention",
    "TokenOrder",
    "create_hilbert_mapping",
    "db_digest",
    "dilated_attention",
    "distributed",
    "explain",
    "options",
]


def __getattr__(name: str) -> Any:
    """`distributed` is imported when it is first asked for."""
    if name == "distributed":
        from importlib import import_module

        return import_module(".distributed", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
