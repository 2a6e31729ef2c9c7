"""What a caller passes, checked once and in sentences, as what a plan and a launch need.

Nothing here waits for a GPU but the first look at a tensor whose values matter (a token order, a table of head
offsets); these are remembered until the tensor goes or is edited.
"""

from __future__ import annotations

import math
import numbers
import operator
import threading
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..config import HEAD_OFFSETS, Problem, head_offsets
from ..errors import ArgumentError, ArgumentTypeError
from ..order import TokenOrder, as_order, copy_to_keep
from ..variant import QUERIES

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class HeadOffsets:
    """First kept step of each head, for both backends.

    Attributes:
        rows: s_h by branch and query head; -1 keeps the head out of the branch.
        table: The same as int32 (branches, H) on the device, where the caller gave a table and not a rule.
    """

    rows: tuple[tuple[int, ...], ...]
    table: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """A checked call without q, k and v.

    Attributes:
        problem: What the plan depends on.
        scale: Factor of the scores.
        index: Steps -> tokens, int32 (N,) on the device, None without an order.
        mask: Key padding mask (B, N) bool, True = take part.
        offsets: Head offsets.
        dropout_p: Probability with which an attention weight is dropped.
    """

    problem: Problem
    scale: float
    index: Tensor | None
    mask: Tensor | None
    offsets: HeadOffsets
    dropout_p: float


def without_excess(call: Call, length: int) -> Call:
    """The same call of a sequence of so many steps with no larger dilation rate than tells.

    From a rate on that exceeds all first steps and the segment, each head keeps its first step alone. Kernels count
    steps in 32 bits, and what lies between kept steps one by one.
    """
    problem = call.problem
    firsts = [max(row, default=0) + 1 for row in call.offsets.rows]
    telling = [
        (segment, min(rate, max(min(segment, length), problem.heads, first)))
        for (segment, rate), first in zip(problem.branches, firsts, strict=True)
    ]
    return replace(call, problem=replace(problem, branches=tuple(telling)))


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
    deterministic: bool = False,
) -> Call:
    """Check the arguments of `dilated_attention` and say what they mean.

    Raises:
        ArgumentError, ArgumentTypeError, OrderError: The first argument that is wrong, the rule and the remedy.
    """
    check_tensors(q, k, v)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    branches = _branches(segment_lengths, dilation_rates)
    check_words({"queries": queries, "padding": padding, "mix_grad": mix_grad, "is_causal": is_causal})
    dropout_p = _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ArgumentError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    scale = head_dim**-0.5 if scale is None else _number("scale", scale)
    if not math.isfinite(scale):
        raise ArgumentError(f"scale must be finite, got {scale}; None is 1/sqrt(head_dim)")
    mask = check_mask(key_padding_mask, q)
    token_order = as_order(order)
    kind, row_width, prefix, index = "none", 0, 0, None
    if token_order is not None:
        token_order.check(length)
        width = token_order.row_width(length)
        kind = "hilbert" if width is None else "snake"
        row_width, prefix = (0, 0) if width is None else (width, token_order.prefix)
        index = token_order.index(length, q.device)
    problem = Problem(
        dtype=DTYPES[q.dtype],
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        branches=branches,
        queries=queries,
        head_offset=head_offset if isinstance(head_offset, str) and head_offset in HEAD_OFFSETS[:3] else "table",
        order=kind,
        row_width=row_width,
        prefix=prefix,
        causal=is_causal,
        mask=mask is not None,
        dropout=dropout_p > 0.0,
        padding=padding,
        mix_grad=mix_grad,
        positive_scale=scale > 0.0,
        tf32=q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
        deterministic=deterministic,
    )
    return Call(problem, scale, index, mask, _head_offsets(head_offset, heads, branches, q.device), dropout_p)


_AUTOCASTING = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))
"""Kinds of devices that have autocast: meta has none, and to ask is no call that `torch.compile` traces."""


def autocasts(device: torch.device) -> bool:
    """`torch.autocast` is on for this device, and there is one for it."""
    any_does = torch._C._is_any_autocast_enabled()
    return any_does and device.type in _AUTOCASTING and torch.is_autocast_enabled(device.type)


