"""A traced call: how it comes to the operators of `ops`, and what these do when they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import UnsupportedError
from ..order import TokenOrder, as_order
from .arguments import check_tensors, check_words, unit_stride
from .decide import decide
from .dropout import Dropout
from .function import HilbertAttentionFunction, backend_of
from .ops import LIBRARY, NAMESPACE, SIDES, WORDS, Deferred

if TYPE_CHECKING:
    from .plan import Plan

_attention = getattr(torch.ops, NAMESPACE).attention.default


def is_traced(q: Tensor) -> bool:
    """Somebody records this call, or its tensors have no values: it has to be one operator."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or (isinstance(q, Tensor) and q.is_meta)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    head_offset: str | Tensor,
    order: str | TokenOrder | Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    backend: str | None,
    **words: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of `dilated_attention` as one operator; what depends on values is checked when that runs."""
    check_tensors(q, k, v)
    check_words(words)
    if backend == "reference":
        raise UnsupportedError('backend="reference" has loops that no graph holds; call it outside of torch.compile')
    kind, grid, prefix, permutation = _taken_apart(order)
    by_table = isinstance(head_offset, Tensor)
    dropout = Dropout.draw(dropout_p, q.device)
    out, lse = _attention(
        q,
        k,
        v,
        permutation,
        key_padding_mask,
        head_offset if by_table else None,
        None if dropout is None else dropout.seed,
        segment_lengths=_listed(segment_lengths),
        dilation_rates=_listed(dilation_rates),
        head_offset="table" if by_table else head_offset,
        order=kind,
        grid=grid,
        prefix=prefix,
        dropout_p=dropout_p,
        backend=backend,
        **words,
    )
    return out, lse


def _listed(values: int | Sequence[int]) -> list[int]:
    return list(values) if isinstance(values, Sequence) else [values]


def _taken_apart(
    order: str | TokenOrder | Tensor | None,
) -> tuple[str | None, tuple[int, ...] | None, int, Tensor | None]:
    """An order as kind, grid, prefix and permutation."""
    if order is None or isinstance(order, str):
        return order, None, 0, None
    if isinstance(order, Tensor):
        return None, None, 0, order
    if not isinstance(order, TokenOrder):
        as_order(order)  # refuses it in a sentence
    if order.permutation is not None:
        return None, None, 0, order.permutation
    return order.kind, order.grid, order.prefix, None


def _recorded(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`attention` where gradients are recorded."""
    words = dict(zip(SIDES + WORDS, rest, strict=True))
    permutation, mask, head_offsets, seed = (words.pop(name) for name in SIDES)
    dropout = None if seed is None else Dropout(words["dropout_p"], seed)
    scale = words.pop("scale")
    rest = Deferred(tuple(words.items())), scale, head_offsets, dropout
    out, lse = HilbertAttentionFunction.apply(q, k, v, permutation, mask, rest)
    return out, lse


def _run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`attention` on tensors that have values."""
    plan, sides = _decided(q, k, v, rest)
    out, lse = backend_of(plan).forward(plan, *unit_stride(q, k, v), **sides)
    return out.contiguous(), lse.contiguous()


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward` on tensors that have values."""
    plan, sides = _decided(q, k, v, rest)
    dq, dk, dv = backend_of(plan).backward(plan, *unit_stride(q, k, v), out, lse, dout, dlse, **sides)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _decided(q: Tensor, k: Tensor, v: Tensor, rest: tuple[Any, ...]) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what a backend takes besides tensors that are differentiated."""
    words = dict(zip(SIDES + WORDS, rest, strict=True))
    seed, permutation, table = words.pop("seed"), words.pop("permutation"), words.pop("head_offsets")
    kind, grid, prefix = words.pop("order"), words.pop("grid"), words.pop("prefix")
    words["order"] = permutation if kind is None else TokenOrder(kind, None if grid is None else tuple(grid), prefix)
    if table is not None:
        words["head_offset"] = table
    call, plan = decide(q, k, v, **words)
    dropout = None if seed is None else Dropout(call.dropout_p, seed)
    sides = {"scale": call.scale, "index": call.index, "mask": call.mask, "offsets": call.offsets, "dropout": dropout}
    return plan, sides


LIBRARY.impl("attention", _recorded, "Autograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("attention", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("attention_backward", _run_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
