"""Running the generated kernels on cases, for the interpreter and for a GPU alike, with poison in all outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import generated, heuristics
from dilated_attention_pytorch.config import BACKWARD, OPS, LaunchConfig, next_power_of_two
from dilated_attention_pytorch.device import current
from dilated_attention_pytorch.runtime import launch
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.dropout import Dropout
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.variant import Variant

from .cases import Case, Inputs, arguments, dropout_mask, seeded_dropout
from .dense import dense_attention
from .tolerances import Results

GUARD = 512
"""Elements of poison before and behind every output."""


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Outputs full of NaN between guard bands of NaN; fails if a band was written to."""
    bands: list[tuple[Tensor, int]] = []

    def allocate(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        dtype, shape = (like.dtype, like.shape) if shape is None else (torch.float32, shape)
        size = torch.Size(shape).numel()
        memory = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=like.device)
        bands.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    with mock.patch.object(launch, "allocate", allocate):
        yield
    for memory, size in bands:
        assert memory[:GUARD].isnan().all(), "a kernel wrote before an output"
        assert memory[GUARD + size :].isnan().all(), "a kernel wrote behind an output"


Config = LaunchConfig | Mapping[str, LaunchConfig] | None


def run_kernels(
    case: Case, inputs: Inputs, config: Config = None, *, backend: str = "triton", mix_grad: str = "exact"
) -> Results:
    """Forward and backward of a case through the public face, dlse included where the mix is exact."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    seeded_dropout(case, q.device)
    given = _given(case, inputs) | {"dropout_p": case.dropout}
    with poisoned_outputs(), dap.options(config=config):
        out, lse = dap.dilated_attention(q, k, v, **given, return_lse=True, backend=backend, mix_grad=mix_grad)
        taken = [(out, inputs.dout), (lse, inputs.dlse)][: 1 if mix_grad == "detached" else 2]
        dq, dk, dv = torch.autograd.grad([x for x, _ in taken], (q, k, v), [gradient for _, gradient in taken])
    return Results(out.detach(), lse.detach(), dq, dk, dv)


def variants_run(case: Case, inputs: Inputs, config: Config = None) -> set[str]:
    """Names of the texts that `run_kernels` runs."""
    with dap.options(config=config):
        chosen = dap.explain(inputs.q, inputs.k, inputs.v, **_given(case, inputs), backend="triton")
    return {choice.variant.name for choice in chosen.launches}


def _given(case: Case, inputs: Inputs) -> dict[str, Any]:
    """A snake is given by name, so that the kernels compute it and do not read it through an index."""
    given = arguments(case, inputs)
    return given | {"order": "snake"} if case.order == "snake" else given


def as_dtype(case: Case, **dtypes: str) -> Case:
    """The case in another dtype where `dtypes` maps its own."""
    return replace(case, dtype=dtypes.get(case.dtype, case.dtype))


def dense_formula(case: Case, inputs: Inputs) -> Results:
    """The dense formula evaluated in the case's dtype: what rounding alone costs. Memory goes with N²."""
    host = Inputs(*(None if tensor is None else tensor.cpu() for tensor in inputs))
    dropout = seeded_dropout(case, inputs.q.device)
    dropped = dropout_mask(case, dropout and Dropout(dropout.p, dropout.seed.cpu()))
    given = arguments(case, host) | {"dout": host.dout, "dlse": host.dlse, "dropout_mask": dropped}
    results = dense_attention(host.q, host.k, host.v, **given)
    return Results(*(tensor.to(inputs.q.device) for tensor in results))


def pattern_case(
    variant: Variant, *, heads: int = 2, D: int = 16, dtype: str = "fp32", causal: bool = False, mask: bool = False
) -> Case:
    """A call whose one launch runs this variant: whole segments for an even text, else a short last one."""
    branches = variant.levels
    even_rows = 64 if not variant.ring else 128 if variant.one_tile else 256
    free_segment, free_rate = _unrendered(variant, even_rows)
    rate = variant.dilation or free_rate
    if variant.ring:  # of what its tensor cores take, and a mask not at all
        D, dtype, mask = D if D in heuristics.RING_HEAD_DIMS else 64, "bf16" if dtype == "fp32" else dtype, False
    if branches:
        segment, length = branches[0][0], min(branches[-1][0], 4 * branches[0][0])
        length += 0 if variant.even else segment // 3 + 1
    elif variant.segment == "full":
        segment, length = 1 << 20, (even_rows * rate if variant.even else (250 if variant.ring else 62) * rate + 1)
    else:
        segment = variant.segment or free_segment
        # Five segments of 128 cut a row of the snake that runs backwards: two do not, and where every step is kept the
        # snake would be left out.
        segments = 5 if variant.order == "snake" and rate == 1 else 2
        length = segment * segments if variant.even else segment * segments + segment // 3 + 1
    return Case(
        N=length,
        branches=branches or ((segment, rate),),
        H=heads,
        G=heads if variant.one_tile and variant.even else heads // 2,
        D=D,
        queries=variant.queries,
        head_offset="zero" if variant.queries == "all" else "cyclic",
        order="random" if variant.order == "hilbert" else variant.order,
        causal=causal,
        mask=mask,
        dtype=dtype,
    )