def cast_like_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As `scaled_dot_product_attention` under autocast: to the lower precision."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocasts(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    casts = [isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 for x in tensors]
    return tuple(x.to(dtype) if cast else x for x, cast in zip(tensors, casts, strict=True))


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where their last dimension is not contiguous."""
    return tuple([x if x.stride(-1) == 1 else x.contiguous() for x in tensors])


def check_words(given: Mapping[str, object]) -> None:
    """Refuse arguments that are no word of their vocabulary."""
    for label, words in (("queries", QUERIES), ("padding", ("none", "zeros")), ("mix_grad", ("exact", "detached"))):
        if given[label] not in words:
            raise ArgumentError(f"{label} must be {' or '.join(map(repr, words))}, got {given[label]!r}")
    if not isinstance(given["is_causal"], bool):
        raise ArgumentTypeError(f"is_causal must be True or False, got {given['is_causal']!r}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors whose kinds, dtypes, devices or shapes do not go together."""
    for label, tensor, shape in (("q", q, "(B, N, H, D)"), ("k", k, "(B, N, G, D)"), ("v", v, "(B, N, G, D)")):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{label} must be a tensor {shape}, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ArgumentError(f"{label} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.layout != torch.strided:
            raise ArgumentError(f"{label} must be a dense tensor, got layout {tensor.layout}; .to_dense() makes one")
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{label} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ArgumentError(f"q, k and v must have one dtype; q has {q.dtype}, {label} has {tensor.dtype}")
        if tensor.device != q.device:
            raise ArgumentError(f"q, k and v must be on one device; q is on {q.device}, {label} on {tensor.device}")
    if k.shape != v.shape:
        raise ArgumentError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ArgumentError(
            "q (B, N, H, D) and k (B, N, G, D) must agree in B, N and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}; layouts (B, H, N, D) need .transpose(1, 2)"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"the {heads} heads of q must be a multiple of the {kv_heads} of k and v")
    if q.shape[3] < 1:
        raise ArgumentError(f"head_dim must be at least 1, got q of shape {tuple(q.shape)}")


def _branches(segment_lengths: int | Sequence[int], dilation_rates: int | Sequence[int]) -> tuple[tuple[int, int], ...]:
    lengths = _integers("segment_lengths", segment_lengths)
    rates = _integers("dilation_rates", dilation_rates)
    if len(lengths) != len(rates):
        raise ArgumentError(
            f"segment_lengths and dilation_rates must be as many, one pair a branch; "
            f"got {len(lengths)} ({lengths}) and {len(rates)} ({rates})"
        )
    if not lengths:
        raise ArgumentError("segment_lengths and dilation_rates must name at least one branch, got none")
    return tuple(zip(lengths, rates, strict=True))


def _integers(label: str, values: int | Sequence[int]) -> tuple[int, ...]:
    given = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    numbers = []
    for value in given:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if number is None or isinstance(value, bool):
            remedy = "; .tolist() makes one" if hasattr(values, "tolist") else ""
            raise ArgumentTypeError(f"{label} must be an integer or a sequence of integers, got {values!r}{remedy}")
        if not 1 <= number < 2**31:
            raise ArgumentError(f"{label} must lie in 1..2^31-1, got {number} in {values!r}")
        numbers.append(number)
    return tuple(numbers)


def _number(label: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(f"{label} must be a number, got {value!r}")
    if math.isnan(value):
        raise ArgumentError(f"{label} must be a number, got NaN")
    return float(value)


def check_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The key padding mask as kernels read it, or its refusal."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(f"key_padding_mask must be a bool tensor (B, N), got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"key_padding_mask must be bool, True = take part, got {mask.dtype}; write mask != 0, or mask == 0 "
            "where 1 meant padding"
        )
    if mask.layout != torch.strided:
        raise ArgumentError(f"key_padding_mask must be a dense tensor, got layout {mask.layout}; .to_dense() makes one")
    if mask.shape != q.shape[:2]:
        raise ArgumentError(f"key_padding_mask must have shape (B, N) = {tuple(q.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ArgumentError(f"key_padding_mask must be on q's device {q.device}, got {mask.device}")
    return mask if mask.stride(1) == 1 else mask.contiguous()


_TABLES: MutableMapping[Tensor, tuple[Hashable, HeadOffsets]] = WeakIdKeyDictionary()
"""Tables of head offsets that were checked: version, dilation rates and device then, and what they say."""
_TABLES_LOCK = threading.Lock()


def _head_offsets(
    given: str | Tensor, heads: int, branches: tuple[tuple[int, int], ...], device: torch.device
) -> HeadOffsets:
    if isinstance(given, str):
        if given not in HEAD_OFFSETS[:3]:
            words = ", ".join(map(repr, HEAD_OFFSETS[:3]))
            raise ArgumentError(f"head_offset must be {words} or an integer tensor (branches, H), got {given!r}")
        return HeadOffsets(tuple(head_offsets(given, heads, rate) for _, rate in branches))
    if not isinstance(given, Tensor):
        raise ArgumentTypeError(f"head_offset must be a word or an integer tensor, got {type(given).__name__}")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ArgumentTypeError(f"head_offset must hold integers, got {given.dtype}")
    if given.shape != (len(branches), heads):
        raise ArgumentError(
            f"head_offset must have shape (branches, H) = {(len(branches), heads)}, got {tuple(given.shape)}"
        )
    rates = tuple(rate for _, rate in branches)
    if given.is_inference():  # counts no edits
        return _checked_table(given, rates, device)
    state = (given._version, rates, device)
    with _TABLES_LOCK:
        seen = _TABLES.get(given)
    if seen is not None and seen[0] == state:
        return seen[1]
    offsets = _checked_table(given, rates, device)
    with _TABLES_LOCK:
        _TABLES[given] = state, offsets
    return offsets


def _checked_table(given: Tensor, rates: tuple[int, ...], device: torch.device) -> HeadOffsets:
    if "cuda" in (given.device.type, device.type) and torch.cuda.is_current_stream_capturing():
        raise ArgumentError(
            "this head_offset tensor is seen for the first time, and a CUDA graph under capture cannot wait for its "
            "check: run the same call once before the capture"
        )
    rows = tuple(tuple(int(offset) for offset in row) for row in given.tolist())
    for rate, row in zip(rates, rows, strict=True):
        for offset in row:
            if not -1 <= offset < rate:
                raise ArgumentError(
                    f"head_offset must lie in 0..r-1, or be -1 for a head that takes no part; "
                    f"got {offset} at rate {rate}"
                )
    with torch.inference_mode(False):
        return HeadOffsets(rows, copy_to_keep(torch.tensor(rows, dtype=torch.int32), device))
