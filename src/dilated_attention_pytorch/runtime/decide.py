"""From the arguments of a call to what was checked and what will run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import device as devices
from . import options as option_values
from .arguments import Call, resolve

if TYPE_CHECKING:
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
    from .plan import plan  # with the database's reader behind it: a third of the package's import

    chosen = option_values.current()
    deterministic = chosen.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    call = resolve(q, k, v, segment_lengths, dilation_rates, deterministic=deterministic, **arguments)
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    found = plan(call.problem, devices.current(q.device), backend, chosen, backward=backward)
    if chosen.miss_log is not None:
        from .misses import note

        note(chosen.miss_log, found, backward=backward)
    return call, found
