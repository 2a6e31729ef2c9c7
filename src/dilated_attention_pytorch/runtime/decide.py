"""From the arguments of a call to what was checked and what will run."""

from __future__ import annotations

import marshal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import device as devices
from ..order import TokenOrder, as_order
from . import options as option_values
from .arguments import Call, check_mask, check_tensors, resolve, without_excess
from .function import is_recorded

if TYPE_CHECKING:
    from .options import Options
    from .plan import Plan


def decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    backend: str | None,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
) -> tuple[Call, Plan]:
    """The checked call and its plan, under the options and the determinism in force.

    The arguments are those of `dilated_attention`. A decision is remembered by all that it depends on, without its
    tensors. Numbers are told by their bytes: 1, 1.0 and True are equal, and not all of them are taken.
    """
    chosen = option_values.current()
    deterministic = chosen.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        check_tensors(q, k, v)  # refuses them in a sentence
    backward = is_recorded(q, k, v)
    key = known = None
    if chosen.miss_log is None and not isinstance(order, Tensor) and not isinstance(head_offset, Tensor):
        key = (
            *(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device),
            *(queries, head_offset, order, padding, mix_grad, backend, key_padding_mask is None),
            *(None if chosen is option_values.DEFAULTS else chosen, deterministic, backward),
            torch.get_float32_matmul_precision(),
            _exactly(segment_lengths, dilation_rates, is_causal, dropout_p, scale),
        )
        try:
            known = _KNOWN.get(key)
        except TypeError:  # an argument that is none, as the checks will say
            key = None
    if known is not None:
        call, found = known
        if order is None and key_padding_mask is None:
            return known
        index = None if order is None else as_order(order).index(call.problem.length, q.device)  # type: ignore[union-attr]
        mask = None if key_padding_mask is None else check_mask(key_padding_mask, q)
        return Call(call.problem, call.scale, index, mask, call.offsets, call.dropout_p), found
    arguments: dict[str, Any] = {
        "queries": queries,
        "head_offset": head_offset,
        "order": order,
        "is_causal": is_causal,
        "key_padding_mask": key_padding_mask,
        "dropout_p": dropout_p,
        "scale": scale,
        "padding": padding,
        "mix_grad": mix_grad,
    }
    call, found = _decided(
        q, k, v, segment_lengths, dilation_rates, backend, chosen, deterministic, backward, arguments
    )
    if key is not None:
        if len(_KNOWN) >= KEPT:
            _KNOWN.clear()
        _KNOWN[key] = Call(call.problem, call.scale, None, None, call.offsets, call.dropout_p), found
    return call, found


KEPT = 1024
"""Kinds of calls that are remembered; beyond them all are forgotten at once."""

_KNOWN: dict[Any, tuple[Call, Plan]] = {}


def _exactly(*numbers: object) -> bytes | str:
    try:
        # A quarter of repr's time. Later formats tell shared objects from equal ones.
        return marshal.dumps(numbers, 2)  # type: ignore[arg-type]
    except ValueError:  # numpy's, say
        return repr(numbers)


def _decided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    backend: str | None,
    chosen: Options,
    deterministic: bool,
    backward: bool,
    arguments: dict[str, Any],
) -> tuple[Call, Plan]:
    from .plan import plan  # with the database's reader behind it: a third of the package's import

    given = resolve(q, k, v, segment_lengths, dilation_rates, deterministic=deterministic, **arguments)
    call = without_excess(given, q.shape[1])
    found = plan(call.problem, devices.current(q.device), backend, chosen, backward=backward)
    if chosen.miss_log is not None:
        from .misses import note

        note(chosen.miss_log, found, backward=backward)
    return call, found
