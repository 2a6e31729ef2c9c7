"""The only caller of generated code: a plan's launches, forward and backward.

Outputs are allocated here and are not initialised: the first branch's kernels write every row, zeros where no step is
kept, and later branches merge into what they find.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import generated
from ..config import LaunchConfig, Problem, cdiv, next_power_of_two
from ..heuristics import has_tensor_cores_for_float32
from . import replay
from .arguments import HeadOffsets
from .dropout import Dropout
from .replay import Launch

if TYPE_CHECKING:
    from .plan import BranchPlan, Choice, Plan

DELTA = LaunchConfig(block_m=64, block_n=64, num_warps=4, num_stages=1)
"""The delta kernel reads two tensors once: any size does."""


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
    out = allocate(q.shape, q.dtype, q.device)
    lse = allocate((q.shape[0], q.shape[2], q.shape[1]), torch.float32, q.device)
    if out.numel() == 0:
        return out, lse
    tensors = {"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse} | _sides(index, mask, dropout)

    def launches() -> Iterator[Launch]:
        shared = shared_values(plan.problem, _arch(plan), scale, index, mask, dropout, q=q, k=k, v=v)
        shared.update(p_out=out, p_lse=lse)
        for place, branch in enumerate(plan.branches):
            yield _run(plan.problem, branch.fwd, branch_values(plan.problem, branch, place, offsets, shared))

    with _on(q):
        key = _kind(plan, scale, index, mask, offsets, dropout, q, k, v)
        replay.run(key, (plan, offsets.table), tensors, launches)
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
    """Run the backward launches of a plan: delta once, then dK/dV and dQ of each branch.

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
    dq, dk, dv = (allocate(tensor.shape, tensor.dtype, tensor.device) for tensor in (q, k, v))
    if dq.numel() == 0 or plan.problem.query_range is not None:
        # No launch comes to the segments that no query asks.
        dk.zero_()
        dv.zero_()
    if dq.numel() == 0:
        return dq, dk, dv
    delta = allocate(lse.shape, lse.dtype, lse.device)
    tensors = {"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse, "p_dout": dout, "p_dlse": dlse}
    tensors |= {"p_delta": delta, "p_dq": dq, "p_dk": dk, "p_dv": dv} | _sides(index, mask, dropout)
    detached = plan.problem.mix_grad == "detached"
    if detached:
        tensors |= {
            "branch_out": allocate(out.shape, out.dtype, out.device),
            "branch_lse": allocate(lse.shape, lse.dtype, lse.device),
        }

    def launches() -> Iterator[Launch]:
        shared = shared_values(plan.problem, _arch(plan), scale, index, mask, dropout, q=q, k=k, v=v, dout=dout)
        shared.update(p_dq=dq, p_dk=dk, p_dv=dv, p_lse=lse, p_delta=delta, p_out=out, dout_d=dout.stride(3))
        if not detached:
            yield run_kernel(prepared_delta(shared, dlse), DELTA)
        for place, branch in enumerate(plan.branches):
            values = branch_values(plan.problem, branch, place, offsets, shared)
            if detached:
                # The weights that mix the branches are constants: delta is the branch's own, and so is its output.
                alone = {"p_out": tensors["branch_out"], "p_lse": tensors["branch_lse"], "MERGE": False}
                yield _run(plan.problem, branch.fwd, {**values, **alone})
                yield run_kernel(prepared_delta({**values, "p_out": tensors["branch_out"]}, None), DELTA)
            for choice in (branch.dkdv, branch.dq):
                yield _run(plan.problem, choice, values)

    with _on(q):
        gradients = dout.stride(), None if dlse is None else dlse.stride()
        key = (_kind(plan, scale, index, mask, offsets, dropout, q, k, v), *gradients)
        replay.run(key, (plan, offsets.table), tensors, launches)
    return dq, dk, dv


def _sides(index: Tensor | None, mask: Tensor | None, dropout: Dropout | None) -> dict[str, Tensor | None]:
    return {"p_index": index, "p_mask": mask, "p_seed": None if dropout is None else dropout.seed}


def _kind(
    plan: Plan,
    scale: float,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: HeadOffsets,
    dropout: Dropout | None,
    *strided: Tensor,
) -> tuple[Hashable, ...]:
    """All that the launches of a plan depend on besides addresses; the plan has the sizes but for a range's rows."""
    first = strided[0]
    return (
        *(id(plan), id(offsets.table), first.get_device(), first.shape[1], scale, index is None),
        None if mask is None else mask.stride(),
        None if dropout is None else dropout.p,
        *[tensor.stride() for tensor in strided],
    )


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the kernels owe every element of; nothing initialises it. Tests put poison in its place."""
    return torch.empty(shape, dtype=dtype, device=device)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


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


def branch_values(
    problem: Problem, branch: BranchPlan, place: int, offsets: HeadOffsets, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """What one branch adds; `place` is its turn among the launches."""
    first, last = problem.query_range or (0, problem.length)
    first_segment = first // branch.segment
    return {
        **shared,
        "p_offsets": None if offsets.table is None else offsets.table[branch.branch],
        "branch": branch.branch,
        "first_segment": first_segment,
        "n_segments": cdiv(last, branch.segment) - first_segment,
        "SEGMENT": branch.segment,
        "DILATION": branch.dilation,
        "MERGE": place > 0,
        "key_rows": cdiv(branch.segment, branch.dilation),
        "query_rows": _query_rows(problem, branch, last - first),
    }


def _query_rows(problem: Problem, branch: BranchPlan, steps: int) -> int:
    """Query rows that a segment holds at most; a short range of steps need not start with a row."""
    if problem.queries == "all":
        return min(branch.segment, steps)
    return min(cdiv(branch.segment, branch.dilation), cdiv(steps, branch.dilation) + 1)


def prepared(choice: Choice, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """The kernel of a choice, its arguments by name in order, and the number of programs."""
    config = choice.config
    kernel = getattr(generated.load(choice.variant.name), choice.op)
    heads, rows, tile = values["H"], values["query_rows"], config.block_m
    if choice.op == "dkdv":
        heads, rows, tile = values["G"], values["key_rows"], config.block_n
        if values["GROUP"] > 1:
            heads *= values["DILATION"]
    n_tiles = cdiv(rows, tile)
    given = {**values, "n_tiles": n_tiles, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    programs = values["p_q"].shape[0] * values["n_segments"] * n_tiles * heads
    return kernel, _in_order(kernel, given), programs


_STEPPED_DOWN: dict[Choice, Choice] = {}
"""Choices that ran out of resources in this process, and what runs instead. Equal devices come to the same."""


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
        from .plan import step_down

        smaller = _STEPPED_DOWN[choice] = step_down(problem, choice)
        warnings.warn(
            f"{choice.variant.name} {choice.op} with {choice.config.name} (rung {choice.rung}: {choice.why}) does not "
            f"fit this GPU: {error} From now on {smaller.config.name} runs instead; "
            "`dilated-attention db check` examines the entry, `dilated-attention tune` measures a new one",
            stacklevel=2,
        )
        return _run(problem, smaller, values)


def run_kernel(prepared: tuple[Any, dict[str, Any], int], config: LaunchConfig) -> Launch:
    """Launch what `prepared` or `prepared_delta` made ready, through Triton's own function, which compiles it first."""
    kernel, arguments, programs = prepared
    return Launch(kernel[(programs,)](*arguments.values(), **compile_options(config)), arguments, programs)


def prepared_delta(shared: Mapping[str, Any], dlse: Tensor | None) -> tuple[Any, dict[str, Any], int]:
    """The delta kernel, its arguments by name in order, and the number of programs."""
    kernel = generated.load("delta").delta
    batch, rows, heads, _ = shared["p_out"].shape
    strides = (0, 0, 0) if dlse is None else dlse.stride()
    given = {
        **shared,
        "p_dlse": dlse,
        "dlse_b": strides[0],
        "dlse_h": strides[1],
        "dlse_n": strides[2],
        "N": rows,
        "BLOCK_M": DELTA.block_m,
        "HAS_DLSE": dlse is not None,
    }
    return kernel, _in_order(kernel, given), batch * heads * cdiv(rows, DELTA.block_m)


def _in_order(kernel: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A text lists only the arguments it uses."""
    return {name: values[name] for name in kernel.arg_names}


def compile_options(config: LaunchConfig) -> dict[str, Any]:
    """What Triton is told about a kernel besides its arguments. Fusing a·b+c is its default until 3.9 alone."""
    options: dict[str, Any] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return options
