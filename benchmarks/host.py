"""What the host takes to queue a call, beside `scaled_dot_product_attention`: `python -m benchmarks.host`.

It matters wherever the GPU is faster than the host: short sequences, small models, generation. A series of calls is
queued without waiting for the GPU, and is short enough for its queue; series of all contenders take turns. The backward
is `torch.autograd.grad` on a graph that is kept. "no kernels" is what torch alone takes of that: an autograd node in
Python that saves its inputs and allocates its results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dilated_attention_pytorch as dap
from benchmarks.compare import ours
from benchmarks.environment import environment
from benchmarks.timing import summary
from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.tuning.screen import DTYPES
from dilated_attention_pytorch.workloads import WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"
CALLS, SERIES = 20, 25
"""A call of five branches has at most eleven launches; a thousand fit the queue."""

WHAT = ("no grad", "recorded", "backward")
PACKED = 2048
"""Rows of the peer's sequences, packed and contiguous; how many there are is nothing to its host."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases() -> dict[str, Problem]:
    """LongNet's five branches, the core's one, and LongNet's second branch alone."""
    longnet, core = WORKLOADS["longnet"].problem(), WORKLOADS["core"].problem(dtype="bf16")
    return {"longnet": longnet, "core": core, "one branch": replace(longnet, branches=longnet.branches[1:2])}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the result file; named after the GPU unless given")
    arguments = parser.parse_args()
    gpu = device.current()
    if gpu is None:
        print("this measurement needs a GPU")
        return 2
    rows = [row for name, problem in cases().items() for row in measured(name, problem)]
    document = {
        "what": f"microseconds of the host a call: the median of {SERIES} series of {CALLS}, and its 95 % interval",
        "command": " ".join(["python -m benchmarks.host", *sys.argv[1:]]),
        "environment": environment(),
        "warm lookup": {name: lookup(problem) for name, problem in cases().items()},
        "rows": rows,
    }
    path = arguments.output or RESULTS / f"host_{gpu.name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(rows)
    print("a warm lookup:", ", ".join(f"{name} {us:.2f} us" for name, us in document["warm lookup"].items()))
    return 0


class NoKernels(torch.autograd.Function):
    """Memory for out and lse, then for the gradients and delta, as every attention allocates; nothing fills it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Something of the shape of out."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        """Something of the shapes of the gradients."""
        q, k, v, _, lse = ctx.saved_tensors
        torch.empty_like(lse)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def measured(name: str, problem: Problem) -> list[dict[str, object]]:
    """A row for each contender."""
    batch, length, heads, head_dim = problem.batch, problem.length, problem.heads, problem.head_dim
    packed = batch * length // min(length, PACKED), heads, min(length, PACKED), head_dim
    contenders = {
        "ours": _calls(ours(problem, None), (batch, length, heads, head_dim), DTYPES[problem.dtype]),
        "SDPA": _calls(scaled_dot_product_attention, packed, DTYPES[problem.dtype]),
        "no kernels": _calls(NoKernels.apply, (batch, length, heads, head_dim), DTYPES[problem.dtype]),
    }
    times: dict[str, dict[str, list[float]]] = {contender: {what: [] for what in WHAT} for contender in contenders}
    for _ in range(SERIES):
        for contender, calls in contenders.items():
            for what, call in calls.items():
                with torch.set_grad_enabled(what != "no grad"):
                    times[contender][what].append(series(call))
    return [
        {"case": name, "contender": contender, **{what: summary(times[contender][what]) for what in WHAT}}
        for contender in contenders
    ]


def _calls(attend: Attend, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    q, k, v = (torch.randn(shape, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    calls = (
        lambda: attend(q, k, v),
        lambda: attend(q, k, v),
        lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    )
    return dict(zip(WHAT, calls, strict=True))


def series(call: Callable[[], object]) -> float:
    """Microseconds a call, none of which waits for the GPU."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    taken = 1e6 * (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return taken


def lookup(problem: Problem) -> float:
    """Microseconds in which a plan that was made before is found: the least mean of a series."""
    gpu, calls = device.current(), 20 * CALLS
    plan(problem, gpu)
    return 1e6 * min(timeit.repeat(lambda: plan(problem, gpu), number=calls, repeat=SERIES)) / calls


def show(rows: list[dict[str, object]]) -> None:
    """The medians."""
    table = Table(
        *("case", "contender", *(f"{what}, us" for what in WHAT)), title=f"dilated attention {dap.__version__}"
    )
    for row in rows:
        table.add_row(str(row["case"]), str(row["contender"]), *(f"{row[what][0]:.1f}" for what in WHAT))  # type: ignore[index]
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
