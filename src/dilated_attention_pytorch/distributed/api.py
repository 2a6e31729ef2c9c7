"""Dilated attention of a sequence that several ranks hold: the public function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DilatedAttentionError, UnsupportedError
from ..order import TokenOrder, as_order
from ..runtime import options as option_values
from ..runtime.arguments import Call, cast_like_autocast, resolve, without_excess
from ..runtime.digest import db_digest
from ..runtime.dropout import Dropout
from .agreement import Group, agree, as_group, waiting
from .function import ShardedAttention, plan_parts
from .layout import Shards
from .parts import Share
from .sequence import identity


@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    group: Group = ...,
    queries: str = ...,
    head_offset: str | Tensor = ...,
    order: str | TokenOrder | Tensor | None = ...,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    padding: str = ...,
    mix_grad: str = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    group: Group = ...,
    queries: str = ...,
    head_offset: str | Tensor = ...,
    order: str | TokenOrder | Tensor | None = ...,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    scale: float | None = ...,
    padding: str = ...,
    mix_grad: str = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    group: Group = None,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dilated_attention` of a sequence whose steps are dealt to the ranks of a group.

    Rank i holds the steps behind those of rank i-1, as many as it likes; `shard` deals them out. All ranks make the
    same call, and all of them take part in its backward. Segments that lie inside a rank are computed there; of those
    that cross ranks, the kept keys and values travel, point to point among the segment's ranks. The results are those
    of one device that holds everything.

    Args:
        q: This rank's queries (B, n, H, D), in the sequence of steps.
        k: Its keys (B, n, G, D).
        v: Its values (B, n, G, D).
        segment_lengths: As in `dilated_attention` of one device, in steps of the whole sequence; so are the others.
        dilation_rates: As there.
        group: A process group, a `DeviceMesh` of one dimension, (mesh, dimension), or None for all ranks.
        queries: As there.
        head_offset: As there.
        order: The order that the steps are in, of the whole sequence: tokens decide what is causal and what dropout
            drops.
        is_causal: As there: by token, across ranks.
        key_padding_mask: This rank's (B, n) bool, True = take part.
        dropout_p: As there; the mask is that of one device, with the seed that the group's first rank draws.
        scale: As there.
        padding: As there.
        mix_grad: As there.
        return_lse: As there.
        backend: "triton" or "torch", or None to choose.

    Returns:
        out (B, n, H, D) of this rank's steps; with `return_lse` also lse (B, H, n).

    Raises:
        DisagreementError: The ranks do not make the same call, or one of them refuses its arguments or what they come
            to on it: the same message on all of them.
        LostRankError: A rank did not come within the group's timeout, or has ended.
        ArgumentError, ArgumentTypeError: `group` is none.
    """
    words: dict[str, Any] = {
        "queries": queries,
        "head_offset": head_offset,
        "is_causal": is_causal,
        "key_padding_mask": key_padding_mask,
        "dropout_p": dropout_p,
        "scale": scale,
        "padding": padding,
        "mix_grad": mix_grad,
    }
    # What travels is known when the ranks have met: torch.compile leaves the call out of its graphs.
    attend = torch.compiler.disable(_attend) if torch.compiler.is_compiling() else _attend  # type: ignore[no-untyped-call]
    out, lse = attend(q, k, v, segment_lengths, dilation_rates, group, order, backend, words)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    ranks: Group,
    order: str | TokenOrder | Tensor | None,
    backend: str | None,
    words: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    group = as_group(ranks)
    q, k, v = cast_like_autocast(q, k, v)
    backward = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))
    device = q.device if isinstance(q, Tensor) else torch.device("cpu")
    call, token_order, refusal = None, None, None
    facts: dict[str, str] = {}
    try:
        token_order = as_order(order)
        call = _checked(q, k, v, segment_lengths, dilation_rates, backend, words)
        facts = _facts(call, token_order, backend, backward, device)
    except (DilatedAttentionError, OSError) as error:  # OSError: a database that cannot be read
        refusal = error
    shards = Shards.of(agree(group, device, facts, q.shape[1] if refusal is None else 0, refusal), group.rank())
    assert call is not None, "a refusal is every rank's error"
    share = _share(call, shards, token_order, backend, backward, q.device, group)
    _agree_on_plans(share, shards, q.device, group)
    out, lse = ShardedAttention.apply(q, k, v, share, shards, group)  # type: ignore[no-untyped-call]
    return out, lse


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    backend: str | None,
    words: dict[str, Any],
) -> Call:
    """This rank's arguments; the order waits until the length of the sequence is known."""
    deterministic = option_values.current().deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if backend not in (None, "triton", "torch"):
        raise UnsupportedError(f'across ranks backend must be None, "triton" or "torch", got {backend!r}')
    return resolve(q, k, v, segment_lengths, dilation_rates, deterministic=deterministic, **words)


