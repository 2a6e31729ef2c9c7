"""Calls around those of the known models, so that what is asked for on a GPU has a measurement nearby."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..config import DTYPE_BYTES, Problem, cdiv
from ..workloads import near_square

RATE = 3
"""Of every branch: half-way between 1 and 8 by octaves, and a rate that no special text is rendered for. Whoever has
arbitrary segments runs the general texts, and so must what is measured for them."""

KEPT_BYTES = 1 << 25
"""Of the kept rows of each tensor: with four to six tensors a launch, and the rows between, more than twice the level-2
cache of an H100. What is measured on tensors that fit there misleads for those that do not."""

HEADS = 16
CHECKED_SCORES = 1 << 28
"""That the float64 oracle may hold for two segments of all heads: long segments get fewer heads."""


def calls() -> list[Problem]:
    """One branch each, as many launches as the standard preset has left beside the workloads.

    A lookup takes what lies within a distance of 2 (`database.NEAREST`) and is of the same kind: dtype, head dimension,
    causality, order, queries and flags. So there is every kind that people are likely to have. Rows from 64 to 16384
    lie within an octave of a measurement in the first kinds, within one and a half where there are three sizes, within
    two where there are two, and the rarest kinds have one in the middle.

    - bf16 at head dimensions 64 and 128, causal or not: 64, 256, 512 and 8192 rows, beside the workloads' 2048, causal
      without 256. Bytes decide below 500 rows or so, products above, and a loop of 8192 rows runs as one of 16384 does.
    - The same with a short last segment: 192, 768 and 3072 rows, causal without 192. Even calls and ragged ones of the
      same rows have one key, so these have rows of their own.
    - bf16 at 48 and 96: 128, 1024 and 8192 rows; causal one. fp16, for which bf16's picks win too: 1024.
    - fp32: 128 and 2048 rows at 64 and 128, else 512; causal at 64.
    - A single segment is a kind of its own, as its last branch is in every model here: bf16, 512 and 4096 rows.
    - Orders, computed and through an index, with dilated and with all queries; a padding mask: bf16, 256 and 4096 rows.
    """
    found = [
        *_branches("bf16", (64, 128), (64, 256, 512, 8192)),
        *_branches("bf16", (64, 128), (64, 512, 8192), causal=(True,)),
        *_branches("bf16", (48, 96), (128, 1024, 8192)),
        *_branches("bf16", (48, 96), (512,), causal=(True,)),
        *_branches("bf16", (64, 128), (192, 768, 3072), ragged=True),
        *_branches("bf16", (64, 128), (768, 3072), causal=(True,), ragged=True),
        *_branches("fp16", (48, 64, 96, 128), (1024,)),
        *_branches("fp32", (64, 128), (128, 2048)),
        *_branches("fp32", (64,), (512,), causal=(True,)),
        *_branches("fp32", (48, 96), (512,)),
        *_branches("bf16", (64, 128), (512, 4096), causal=(False, True), full=True),
        *_branches("bf16", (96,), (2048,), full=True),
    ]
    for order in ("snake", "hilbert"):
        found += _branches("bf16", (64, 128), (256, 4096), order=order)
        found += _branches("bf16", (64,), (1024,), causal=(True,), order=order)
        found += _branches("bf16", (64, 128), (128,), order=order, queries="all")
    return [
        *found,
        *_branches("bf16", (64, 128), (128,), queries="all"),
        *_branches("bf16", (64, 128), (256, 4096), mask=True),
        *_branches("bf16", (64,), (1024,), causal=(True,), mask=True),
    ]


def _branches(
    dtype: str,
    head_dims: tuple[int, ...],
    rows: tuple[int, ...],
    *,
    causal: tuple[bool, ...] = (False,),
    order: str = "none",
    queries: str = "dilated",
    full: bool = False,
    ragged: bool = False,
    mask: bool = False,
) -> Iterator[Problem]:
    for head_dim, kept, late in itertools.product(head_dims, rows, causal):
        asking = kept * (RATE if queries == "all" else 1)
        heads = max(min(HEADS, CHECKED_SCORES // (2 * asking * kept)), 1)
        pairs = max(cdiv(KEPT_BYTES, kept * head_dim * DTYPE_BYTES[dtype]), heads)
        segments = 1 if full else max(pairs // heads, 2)
        length = segments * kept * RATE + (kept * RATE // 3 + 1 if ragged else 0)
        yield Problem(
            dtype=dtype,
            batch=pairs // heads if full else 1,
            length=length,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            branches=((kept * RATE, RATE),),
            queries=queries,
            head_offset="zero" if queries == "all" else "cyclic",
            order=order,
            row_width=near_square(length) if order == "snake" else 0,
            causal=late,
            mask=mask,
        )
