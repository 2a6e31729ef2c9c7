"""Compiling a launch for a GPU that is not here: what it takes of shared memory and registers, and what it spills.

Triton needs no driver to compile. The arguments are those of a real launch, with tensors that have no memory, and they
are specialised as Triton's own launcher does it: equal to 1, divisible by 16, or neither.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import LaunchConfig, Problem
from ..device import Toolchain
from ..errors import ConfigError, UnsupportedError
from ..runtime.arguments import HeadOffsets
from ..runtime.dropout import Dropout
from ..runtime.launch import DELTA, branch_values, compile_options, prepared, prepared_delta, shared_values
from ..runtime.plan import Choice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        shared_bytes: Shared memory a block.
        registers: Registers a thread; None where the toolchain does not tell.
        spills: Bytes a thread keeps in local memory for want of registers; None where the toolchain does not tell.
    """

    shared_bytes: int
    registers: int | None
    spills: int | None


IN_16_BITS = re.compile(r"\b(?:max|min)\.[us]16\b")
"""A maximum of integers of 16 bits, to which LLVM narrows counts that it knows to be small. Where it is compared as
well, ptxas 12.8 gets the comparison wrong (CONTRIBUTING.md)."""

_HIGH_HALF = re.compile(r"\bmul\.hi\.u32\s+(%r\d+),")
_WIDENED = re.compile(r"\bcvt\.u64\.u32\s+(%rd\d+), (%r\d+);")
_MINUEND = re.compile(r"\bsub\.[su]64\s+%rd\d+, (%rd\d+),")


def compile_offline(problem: Problem, choice: Choice, arch: str, *, computes_delta: bool = False) -> Resources:
    """Compile one launch of a plan for an architecture.

    Args:
        problem: The call; its tensors are taken as contiguous.
        choice: The launch.
        arch: "sm_90", "gfx942", …
        computes_delta: Of a backward launch that can: from out. Else it is given, as where candidates are timed.

    Raises:
        UnsupportedError: Triton is not installed, or runs as an interpreter in this process.
        ConfigError: The architecture is not one that Triton knows, or ptxas gets the kernel wrong.
        Exception: Whatever the compiler raises.
    """
    offsets = None
    if problem.head_offset == "table":
        offsets = torch.empty((len(problem.branches), problem.heads), dtype=torch.int32, device="meta")
    shared = _shared(problem, choice.variant.order, arch)
    if choice.op != "fwd" and not computes_delta:
        shared["p_out"] = None
    values = branch_values(problem, choice, HeadOffsets((), offsets), shared)
    return _compiled(prepared(choice, values), choice.config, arch)


def compile_delta(problem: Problem, arch: str) -> Resources:
    """Compile the kernel that every backward shares; raises as `compile_offline`."""
    values = _shared(problem, "none", arch)
    return _compiled(prepared_delta(problem, values | {"p_dlse": values["p_lse"]}), DELTA, arch)


def _compiled(launch: tuple[Any, dict[str, Any], int], config: LaunchConfig, arch: str) -> Resources:
    try:
        import triton
        from triton.compiler import ASTSource as Source
    except ModuleNotFoundError as error:
        raise UnsupportedError("compiling needs triton: pip install triton") from error
    kernel, arguments, _ = launch
    if not hasattr(kernel, "cache_key"):
        raise UnsupportedError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process, not compiled")
    signature, constants, attributes = _specialised(kernel, arguments)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source  # what its own launcher takes
    source = Source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=_target(arch), options=compile_options(config))
    _refuse_miscompiled(compiled.asm.get("ptx", ""), config)
    registers, spills = _usage(compiled.asm)
    return Resources(compiled.metadata.shared, registers, spills)


def _refuse_miscompiled(ptx: str, config: LaunchConfig) -> None:
    """What ptxas gets wrong is no candidate, and fails where a default is compiled (CONTRIBUTING.md)."""
    if IN_16_BITS.search(ptx):
        raise ConfigError(f"{config.name} counts in 16 bits, which ptxas 12.8 makes endless loops of; take other tiles")
    quotients = set(_HIGH_HALF.findall(ptx))
    widened = {wide for wide, narrow in _WIDENED.findall(ptx) if narrow in quotients}
    if widened.intersection(_MINUEND.findall(ptx)):
        raise ConfigError(
            f"{config.name} takes a difference of a quotient in 64 bits, which ptxas 12.8 and 12.9 get wrong by 2^32 "
            "where 0 is subtracted; take other tiles"
        )


def _shared(problem: Problem, order: str, arch: str) -> dict[str, Any]:
    """A call's values by name, with tensors that have no memory."""
    b, n, h, g, d = problem.batch, problem.length, problem.heads, problem.kv_heads, problem.head_dim

    def meta(*shape: int, dtype: torch.dtype = DTYPES[problem.dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    first, last = problem.query_range or (0, n)
    rows = n if problem.order != "none" else last - first
    q, k, v, dout = meta(b, rows, h, d), meta(b, n, g, d), meta(b, n, g, d), meta(b, rows, h, d)
    index = meta(n, dtype=torch.int32) if order == "hilbert" else None
    mask = meta(b, n, dtype=torch.bool) if problem.mask else None
    scale = d**-0.5
    dropout = Dropout(0.1, meta(1, dtype=torch.int64)) if problem.dropout else None
    shared = shared_values(problem, arch, scale, index, mask, dropout, q=q, k=k, v=v, dout=dout)
    row = meta(b, h, rows, dtype=torch.float32)
    shared.update(p_out=q, p_lse=row, p_delta=row, p_dq=q, p_dk=k, p_dv=v, dout_d=1)
    return shared


def _specialised(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and known divisibilities, as Triton's launcher finds them.

    Nothing known is an empty list, where a launch has one: then it finds what was compiled here in Triton's cache.
    """
    told = Toolchain.current().triton
    of_constants = told is None or not told.startswith("3.6.")  # which has one for constants that are words alone
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for parameter, (name, value) in zip(kernel.params, arguments.items(), strict=True):
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[name] = "constexpr"
            constants[name] = value
            if of_constants or isinstance(value, str):
                attributes[(parameter.num,)] = []
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            element = _POINTERS[value.base.dtype].removeprefix("*")
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # a text in Gluon has said it
            signature[name] = f"tensordesc<{element}{list(value.block_shape)}{layout}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not free:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ConfigError(f"{arch!r} is no architecture; expected e.g. 'sm_90' or 'gfx942'")


def _usage(asm: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Registers and spilled bytes a thread, read from the machine code."""
    if "cubin" in asm:
        return _cubin_usage(asm["cubin"])
    text = asm.get("amdgcn", "")
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    return int(registers[1]) if registers else None, 4 * int(spills[1]) if spills else None


def _cubin_usage(cubin: bytes) -> tuple[int | None, int | None]:
    tool = _cuobjdump()
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(usage[1]), int(usage[2])) if usage else (None, None)


def _cuobjdump() -> str | None:
    """NVIDIA's tool, which the triton wheel carries."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else shutil.which("cuobjdump")
