"""The only caller of generated code: a plan's launches, forward and backward. `replay` makes them again.

Outputs are allocated here and are not initialised: the first branch's kernels write every row, zeros where no step is
kept, and later branches merge into what they find.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import generated
from ..config import BACKWARD, BY_KEYS, IN_GLUON, LaunchConfig, Problem, cdiv, next_power_of_two
from ..heuristics import FLOOR, has_tensor_cores_for_float32, shared_bytes
from . import replay
from .arguments import HeadOffsets
from .dropout import Dropout
from .replay import Launch

if TYPE_CHECKING:
    from .plan import Choice, Plan

DELTA = LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=1)
"""The delta kernel reads two tensors once: any size does."""

SIDES = ("p_index", "p_mask", "p_seed")
FORWARDS = ("p_q", "p_k", "p_v", "p_out", "p_lse", *SIDES)
GRADIENTS = ("p_dout", "p_dlse", "p_delta", "p_dq", "p_dk", "p_dv")
BACKWARDS = (*FORWARDS, *GRADIENTS, "a branch's out", "a branch's lse")
"""What the kernels call the tensors of a call."""


def forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward launches of a plan.

    Args:
        plan: For this problem and device, of the backend "triton".
        q: (B, N, H, D), or the rows of the plan's query range alone where there is no order.
        k: (B, N, G, D).
        v: (B, N, G, D).
        scale: Positive factor of the scores.
        index: Steps -> tokens, int32 (N,), where the order is read and not computed.
        mask: (B, N) bool, True = take part.
        offsets: First kept steps of the heads.
        dropout: What drops attention probabilities, or None.

    Returns:
        out like q but contiguous, lse (B, H, rows of q) in float32.
    """
    batch, rows, heads, _ = shape = q.shape
    out, lse = allocate(q), allocate(q, (batch, heads, rows))
    if out.numel() == 0:
        return out, lse

    def launches() -> Iterator[Launch]:
        shared = shared_values(plan.problem, _arch(plan), scale, index, mask, dropout, q=q, k=k, v=v)
        shared.update(p_out=out, p_lse=lse)
        for choice in plan.fwd:
            yield _run(plan.problem, choice, branch_values(plan.problem, choice, offsets, shared))

    sides, kind = _sides(plan, q.get_device(), scale, index, mask, offsets, dropout)
    key = (kind, shape, q.stride(), k.stride(), v.stride())
    replay.run(key, (plan, offsets.table), FORWARDS, (q, k, v, out, lse, *sides), launches)
    return out, lse


def backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward launches of a plan: delta once, then dK/dV and dQ of each branch, or all three at once.

    Where one launch sees all rows and can, it takes delta from out itself, and goes first.

    Where the mix is detached, delta is each branch's own, from its output computed again.

    Args:
        plan: The forward's.
        q: As in the forward; so are k, v, scale, index, mask, offsets and dropout.
        out: What the forward returned.
        lse: What the forward returned.
        dout: Gradient of out, any strides; expanded ones are read as they are.
        dlse: Gradient of lse, any strides, or None.

    Returns:
        dq, dk, dv, contiguous.
    """
    if _STEPPED_APART:
        while plan in _STEPPED_APART:
            plan = _STEPPED_APART[plan]
    dq, dk, dv, delta = allocate(q), allocate(k), allocate(v), allocate(lse)
    if dq.numel() == 0 or plan.problem.query_range is not None:
        # No launch comes to the segments that no query asks.
        dk.zero_()
        dv.zero_()
    if dq.numel() == 0:
        return dq, dk, dv
    detached = plan.problem.mix_grad == "detached"
    branch_out, branch_lse = (allocate(out), allocate(lse)) if detached else (None, None)

    def launches() -> Iterator[Launch]:
        shared = shared_values(plan.problem, _arch(plan), scale, index, mask, dropout, q=q, k=k, v=v, dout=dout)
        shared.update(p_lse=lse, p_delta=delta, dout_d=dout.stride(3), p_dq=dq, p_dk=dk, p_dv=dv)
        with_out = {**shared, "p_out": out, "p_dlse": dlse}
        if dlse is not None:
            with_out.update(zip(("dlse_b", "dlse_h", "dlse_n"), dlse.stride(), strict=True))
        again = {choice.branch: replace(choice, merge=False) for choice in plan.fwd}
        choices = list(plan.backward)
        if not detached:
            own = _computes_delta(plan)
            made = own and _run(plan.problem, own, branch_values(plan.problem, own, offsets, with_out))
            if own and made and "p_out" in made.arguments:
                choices.remove(own)
                yield made
            else:  # also where no descriptor can be made, and a text in Triton ran, which reads delta
                yield run_kernel(prepared_delta(plan.problem, with_out), DELTA)
        for branch, of_branch in groupby(choices, attrgetter("branch")):
            if detached:
                # The weights that mix the branches are constants: delta is the branch's own, and so is its output.
                alone = {**shared, "p_out": branch_out, "p_lse": branch_lse}
                yield _run(plan.problem, again[branch], branch_values(plan.problem, again[branch], offsets, alone))
                yield run_kernel(prepared_delta(plan.problem, alone, branch), DELTA)
            for choice in of_branch:
                yield _run(plan.problem, choice, branch_values(plan.problem, choice, offsets, shared))

    sides, kind = _sides(plan, q.get_device(), scale, index, mask, offsets, dropout)
    strides = q.stride(), k.stride(), v.stride(), dout.stride(), None if dlse is None else dlse.stride()
    tensors = (q, k, v, out, lse, *sides, dout, dlse, delta, dq, dk, dv, branch_out, branch_lse)
    try:
        replay.run((kind, q.shape, *strides), (plan, offsets.table), BACKWARDS, tensors, launches)
    except _TooLarge as error:
        from .plan import stepped_apart

        _STEPPED_APART[plan] = stepped_apart(plan, *error.args)
        sides_of: dict[str, Any] = {"index": index, "mask": mask, "offsets": offsets, "dropout": dropout}
        return backward(plan, q, k, v, out, lse, dout, dlse, scale=scale, **sides_of)
    return dq, dk, dv


def _computes_delta(plan: Plan) -> Choice | None:
    """The launch that takes delta from out, and so needs no kernel before it: it sees all rows, and its text can."""
    choices = [choice for choice in plan.backward if choice.op in ("dq", BACKWARD)]
    able = len(choices) == 1 and choices[0].variant.ring and choices[0].variant.order == "none"
    return choices[0] if able and not choices[0].wider else None


def _sides(
    plan: Plan,
    device: int,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None,
) -> tuple[tuple[Tensor | None, ...], Hashable]:
    """The tensors `SIDES`, and what launches depend on besides all addresses and what the strided tensors say."""
    strides, p, seed = None, None, None
    if mask is not None:
        strides = mask.stride()
    if dropout is not None:
        p, seed = dropout.p, dropout.seed
    return (index, mask, seed), (id(plan), id(offsets.table), device, scale, index is None, strides, p)


def allocate(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Memory that the kernels owe every element of; nothing initialises it. Tests put poison in its place.

    Args:
        like: What has its dtype and device, and its shape if none is given.
        shape: Of float32 numbers.

    Returns:
        Contiguous.
    """
    if shape is None:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_empty(shape, dtype=torch.float32)


def _arch(plan: Plan) -> str:
    assert plan.device is not None, "a plan of kernels has a device"
    return plan.device.arch


def shared_values(
    problem: Problem,
    arch: str,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    dropout: Dropout | None,
    **strided: Tensor,
) -> dict[str, Any]:
    """What all branches of a call pass, by the names of the kernels' glossary."""
    units = [stride for tensor in strided.values() for stride in tensor.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in units) else 1
    values: dict[str, Any] = {}
    for name, tensor in strided.items():
        values[f"p_{name}"] = tensor
        for axis, letter in enumerate("bnh"):
            values[f"{name}_{letter}"] = tensor.stride(axis) // unit
    first, last = problem.query_range or (0, problem.length)
    q = strided["q"]
    return values | {
        "p_out": None,
        "p_dlse": None,
        "dlse_b": 0,
        "dlse_h": 0,
        "dlse_n": 0,
        "p_index": index,
        "p_mask": None if mask is None else mask.view(torch.uint8),
        "mask_b": 0 if mask is None else mask.stride(0),
        "N": problem.length,
        "H": problem.heads,
        "G": problem.kv_heads,
        "q_start": first,
        "q_stop": last,
        "q_base": 0 if q.shape[1] == problem.length else first,
        "q_rows": q.shape[1],
        "row_width": problem.row_width,
        "prefix": problem.prefix,
        "scale": scale,
        "p_seed": None if dropout is None else dropout.seed,
        "dropped": 0 if dropout is None else dropout.threshold,
        "kept_scale": 1.0 if dropout is None else dropout.kept_scale,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": max(next_power_of_two(problem.head_dim), 16),
        "UNIT": unit,
        "GROUP": problem.heads // problem.kv_heads,
        "IS_CAUSAL": problem.causal,
        "HAS_MASK": mask is not None,
        "HAS_DROPOUT": dropout is not None,
        "HAS_PHANTOMS": problem.padding == "zeros" and not problem.causal,
        "HEAD_OFFSET": problem.head_offset,
        "PRECISION": _precision(problem, arch),
    }


