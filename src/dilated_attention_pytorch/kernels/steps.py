"""A token order as an index tensor, also in a traced call, where its cache cannot be looked into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..order import TokenOrder


def steps_to_tokens(order: TokenOrder, length: int, device: torch.device) -> Tensor:
    """int64 (N,) on a device: the token at each step. The tensor is the caller's own.

    Raises:
        OrderError: The order does not fit a sequence of this length.
    """
    if not torch.compiler.is_compiling():
        with torch.inference_mode(False):  # a caller may keep it for a backward
            return order.index(length, device).long()
    if order.permutation is not None:
        return order.permutation.to(device, torch.int64)
    tokens: Tensor = _traced(order.kind, order.grid, order.prefix, length, device)
    return tokens


@torch.library.custom_op(
    "dilated_attention_pytorch::steps_to_tokens",
    mutates_args=(),
    schema="(str kind, SymInt[]? grid, SymInt prefix, SymInt length, Device device) -> Tensor",
)
def _traced(kind: str, grid: Sequence[int] | None, prefix: int, length: int, device: torch.device) -> Tensor:
    return TokenOrder(kind, None if grid is None else tuple(grid), prefix).index(length, device).long()


@_traced.register_fake
def _(kind: str, grid: Sequence[int] | None, prefix: int, length: int, device: torch.device) -> Tensor:
    return torch.empty(length, dtype=torch.int64, device=device)
