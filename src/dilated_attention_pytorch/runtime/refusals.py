"""Why a backend does not take a problem, in sentences. A reason that is lifted is one line less here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..config import Problem
from ..device import INTERPRETER, Device, Toolchain
from .variants import acting_order

CUDNN_COLUMNS = 128
"""The widest head that cuDNN's backward takes."""


def refusals(problem: Problem, device: Device | None, toolchain: Toolchain) -> tuple[str, ...]:
    """Every reason why the Triton backend refuses a problem; empty where it takes it.

    Args:
        problem: The call.
        device: The GPU, `INTERPRETER`, or None for a CPU.
        toolchain: What would compile the kernels.
    """
    return (*_of_machine(device, toolchain), *_of_problem(problem, device))


def torch_refusals(problem: Problem) -> tuple[str, ...]:
    """Every reason why the torch backend, and the reference with it, refuses a problem; empty where they take it."""
    reasons = []
    if problem.query_range is not None:
        reasons.append(f"it computes all queries of a sequence, not the range {problem.query_range}")
    return tuple(reasons)


def cudnn_takes(problem: Problem, device: Device) -> bool:
    """cuDNN's attention computes it: one branch that keeps every step of whole segments, in token order, as views."""
    one = len(problem.branches) == 1 and problem.branches[0][1] == 1
    plain = not (problem.mask or problem.dropout) and problem.head_offset != "table" and problem.query_range is None
    if not one or not plain or problem.heads != problem.kv_heads or problem.length % problem.segment(0):
        return False
    columns = problem.head_dim % 8 == 0 and problem.head_dim <= CUDNN_COLUMNS
    return columns and cudnn_runs(problem.dtype, device) and acting_order(problem, 0) == "none"


def cudnn_runs(dtype: str, device: Device) -> bool:
    """cuDNN has an attention of this dtype on this device."""
    return dtype in ("bf16", "fp16") and device.arch.startswith("sm_") and int(device.arch.removeprefix("sm_")) >= 80


def _of_machine(device: Device | None, toolchain: Toolchain) -> Iterator[str]:
    if toolchain.triton is None:
        yield "triton is not installed: pip install triton"
    if device is None:
        yield "the tensors are on a CPU: move them to a GPU, or set TRITON_INTERPRET=1 to debug"
    elif device != INTERPRETER and not _compiles_for(device.arch):
        yield f"{device.name} is {device.arch}; kernels need sm_75 (Turing) or later, or gfx90a, gfx94x, gfx95x (CDNA)"


def _of_problem(problem: Problem, device: Device | None) -> Iterator[str]:
    if problem.dtype == "fp64":
        yield "float64 runs on the torch backend; kernels take bf16, fp16 and fp32"
    if problem.dtype == "bf16" and device is not None and device.arch == "sm_75":
        yield f"{device.name} (sm_75) has no bfloat16: use float16"
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 256:
        yield f"head_dim must be a multiple of 8 from 8 to 256, got {problem.head_dim}: pad q, k and v with zeros"
    if not problem.positive_scale:
        yield "kernels take the largest product for the largest score, so scale must be positive"


def _compiles_for(arch: str) -> bool:
    if version := re.fullmatch(r"sm_(\d+)", arch):
        return int(version[1]) >= 75
    return re.fullmatch(r"gfx(90a|94\d|95\d)", arch) is not None