def _unrendered(variant: Variant, even_rows: int) -> tuple[int | str, int]:
    """A segment and a rate for a general text, for which no text of its own takes the call."""
    texts = map(Variant.from_name, generated.names() - {"delta"})
    special = {(text.segment, text.dilation) for text in texts}
    shortest = 1000 if variant.ring else 100
    pairs: Iterator[tuple[int | str, int]] = ((segment, 3) for segment in count(shortest) if segment % 3)
    if variant.even or variant.segment == "full":
        rates = count(4 if variant.one_tile else 3)
        pairs = ((variant.segment or even_rows * rate, rate) for rate in rates)
    return next(pair for pair in pairs if pair not in special)


def ops_of(variant: Variant) -> tuple[str, ...]:
    """What a text computes: a ring of one tile has no text for but one launch."""
    return (BACKWARD,) if variant.ring and variant.one_tile else OPS


def pattern_config(variant: Variant) -> dict[str, LaunchConfig] | None:
    """Tiles with which the plan comes to the variant; None where any do."""
    if variant.ring and variant.one_tile:
        return {BACKWARD: LaunchConfig(64, 128, num_warps=8, num_stages=1, loads="ring")}
    if variant.ring:
        produced = LaunchConfig(128, 64, num_warps=8, num_stages=2, loads="producer")
        alone = dict.fromkeys(OPS, LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"))
        return alone if variant.wider or variant.order != "none" else alone | {"fwd": produced}
    rows = variant.rows or 64
    if not variant.one_tile:
        # Not all keys in one tile, and an even divisor of all rows.
        size = 16 if rows < 64 else 32 if rows < 128 else 64
        asked = 64 if variant.queries == "all" and isinstance(variant.segment, int) else size
        return dict.fromkeys(OPS, LaunchConfig(asked, size, num_warps=4, num_stages=1))
    tile = max(next_power_of_two(rows), 16)
    asking = rows if variant.queries == "dilated" else variant.segment or 4 * rows
    assert isinstance(asking, int)
    holding = max(next_power_of_two(asking), 16)
    around = LaunchConfig(min(32, holding), tile, num_warps=4, num_stages=1)
    held = LaunchConfig(holding, tile, num_warps=8, num_stages=1)
    return {"fwd": around, "dkdv": held, "dq": around}


RINGS = (
    dict.fromkeys(OPS, LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring")),
    {
        "fwd": LaunchConfig(64, 128, num_warps=4, num_stages=2, loads="ring"),
        "dkdv": LaunchConfig(32, 64, num_warps=4, num_stages=3, loads="ring"),
        "dq": LaunchConfig(64, 32, num_warps=4, num_stages=4, loads="ring"),
    },
    {
        "fwd": LaunchConfig(128, 64, num_warps=8, num_stages=3, loads="ring"),
        "dkdv": LaunchConfig(64, 128, num_warps=8, num_stages=1, loads="ring"),
        "dq": LaunchConfig(128, 64, num_warps=8, num_stages=2, loads="ring"),
    },
    {
        "fwd": LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="producer"),
        "dkdv": LaunchConfig(64, 64, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),
        "dq": LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="ring"),
    },
    {
        "fwd": LaunchConfig(128, 64, num_warps=8, num_stages=3, loads="producer"),
        "dkdv": LaunchConfig(128, 64, num_warps=4, num_stages=1, loads="ring"),
        "dq": LaunchConfig(64, 128, num_warps=4, num_stages=2, loads="ring"),
    },
)
"""Tiles of unequal sides, one and several places, one and two warpgroups, and those beside a producer."""

CHAIN_RINGS = tuple({op: replace(of[op], num_stages=2, maxnreg=None, loads="ring") for op in OPS} for of in RINGS)
"""The same for several branches in one pass: two places, and nobody who loads for others."""