def _precision(problem: Problem, arch: str) -> str:
    """How products of float32 are taken.

    Tensor cores take tf32; three such products of the operands' high and low halves are as exact as float32's own and
    take a half to a sixth of their time (CONTRIBUTING.md). Others have no such cores.
    """
    if problem.dtype != "fp32":
        return "ieee"
    if problem.tf32:
        return "tf32"
    return "tf32x3" if has_tensor_cores_for_float32(arch) else "ieee"


def branch_values(problem: Problem, choice: Choice, offsets: HeadOffsets, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What one launch adds."""
    first, last = problem.query_range or (0, problem.length)
    segment, dilation = problem.segment(choice.branch), problem.branches[choice.branch][1]
    first_segment = first // segment
    return {
        **shared,
        "p_offsets": None if offsets.table is None else offsets.table[choice.branch],
        "branch": choice.branch,
        "first_segment": first_segment,
        "n_segments": cdiv(last, segment) - first_segment,
        "SEGMENT": segment,
        "DILATION": dilation,
        "MERGE": choice.merge,
        "key_rows": problem.rows(choice.branch),
        "query_rows": _query_rows(problem, choice.branch, last - first),
    }


def _query_rows(problem: Problem, branch: int, steps: int) -> int:
    """Query rows that a segment holds at most; a short range of steps need not start with a row."""
    if problem.queries == "all":
        return min(problem.segment(branch), steps)
    rate = problem.branches[branch][1]
    return min(problem.rows(branch), cdiv(steps, rate) + (rate > 1))


def prepared(choice: Choice, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """The kernel of a choice, its arguments by name in order, and the number of programs."""
    produced = choice.config.loads == "producer"
    joint = choice.op == BACKWARD and not choice.variant.ring
    name = "dkdv" if joint else f"{choice.op}_producer" if produced else choice.op
    kernel = getattr(generated.load(choice.variant.name), name)
    sizes, programs = (_sizes_of_chain if choice.wider else _sizes)(choice, values)
    config = choice.config
    given = {
        **values,
        **sizes,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "JOINT": choice.op == BACKWARD,
        "TMA": False,
    }
    if choice.op == "dkdv":
        given["p_dq"] = None  # whatever tensors there are: one kernel for the tuner, CI and calls
    if config.loads in IN_GLUON:
        described = _described(kernel, choice, given) if choice.variant.described else {}
        if not described and not (choice.variant.order != "none" and _is_copied(kernel, given)):
            return prepared(_by_pointers(choice, values), values)
        given |= described | {"STAGES": config.num_stages, "n_programs": programs}
        programs = min(programs, _staying(choice, values) or programs)
    elif "TMA" in kernel.arg_names and config.loads == "descriptor":
        given |= _described(kernel, choice, given)
    return kernel, _in_order(kernel, given), programs


def _sizes(choice: Choice, values: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """Extent of a branch's grid by name, and the number of programs."""
    heads, rows, tile = values["H"], values["query_rows"], choice.config.block_m
    if choice.op in BY_KEYS:
        heads, rows, tile = values["G"], values["key_rows"], choice.config.block_n
        if values["GROUP"] > 1:
            heads *= values["DILATION"]
    n_tiles = cdiv(rows, tile)
    return {"n_tiles": n_tiles}, values["p_q"].shape[0] * values["n_segments"] * n_tiles * heads


def _sizes_of_chain(choice: Choice, values: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    wider, stride = choice.variant.levels[-1]
    span, rows = wider // stride, cdiv(values["N"], stride)
    by_keys = choice.op in BY_KEYS
    heads, tile = (values["G"], choice.config.block_n) if by_keys else (values["H"], choice.config.block_m)
    n_tiles, n_spans = cdiv(min(span, rows), tile), cdiv(rows, span)
    return {"n_tiles": n_tiles, "n_spans": n_spans}, values["p_q"].shape[0] * n_spans * stride * n_tiles * heads


def _staying(choice: Choice, values: Mapping[str, Any]) -> int | None:
    """CTAs of a kernel whose CTAs stay until all is done: as many as the GPU has room for. None of other kernels."""
    produced, x = choice.config.loads == "producer", values["p_q"]
    if not (produced or choice.op == BACKWARD):
        return None
    if not x.is_cuda:
        return 1
    properties = torch.cuda.get_device_properties(x.device)
    dtype = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    need = shared_bytes(choice.op, values["HEAD_DIM"], dtype, choice.config, "sm_90")
    on_one = 1 if produced else properties.shared_memory_per_multiprocessor // need
    return properties.multi_processor_count * max(on_one, 1)


def _by_pointers(choice: Choice, values: Mapping[str, Any]) -> Choice:
    """The same tiles of the text in Triton, which takes what no descriptor can be made of."""
    config = replace(choice.config, loads="pointer")
    one_tile = choice.variant.one_tile and config.block_m == values["query_rows"]
    return replace(choice, variant=replace(choice.variant, one_tile=one_tile, ring=False), config=config)


def _described(kernel: Any, choice: Choice, values: Mapping[str, Any]) -> dict[str, Any]:
    """Descriptors in place of the tensors that tiles are loaded from; none where one cannot be described."""
    kept = choice.variant.levels[-1][1] if choice.wider else values["DILATION"]
    asked = kept if choice.variant.queries == "dilated" else 1
    config = choice.config
    tiles = {
        "p_q": (asked, config.block_m // (2 if config.loads == "producer" else 1)),
        "p_k": (kept, config.block_n),
        "p_v": (kept, config.block_n),
        "p_dout": (asked, config.block_m),
    }
    used = {name: tile for name, tile in tiles.items() if name in kernel.arg_names}
    tails = choice.variant.ring and not choice.variant.even  # of rows and columns, which its kernels leave out
    if not (tails or values["HEAD_DIM"] == values["BLOCK_D"]):
        return {}
    if not all(_is_describable(values[name], stride, tails) for name, (stride, _) in used.items()):
        return {}
    if not choice.variant.ring:
        return {"TMA": True} | {name: _descriptor(values[name], *tile) for name, tile in used.items()}
    columns = values["BLOCK_D"]
    made: dict[str, Any] = {name: _descriptor_of_ring(values[name], *tile, columns) for name, tile in used.items()}
    if tails:
        steps = {"q_tail": values["p_q"], "k_tail": values["p_k"]}
        made |= {name: x.shape[0] * x.shape[1] % values["DILATION"] for name, x in steps.items()}
        for name, tile in used.items():
            made[f"{name}_last"] = _descriptor_of_ring(values[name], *tile, columns, last=True)
    return {"TMA": True} | made


def _is_copied(kernel: Any, values: Mapping[str, Any]) -> bool:
    """Rows of tokens that lie anywhere are copied in 16 bytes, each so many 16 bytes from the first as 32 bits hold."""
    used = [values[name] for name in ("p_q", "p_k", "p_v", "p_dout") if name in kernel.arg_names]
    unit = values["UNIT"]
    aligned = unit * used[0].element_size() == 16 and all(x.data_ptr() % 16 == 0 for x in used)
    return aligned and all(x.stride(3) == 1 and x.shape[1] * x.stride(1) < unit * 2**31 for x in used)


def _is_describable(x: Tensor, stride: int, tails: bool) -> bool:
    """Rows of `stride` steps of (B, N, heads, D) are those of a matrix that the hardware can be told of.

    Of all steps in turn there may be a tail, if a kernel knows of it; else each sequence has whole rows.
    """
    one_matrix = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    one_matrix &= (x.shape[2] - 1) * x.stride(2) + x.shape[3] <= x.stride(1)  # a step's heads lie within its row
    aligned = x.data_ptr() % 16 == 0 and stride * x.stride(1) * x.element_size() % 16 == 0 and x.stride(1) > 0
    whole = x.shape[0] * x.shape[1] >= stride if tails else x.shape[1] % stride == 0
    return one_matrix and aligned and x.stride(3) == 1 and whole


def _descriptor(x: Tensor, stride: int, block: int) -> Any:
    """Tiles of `block` rows, each one head of every `stride`-th step: a step's heads lie side by side."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, *_matrix(x, stride), [block, x.shape[3]])


def _descriptor_of_ring(x: Tensor, stride: int, block: int, columns: int, *, last: bool = False) -> Any:
    """The same for a text in Gluon, which says how a tile lies in shared memory.

    Args:
        x: (B, N, heads, D).
        stride: Steps of a row of the matrix.
        block: Rows of a tile.
        columns: Of a tile; what lies beyond a row is read as 0.
        last: The last row too, if it has fewer steps: the matrix has the columns of these alone.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    tile = [block, columns]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    shape, strides = _matrix(x, stride)
    if last and (tail := x.shape[0] * x.shape[1] % stride):
        shape = [shape[0] + 1, _columns(x, tail)]
    return TensorDescriptor(x, shape, strides, tile, layout)


def _matrix(x: Tensor, stride: int) -> tuple[list[int], list[int]]:
    """Shape and strides of the matrix whose rows are `stride` steps."""
    return [x.shape[0] * x.shape[1] // stride, _columns(x, stride)], [stride * x.stride(1), 1]


def _columns(x: Tensor, steps: int) -> int:
    """Of so many steps in turn, up to the last one's last head: what lies behind it may be nobody's memory."""
    return (steps - 1) * x.stride(1) + (x.shape[2] - 1) * x.stride(2) + x.shape[3]


_STEPPED_DOWN: dict[Choice, Choice] = {}
"""Choices that ran out of resources in this process, and what runs instead. Equal devices come to the same."""
_STEPPED_APART: dict[Plan, Plan] = {}
"""Plans with a launch for all gradients that did, likewise: two are launched."""


class _TooLarge(Exception):
    """A launch for all gradients, the argument, ran out of resources."""


def _run(problem: Problem, choice: Choice, values: Mapping[str, Any]) -> Launch:
    """Launch a choice. One that takes more than this GPU has, against what its rung foretold, steps down for good.

    A configuration that the caller asked for is not replaced: its failure is the answer.
    """
    choice = _STEPPED_DOWN.get(choice, choice) if _STEPPED_DOWN else choice
    try:
        return run_kernel(prepared(choice, values), choice.config)
    except Exception as error:
        if type(error).__name__ != "OutOfResources" or choice.rung in ("config", "floor"):
            raise
        warnings.warn(
            f"{choice.variant.name} {choice.op} with {choice.config.name} (rung {choice.rung}: {choice.why}) does not "
            f"fit this GPU: {error} From now on {FLOOR[-1].name} runs instead; "
            "`dilated-attention db check` examines the entry, `dilated-attention tune` measures a new one",
            stacklevel=2,
        )
        if choice.op == BACKWARD:
            raise _TooLarge(choice) from error
        from .plan import step_down

        smaller = _STEPPED_DOWN[choice] = step_down(problem, choice)
        return _run(problem, smaller, values)


def run_kernel(prepared: tuple[Any, dict[str, Any], int], config: LaunchConfig) -> Launch:
    """Launch what `prepared` or `prepared_delta` made ready, through Triton's own function, which compiles it first."""
    kernel, arguments, programs = prepared
    return Launch(kernel[(programs,)](*arguments.values(), **compile_options(config)), arguments, programs)


def prepared_delta(
    problem: Problem, shared: Mapping[str, Any], branch: int | None = None
) -> tuple[Any, dict[str, Any], int]:
    """The delta kernel, of one branch or of all, its arguments by name in order, and the number of programs."""
    kernel = generated.load("delta").delta
    batch, rows, heads, _ = shared["p_out"].shape
    apart = _rows_apart(problem, problem.branches if branch is None else problem.branches[branch : branch + 1])
    given = {
        **shared,
        "N": rows,
        "BLOCK_M": DELTA.block_m,
        "DILATION": apart,
        "HAS_DLSE": shared["p_dlse"] is not None,
    }
    return kernel, _in_order(kernel, given), batch * heads * cdiv(cdiv(rows, apart), DELTA.block_m)


def _rows_apart(problem: Problem, branches: Sequence[tuple[int, int]]) -> int:
    """Rows from one that some branch keeps for a head to the next, if they are evenly apart; else 1."""
    apart = math.gcd(*(rate for _, rate in branches))
    first = 0 if problem.query_range is None else problem.query_range[0]
    starts = [first, *(segment for segment, _ in branches if segment < problem.length)]
    in_one_class = {"cyclic": True, "zero": True, "blocked": len(branches) == 1}.get(problem.head_offset, False)
    in_turn = problem.queries == "dilated" and problem.order == "none"
    return apart if in_one_class and in_turn and all(start % apart == 0 for start in starts) else 1


def _in_order(kernel: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A text lists only the arguments it uses."""
    return {name: values[name] for name in kernel.arg_names}


def compile_options(config: LaunchConfig) -> dict[str, Any]:
    """What Triton is told about a kernel besides its arguments. Fusing a·b+c is its default until 3.9 alone."""
    options: dict[str, Any] = {
        # Of those that compute beside a producer, each warpgroup is told of by itself.
        "num_warps": 4 if config.loads == "producer" else config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return options
