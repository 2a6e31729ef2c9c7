"""A sequence laid out over ranks: every rank a contiguous run of steps, in the order in which tokens are visited."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, DilatedAttentionError
from ..order import TokenOrder, as_order
from .agreement import Group, agree, as_group, waiting
from .layout import Shards


def shard(
    x: Tensor,
    order: str | TokenOrder | Tensor | None = None,
    group: Group = None,
    *,
    dim: int = 1,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """This rank's steps of a sequence that every rank holds whole. Nothing is sent.

    With an order, the steps of a rank are a stretch of its curve: put tokens so once, at the start of a model, and
    hand the same order to each attention.

    Args:
        x: The sequence, the same on all ranks: tokens along `dim`.
        order: As in `dilated_attention`.
        group: Ranks that share the sequence, as in `dilated_attention`.
        dim: The dimension of tokens.
        lengths: Steps of each rank, adding up to N; None deals them out evenly, the first ranks one more.

    Returns:
        x's tokens at this rank's steps, a tensor of its own.

    Raises:
        ArgumentError, ArgumentTypeError, OrderError: x is no tensor, or `dim`, `lengths` or the order does not fit it.
    """
    ranks = as_group(group)
    dim = _dim(x, dim)
    length, size = x.shape[dim], ranks.size()
    if lengths is None:
        lengths = [length // size + (rank < length % size) for rank in range(size)]
    if len(lengths) != size or min(lengths) < 0 or sum(lengths) != length:
        raise ArgumentError(
            f"lengths must be {size} numbers of steps, one a rank, that add up to {length}, got {list(lengths)}"
        )
    shards = Shards.of(lengths, ranks.rank())
    token_order = as_order(order)
    if token_order is None:
        return x.narrow(dim, shards.start, shards.stop - shards.start).clone()
    return x.index_select(dim, token_order.index(length, x.device)[shards.start : shards.stop])


def unshard(x: Tensor, order: str | TokenOrder | Tensor | None = None, group: Group = None, *, dim: int = 1) -> Tensor:
    """The whole sequence in token order, on every rank, from each rank's steps.

    The gradient of a step is the sum of what all ranks make of it, as of torch's own collectives: where every rank
    computes the same loss from the result, divide that by the number of ranks.

    Args:
        x: This rank's steps along `dim`.
        order: The one the steps were dealt in.
        group: As in `dilated_attention`.
        dim: The dimension of steps.

    Raises:
        OrderError: The order does not fit the sequence.
        DisagreementError: The ranks' tensors differ in more than their steps, or a rank refuses its arguments.
        LostRankError: A rank is gone.
    """
    # As `dilated_attention`, it stays out of torch.compile's graphs.
    collect = torch.compiler.disable(_unshard) if torch.compiler.is_compiling() else _unshard  # type: ignore[no-untyped-call]
    whole: Tensor = collect(x, order, group, dim)
    return whole


def _unshard(x: Tensor, order: str | TokenOrder | Tensor | None, group: Group, dim: int) -> Tensor:
    ranks = as_group(group)
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    token_order, refusal, length = None, None, 0
    facts: dict[str, str] = {}
    try:
        dim = _dim(x, dim)
        length = x.shape[dim]
        token_order = as_order(order)
        facts = {
            "the call": "unshard",
            "the shape beside steps": str([size for place, size in enumerate(x.shape) if place != dim]),
            "the kind of device": device.type,
            "dtype": str(x.dtype),
            "dim": str(dim),
            "order": identity(token_order),
            "whether gradients are recorded": str(torch.is_grad_enabled() and x.requires_grad),
        }
    except DilatedAttentionError as error:
        refusal = error
    shards = Shards.of(agree(ranks, device, facts, length, refusal), ranks.rank())
    steps: Tensor = _Gather.apply(x.movedim(dim, 0), shards, ranks).movedim(0, dim)  # type: ignore[no-untyped-call]
    if token_order is None:
        return steps
    return steps.index_select(dim, token_order.inverse(shards.length).to(x.device))


def _dim(x: Tensor, dim: int) -> int:
    """The dimension of steps, counted from the first one.

    Raises:
        ArgumentError, ArgumentTypeError: x has no such dimension, or is no tensor.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"x must be a tensor, got {type(x).__name__}")
    if not isinstance(dim, int):
        raise ArgumentTypeError(f"dim must be an integer, got {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise ArgumentError(f"dim must be one of x's {x.ndim} dimensions, got {dim}")
    return dim % x.ndim


class _Gather(torch.autograd.Function):
    """Steps (n, …) of all ranks, one behind the other. Runs of unequal length travel padded to the longest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, group: dist.ProcessGroup) -> Tensor:
        """(N, …) of all ranks."""
        ctx.shards, ctx.group = shards, group
        lengths = _lengths(shards)
        padded = _padded(x, max(lengths))
        parts = [torch.empty_like(padded) for _ in lengths]
        with waiting(group, "the other ranks' steps"):
            dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of this rank's steps, summed over ranks."""
        lengths = _lengths(ctx.shards)
        parts = [_padded(part, max(lengths)) for part in torch.split(gradient, lengths)]
        own = torch.empty_like(parts[0])
        with waiting(ctx.group, "the other ranks' gradients"):
            dist.reduce_scatter(own, parts, group=ctx.group)
        return own[: lengths[ctx.shards.rank]], None, None


def _padded(x: Tensor, length: int) -> Tensor:
    padded = x.new_zeros((length, *x.shape[1:]))
    padded[: len(x)] = x
    return padded


def _lengths(shards: Shards) -> list[int]:
    return [stop - start for start, stop in zip(shards.cuts[:-1], shards.cuts[1:], strict=True)]


@lru_cache(maxsize=256)
def identity(order: TokenOrder | None) -> str:
    """An order in words, the same for the same order alone."""
    if order is None or order.permutation is None:
        return repr(order)
    tokens = order.permutation.contiguous()
    digest = hashlib.sha256(ctypes.string_at(tokens.data_ptr(), tokens.nbytes)).hexdigest()[:12]
    return f"{order!r} with digest {digest}"
