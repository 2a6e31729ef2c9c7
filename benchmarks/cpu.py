"""`python -m benchmarks.cpu`: the torch backend beside a careful composition of torch's own operations, on a CPU.

Both are first compared with each other. Times are medians of rounds in which the contenders take turns in a drawn
sequence, so that a busy or throttled machine slows all. The composition takes part twice: how far its two medians lie
apart is what this machine cannot tell. Each ratio has a 95 % bootstrap interval over the rounds; each peak is the
resident memory that a fresh process adds to its inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dilated_attention_pytorch as dap
from benchmarks import composition
from benchmarks.environment import environment
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.workloads import named

RESULT = Path(__file__).parent / "results" / "cpu_readme_longvit.json"
CALLS = (("readme", False), ("readme", True), ("longvit", False))
"""(workload, causal), in float32."""
MODES = {"forward": 3, "forward+backward": 1}
"""Times that each mode takes the rounds: a forward takes a third of the time, and more of them tell more."""
CONTENDERS = ("ours", "composition")
AGAIN = "composition again"
AGREEMENT = 1e-5

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(contender: str, problem: Problem, mix_grad: str = "exact") -> Attention:
    """One contender as a function of q, k and v."""
    lengths, rates = (list(values) for values in zip(*problem.branches, strict=True))
    if contender == "ours":
        return lambda q, k, v: dap.dilated_attention(
            q,
            k,
            v,
            lengths,
            rates,
            head_offset=problem.head_offset,
            is_causal=problem.causal,
            mix_grad=mix_grad,
            backend="torch",
        )
    return lambda q, k, v: composition.dilated_attention(
        q, k, v, lengths, rates, head_offset=problem.head_offset, is_causal=problem.causal
    )


def inputs(problem: Problem) -> list[Tensor]:
    """q, k, v and dout, seeded."""
    generator = torch.Generator().manual_seed(0)
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


def run(attend: Attention, mode: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, or dq, dk and dv."""
    if mode == "forward":
        with torch.no_grad():
            return (attend(q, k, v),)
    return torch.autograd.grad(attend(q, k, v), (q, k, v), dout)


def disagreement(problem: Problem) -> float:
    """Largest relative difference of out and gradients, both with the composition's detached mixing weights."""
    tensors = inputs(problem)
    worst = 0.0
    for mode in MODES:
        pair = [run(attention(name, problem, "detached"), mode, *tensors) for name in CONTENDERS]
        for a, b in zip(*pair, strict=True):
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def interleaved(problem: Problem, mode: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by contender; each round's sequence is drawn (seeded)."""
    tensors = inputs(problem)
    contenders = {name: attention(name, problem) for name in CONTENDERS}
    contenders[AGAIN] = contenders["composition"]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    draw = random.Random(0)
    for place in range(-1, rounds):
        for name in draw.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            run(contenders[name], mode, *tensors)
            if place >= 0:  # the round before is for warming up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    """Median of ours over the median of the composition's, of both its turns."""
    return statistics.median(seconds["ours"]) / statistics.median(seconds["composition"] + seconds[AGAIN])


def interval(seconds: dict[str, list[float]], draws: int = 2000) -> tuple[float, float]:
    """Bounds of 95 % of the ratios of as many rounds, drawn again with replacement (seeded)."""
    draw = random.Random(0)
    count = len(seconds["ours"])
    ratios = []
    for _ in range(draws):
        rounds = draw.choices(range(count), k=count)
        ratios.append(ratio({name: [values[place] for place in rounds] for name, values in seconds.items()}))
    ratios.sort()
    return ratios[draws // 40], ratios[-1 - draws // 40]


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, or VmHWM at most since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def added_memory(problem: Problem, contender: str, mode: str) -> int:
    """Bytes that one run adds to a process that holds the inputs; torch's own start-up is paid for beforehand."""
    tensors = inputs(problem)
    small = inputs(Problem("fp32", 1, 64, problem.heads, problem.heads, 8, ((16, 1), (32, 2))))
    run(attention(contender, Problem("fp32", 1, 64, problem.heads, problem.heads, 8, ((16, 1), (32, 2)))), mode, *small)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    results = run(attention(contender, problem), mode, *tensors)
    peak = resident("VmHWM")
    del results
    return peak - before


def in_fresh_process(place: int, contender: str, mode: str, threads: int) -> int:
    """`added_memory` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu",
        "--threads",
        str(threads),
        "--memory",
        str(place),
        contender,
        mode,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def problem_of(place: int) -> Problem:
    """The problem of one row of `CALLS`."""
    name, causal = CALLS[place]
    return named(name).problem(dtype="fp32", causal=causal)


def measure(rounds: int, threads: int) -> dict[str, object]:
    """Everything: environment and one row for each call and mode."""
    rows: list[dict[str, object]] = []
    for place, (name, causal) in enumerate(CALLS):
        problem = problem_of(place)
        difference = disagreement(problem)
        if difference > AGREEMENT:
            raise SystemExit(f"{name}: the contenders differ by {difference:.1e}, more than {AGREEMENT:.0e}")
        for mode, times in MODES.items():
            seconds = interleaved(problem, mode, times * rounds)
            peaks = {who: in_fresh_process(place, who, mode, threads) for who in CONTENDERS}
            medians = {who: statistics.median(values) for who, values in seconds.items()}
            low, high = interval(seconds)
            rows.append(
                {
                    "workload": name,
                    "causal": causal,
                    "mode": mode,
                    "median_s": {who: round(value, 4) for who, value in medians.items()},
                    "time_ratio": round(ratio(seconds), 3),
                    "time_ratio_95": [round(low, 3), round(high, 3)],
                    "noise": round(medians[AGAIN] / medians["composition"], 3),
                    "peak_bytes": peaks,
                    "memory_ratio": round(peaks["ours"] / peaks["composition"], 3),
                    "disagreement": float(f"{difference:.1e}"),
                    "seconds": {who: [round(value, 4) for value in values] for who, values in seconds.items()},
                }
            )
    return {
        "environment": {
            **environment(),
            "threads": threads,
            "dtype": "fp32",
            "rounds": rounds,
            "command": f"python -m benchmarks.cpu --rounds {rounds} --threads {threads}",
        },
        "rows": rows,
    }


def show(result: dict[str, object]) -> None:
    """Print the table."""
    table = Table(title="torch backend against gather, SDPA, scatter and mix (CPU, fp32)")
    for column in (
        "workload",
        "what",
        "ours",
        "composition",
        "ratio",
        "95 %",
        "itself",
        "memory",
        "composition",
        "ratio",
    ):
        table.add_column(column, justify="left" if column in ("workload", "what") else "right")
    for row in result["rows"]:  # type: ignore[attr-defined]
        table.add_row(
            row["workload"] + (" causal" if row["causal"] else ""),
            row["mode"],
            *(f"{row['median_s'][who]:.3f} s" for who in CONTENDERS),
            f"{row['time_ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["time_ratio_95"]),
            f"{row['noise']:.3f}",
            *(f"{row['peak_bytes'][who] / 2**20:.0f} MiB" for who in CONTENDERS),
            f"{row['memory_ratio']:.2f}",
        )
    console = Console()
    console.width = max(console.width, 110)  # a log has no width of its own
    console.print(table)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of a forward with its backward; forwards alone thrice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--memory", nargs=3, metavar=("CALL", "CONTENDER", "MODE"), help="peak of one run, in bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        place, contender, mode = arguments.memory
        print(added_memory(problem_of(int(place)), contender, mode))
        return
    result = measure(arguments.rounds, arguments.threads)
    show(result)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