ORDER_RINGS = tuple(
    {op: replace(of[op], num_warps=min(of[op].num_warps, 4), block_m=64, loads="ring") for op in OPS}
    for of in RINGS[:3]
)
"""And along an order: nobody who loads for others either."""

ALONG_ORDERS = {
    "any": Case(N=512, branches=((256, 2),), B=2, H=4, G=2, D=64, order="random", causal=True, dtype="bf16"),
    "merged": Case(N=1024, branches=((256, 1), (512, 4)), H=2, D=64, order="random", head_offset="zero", dtype="fp16"),
    "whole": Case(N=384, branches=((384, 3),), B=2, H=3, D=128, order="random", dtype="bf16"),
    "snake": Case(N=768, branches=((384, 3),), H=4, D=64, order="snake", causal=True, dtype="bf16"),
    "snakes": Case(N=640, branches=((320, 1), (640, 5)), H=5, D=128, order="snake", dtype="fp16"),
}
"""Calls along orders in which nothing is ragged."""

CHAINS = {
    "nested": Case(N=8192, branches=((2048, 1), (4096, 2), (8192, 4)), H=4, D=64, dtype="bf16"),
    "causal": Case(N=8192, branches=((2048, 1), (4096, 2), (8192, 4)), H=4, D=64, causal=True, dtype="fp16"),
    "grouped": Case(N=4096, branches=((1024, 1), (2048, 2)), B=2, H=4, G=2, D=128, causal=True, dtype="bf16"),
    "short": Case(N=1024, branches=((1024, 1), (2048, 2)), H=2, D=64, head_offset="zero", dtype="bf16"),
}
"""Calls of several branches that one pass computes, and nothing is ragged."""


def chosen_config(variant: Variant) -> dict[str, LaunchConfig]:
    """Tiles with all that a measurement may choose and few defaults do: descriptors, all gradients in one launch."""
    tiles = pattern_config(variant) or {}
    if variant.ring:
        return tiles
    loads = "descriptor" if variant.described else "pointer"
    config = {op: replace(tiles[op], loads=loads) for op in OPS}
    if not variant.joinable:
        return config
    return config | {"bwd": replace(config["dkdv"], block_n=variant.rows or 64)}


def run_ranges(
    case: Case, inputs: Inputs, cuts: Sequence[int], config: LaunchConfig | Mapping[str, LaunchConfig]
) -> Results:
    """Forward and backward in launches that each take the query steps between two cuts, all keys being there.

    Without an order a launch is given its own rows of q alone, as a rank of a sharded sequence has them.
    """
    index = None if inputs.order is None else inputs.order.int()
    offsets = HeadOffsets(case.offsets)
    parts: list[tuple[Tensor, Results]] = []
    chosen_tiles = config if isinstance(config, Mapping) else dict.fromkeys(OPS, config)
    for first, last in pairwise(cuts):
        problem = replace(case.problem, query_range=(first, last))
        chosen = plan(problem, current(inputs.q.device), "triton", Options((*chosen_tiles.items(),)))
        rows = slice(first, last) if index is None else slice(None)
        q, dout, dlse = (
            inputs.q[:, rows].contiguous(),
            inputs.dout[:, rows].contiguous(),
            inputs.dlse[:, :, rows].contiguous(),
        )
        rest = {"scale": case.D**-0.5, "index": index, "mask": inputs.mask, "offsets": offsets}
        with poisoned_outputs():
            out, lse = launch.forward(chosen, q, inputs.k, inputs.v, **rest)
            owned = torch.arange(case.N)[rows] if index is None else index[first:last].cpu().long()
            if index is not None:
                # Rows of other ranges are not this launch's: what they hold must not matter.
                others = torch.ones(case.N, dtype=torch.bool).index_fill(0, owned, False)
                out[:, others], lse[:, :, others] = 0.0, -torch.inf
            dq, dk, dv = launch.backward(chosen, q, inputs.k, inputs.v, out, lse, dout, dlse, **rest)
        place = torch.arange(len(owned)) if index is None else owned
        parts.append((owned, Results(out[:, place], lse[:, :, place], dq[:, place], dk, dv)))
    whole = Results(
        torch.empty_like(inputs.q),
        torch.empty_like(inputs.dlse, dtype=torch.float32),
        torch.empty_like(inputs.q),
        sum(part.dk for _, part in parts),
        sum(part.dv for _, part in parts),
    )
    for owned, part in parts:
        whole.out[:, owned], whole.dq[:, owned], whole.lse[:, :, owned] = part.out, part.dq, part.lse
    return whole