def _facts(
    call: Call, order: TokenOrder | None, backend: str | None, backward: bool, device: torch.device
) -> dict[str, str]:
    """All that a call has in common on all ranks, in words."""
    problem, options = call.problem, option_values.current()
    return {
        "the call": "dilated_attention",
        "the kind of device": device.type,
        "dtype": problem.dtype,
        "batch": str(problem.batch),
        "the number of heads": str(problem.heads),
        "the number of key/value heads": str(problem.kv_heads),
        "head_dim": str(problem.head_dim),
        "segment_lengths": str([segment for segment, _ in problem.branches]),
        "dilation_rates": str([rate for _, rate in problem.branches]),
        "queries": problem.queries,
        "head_offset": problem.head_offset if call.offsets.table is None else str(call.offsets.rows),
        "order": identity(order),
        "is_causal": str(problem.causal),
        "key_padding_mask": "given" if problem.mask else "none",
        "dropout_p": str(call.dropout_p),
        "scale": str(call.scale),
        "padding": problem.padding,
        "mix_grad": problem.mix_grad,
        "backend": str(backend),
        "whether gradients are recorded": str(backward),
        "whether atomics are excluded": str(problem.deterministic),
        "the precision of float32": "tf32" if problem.tf32 else "ieee",
        "options(config=...)": str({op: config.name for op, config in options.config}),
        "options(on_miss=...)": options.on_miss,
        "the database digest": _digest(options.database),
    }


@lru_cache(maxsize=16)
def _digest(database: Path | None) -> str:
    """`db_digest` under options with this database, read once as the databases are."""
    del database
    return db_digest()


def _share(
    call: Call,
    shards: Shards,
    order: TokenOrder | None,
    backend: str | None,
    backward: bool,
    device: torch.device,
    group: dist.ProcessGroup,
) -> Share:
    """What the ranks have agreed on, as the parts need it."""
    call = without_excess(call, shards.length)
    problem = call.problem
    tokens = None
    if order is not None:
        order.check(shards.length)
        if problem.causal or call.dropout_p > 0.0:
            tokens = order.index(shards.length, device)
    dropout = Dropout.draw(call.dropout_p, device)
    if dropout is not None:
        with waiting(group, "the seed of dropout"):
            dist.broadcast(dropout.seed, group=group, group_src=0)
    widths = tuple((shards.width(segment), rate) for segment, rate in problem.branches)
    share = Share(
        replace(problem, branches=widths),
        shards.start,
        call.scale,
        call.mask,
        call.offsets,
        tokens,
        dropout,
        backend,
        backward,
        option_values.current(),
    )
    if backend == "triton":
        _refuse_products(share, shards)
    return share


def _agree_on_plans(share: Share, shards: Shards, device: torch.device, group: dist.ProcessGroup) -> None:
    """Where a part may be refused for its own sizes, plan all parts before rows travel: others have other parts."""
    if share.backend != "triton" and share.options.on_miss != "error" and not share.options.config:
        return  # the same on all ranks: these are facts of the call
    refusal = None
    try:
        plan_parts(share, shards, device)
    except DilatedAttentionError as error:
        refusal = error
    agree(group, device, {"the call": "the plans of dilated_attention"}, 0, refusal)


def _refuse_products(share: Share, shards: Shards) -> None:
    """Refuse what no kernel takes, on all ranks, whichever of them it would come to."""
    reasons = []
    if share.dropout is not None:
        reasons.append("dropout goes by a token's number in the whole sequence, which kernels do not know")
    if any(shards.crosses(width) for width, _ in share.problem.branches):
        if share.by_token:
            reasons.append("in a segment that crosses ranks under an order, so does is_causal")
        if share.problem.queries == "all":
            reasons.append('queries="all" of a segment that crosses ranks are not its kept rows')
    if reasons:
        raise UnsupportedError(f"the triton backend refuses across ranks: {'; '.join(reasons)}")
