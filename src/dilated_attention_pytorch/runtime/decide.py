"""From the arguments of a call to what was checked and what will run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import device as devices
from ..order import as_order
from . import options as option_values
from .arguments import Call, check_mask, check_tensors, resolve

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
    **arguments: Any,
) -> tuple[Call, Plan]:
    """The checked call and its plan, under the options and the determinism in force.

    Args:
        q: As in `dilated_attention`; so are the others.
        k: As there.
        v: As there.
        segment_lengths: As there.
        dilation_rates: As there.
        backend: As there.
        arguments: What `resolve` takes.
    """
    chosen = option_values.current()
    deterministic = chosen.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        check_tensors(q, k, v)  # refuses them in a sentence
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    order, mask = arguments.get("order"), arguments.get("key_padding_mask")
    by_tensor = isinstance(order, Tensor) or isinstance(arguments.get("head_offset"), Tensor)
    key = None
    if not by_tensor and chosen.miss_log is None:
        options = None if chosen is option_values.DEFAULTS else chosen
        key = _kind(q, k, v, segment_lengths, dilation_rates, arguments, backend, options, deterministic, backward)
        if (known := _KNOWN.get(key)) is not None:
            call, found = known
            if order is None and mask is None:
                return known
            index = None if order is None else as_order(order).index(call.problem.length, q.device)  # type: ignore[union-attr]
            checked = None if mask is None else check_mask(mask, q)
            return Call(call.problem, call.scale, index, checked, call.offsets, call.dropout_p), found
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
"""What was decided, by all that it depends on, without its tensors."""


def _kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    arguments: dict[str, Any],
    *rest: Any,
) -> Any:
    """All that a decision depends on as one value to look up; None for what is no argument, as the checks will say.

    Numbers are told by their text: 1, 1.0 and True are equal, and not all of them are taken.
    """
    mask = arguments.get("key_padding_mask")
    names = ("is_causal", "dropout_p", "scale")
    try:
        kind = (
            *(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device),
            repr((segment_lengths, dilation_rates, *(arguments.get(name) for name in names))),
            *(value if value is not mask else None for name, value in arguments.items() if name not in names),
            mask is None,
            torch.get_float32_matmul_precision(),
            *rest,
        )
        hash(kind)
    except (AttributeError, TypeError):
        return None
    return kind


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

    call = resolve(q, k, v, segment_lengths, dilation_rates, deterministic=deterministic, **arguments)
    found = plan(call.problem, devices.current(q.device), backend, chosen, backward=backward)
    if chosen.miss_log is not None:
        from .misses import note

        note(chosen.miss_log, found, backward=backward)
    return call, found
