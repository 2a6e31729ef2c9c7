"""Who takes part: this package, and everything else that computes the same, in its best honest form."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import composed, flex
from benchmarks.cases import Case, useful_flops
from benchmarks.compare import Contender, ours
from benchmarks.composed import Kernel
from benchmarks.rows import Attend
from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.runtime.plan import plan

OURS = "this package"
UNORDERED = "this package, no order"
DENSE = "dense, cuDNN"
CUDNN, FLASH_2, FLASH_4, EFFICIENT = "cuDNN", "FlashAttention-2", "FlashAttention-4", "memory-efficient"
FLEX, FLEX_TMA = "FlexAttention", "FlexAttention, TMA"
"""Of gathered rows where a branch's kernel is timed, of everything under an exact mask where a whole operation is."""
COMPILED_CUDNN = "cuDNN, gathered, compiled"
TORCHSCALE = "torchscale's way, FlashAttention-2, eager"

NOT_PEERS = (OURS, UNORDERED, DENSE)
"""Everybody else computes the same as we do, so that a ratio means something."""

LONGEST_S = 2.0
"""Dense attention that would take longer is not tried."""
DENSE_TFLOPS = 300.0

MOST_RESIDUES = 8
"""Of all branches together, for the compositions that compile slowest."""

# Compiled by one process, read by the next. Set before the library is imported.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def contenders(case: Case, where: torch.device) -> dict[str, Contender]:
    """All that take part in a case, by name; ours is first."""
    return {"kernels": _kernels, "operations": _operations, "latency": _first_calls, "scale": _scaled}[case.level](
        case, where
    )


def _this_package(case: Case, problem: Problem | None = None) -> Contender:
    given = case.problem if problem is None else problem
    order = case.order if given.order != "none" else None
    return Contender(partial(ours, given, None, order), problem=problem, compiles=True)


def _kernels(case: Case, where: torch.device) -> dict[str, Contender]:
    found = {OURS: _this_package(case)}
    if case.order is not None:
        found[UNORDERED] = _this_package(case, replace(case.problem, order="none", row_width=0))
    for name, kernel in _libraries(case.problem).items():
        found[name] = Contender(partial(_alone, kernel, case.problem), packed=True, compiles=name == FLASH_4)
    if case.slow:
        rows, causal = case.problem.rows(0), case.problem.causal
        for name, tma in ((FLEX, False), (FLEX_TMA, True)):
            make = partial(flex.packed, rows, causal, where, tma=tma)
            found[name] = Contender(make, packed=True, compiles=True)
    return found


def _alone(kernel: Kernel, problem: Problem) -> Attend:
    return lambda q, k, v: kernel(q, k, v, problem.causal)[0]


def _operations(case: Case, where: torch.device) -> dict[str, Contender]:
    problem, libraries = case.problem, _libraries(case.problem)
    found = {OURS: _this_package(case)}

    def index() -> Tensor | None:
        return None if case.order is None else case.order.indices(problem.length).to(where)

    def composition(kernel: Kernel, *, whole: bool = False, **forms: Any) -> Contender:
        def make() -> Attend:
            attend = composed.attention(problem, kernel, order=index(), **forms)
            return compiled(attend) if whole else attend

        return Contender(make, mix_grad="detached", compiles=whole or "wrap" in forms)

    # A graph with so many kernels as residues takes minutes to trace where there are many.
    traceable = case.slow or sum(rate for _, rate in problem.branches) <= MOST_RESIDUES
    for name, kernel in libraries.items():
        if name == FLASH_4:
            if traceable:
                found[f"{name}, gathered, mixing compiled"] = composition(kernel, wrap=compiled)
            continue
        found[f"{name}, gathered, compiled"] = composition(kernel, whole=True)
        if name == FLASH_2:
            continue
        found[f"{name}, gathered, eager"] = composition(kernel)
        if problem.queries == "dilated":
            found[f"{name}, strided views, eager"] = composition(kernel, apart=True)
            if traceable:
                found[f"{name}, strided views, compiled"] = composition(kernel, apart=True, whole=True)
    if problem.queries == "dilated" and case.order is None and FLASH_2 in libraries:
        padded = problem if problem.causal else replace(problem, padding="zeros")
        make = partial(composed.torchscale, problem, libraries[FLASH_2])
        found[TORCHSCALE] = Contender(make, mix_grad="detached", problem=padded)
    if case.slow:
        found[f"{FLEX}, gathered, compiled"] = composition(flex.with_lse, whole=True)
        for name, tma in ((FLEX, False), (FLEX_TMA, True)):
            found[name] = Contender(lambda tma=tma: flex.attention(problem, where, index(), tma=tma), compiles=True)
    return found


def _first_calls(case: Case, where: torch.device) -> dict[str, Contender]:
    every = _operations(replace(case, slow=False), where)
    return {name: every[name] for name in (OURS, COMPILED_CUDNN) if name == OURS or case.slow}


def _scaled(case: Case, where: torch.device) -> dict[str, Contender]:
    dense = replace(case.problem, branches=((case.problem.length, 1),), padding="none")

    def make() -> Attend:
        seconds = (1 + 2.5) * useful_flops(dense) / DENSE_TFLOPS / 1e12
        if seconds > LONGEST_S:
            raise NotImplementedError(f"would take {seconds:.0f} s a step")
        return composed.attention(dense, _cudnn)

    return {OURS: _this_package(case), DENSE: Contender(make, problem=dense)}


def launches(problem: Problem) -> list[str]:
    """What this package runs for a problem here: text, operation, configuration and where it is from; or a backend."""
    chosen = plan(problem, device.current())
    return [
        f"{choice.variant.name} {choice.op} {choice.config.name} ({choice.rung})" for choice in chosen.launches
    ] or [chosen.backend]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, which is refused rather than left to run parts eagerly."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def set_up_compilers() -> None:
    """As every process that compiles or times has them: what one leaves on the disk is found by the others."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # there is a process a core already
    torch._dynamo.config.recompile_limit = 64  # each contender of a case counts, with gradients and without
    with contextlib.suppress(AttributeError):
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True


# ---- Libraries -------------------------------------------------------------------------------------------------------


def _libraries(problem: Problem) -> dict[str, Kernel]:
    """What torch and FlashAttention offer for a dtype."""
    if problem.dtype == "fp32":
        return {EFFICIENT: _efficient}
    found: dict[str, Kernel] = {CUDNN: _cudnn, FLASH_2: _flash_2}
    if importlib.util.find_spec("flash_attn") is not None:
        found[FLASH_4] = _flash_4
    return found


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    return out, lse.flatten(2)


def _flash_2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse[:, :, : q.shape[2]]


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out, lse[:, :, : q.shape[2]]


def _flash_4(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    out, lse = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, return_lse=True)
    return out.transpose(1, 2), lse
