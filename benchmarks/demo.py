"""`make demo`: see it work, on the GPU if there is one, else on the CPU. Under three minutes.

Exit codes: 0 everything holds; 1 a check failed, or something was refused in a sentence; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from benchmarks import composition, flex, indexed, offline
from benchmarks.compare import SAMPLED, Contender, Row, compare, ours, steps, too_large
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.call_config import CallConfig
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.device import Toolchain
from dilated_attention_pytorch.errors import DilatedAttentionError
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.tuning import machine
from dilated_attention_pytorch.tuning.folding import is_noisy
from dilated_attention_pytorch.tuning.journal import Journal
from dilated_attention_pytorch.tuning.problems import of_calls
from dilated_attention_pytorch.tuning.screen import Resources
from dilated_attention_pytorch.tuning.tune import Settings, tune
from dilated_attention_pytorch.workloads import named
from tests.tolerances import TOLERANCES

OURS = "this package"
COMPOSITION = "SDPA composition"
FLEX = "FlexAttention"

SCREENED_FOR = "h100"
"""The GPU that is compiled for where there is none."""

CORE = {"length": 4096, "pattern": 1, "dtype": "bf16"}
"""Which of the workload `core`'s calls: every token asks every second key of its segment of 128."""

TUNED = Problem("fp32", batch=1, length=1024, heads=8, kv_heads=8, head_dim=64, branches=((256, 2),))
"""What is tuned where there is no GPU: a small call, so that it takes seconds."""


def main() -> int:
    """Runs the demo and returns its exit code."""
    # Set, kernels would be interpreted in this process, and neither compiled nor run on a GPU.
    os.environ.pop("TRITON_INTERPRET", None)
    console = Console(highlight=False)
    start = time.perf_counter()
    try:
        failures = _on_cpu(console) if _gpu_missing(console) else _on_gpu(console)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except DilatedAttentionError as error:
        console.print(f"refused: {error}", markup=False)
        return 1
    seconds = time.perf_counter() - start
    verdict = f"{'; '.join(failures)}: please report it" if failures else "Everything holds."
    console.print(f"{verdict} {seconds:.0f} s", markup=False)
    return 1 if failures else 0


def _gpu_missing(console: Console) -> bool:
    """Whether kernels cannot run here; what there is is printed."""
    device, triton = devices.current(), Toolchain.current().triton
    console.print(f"torch {torch.__version__}, triton {triton or 'not installed'}, {device or 'no GPU'}", markup=False)
    return device is None or triton is None


# ---- With a GPU ------------------------------------------------------------------------------------------------------


def _on_gpu(console: Console) -> list[str]:
    where = torch.device("cuda", torch.cuda.current_device())
    problems = {"longnet": named("longnet").problem(), "core": named("core").problem(**CORE)}
    failures = []
    with Bar.shown(console) as bar:
        for name, problem in problems.items():
            order = None
            if problem.order != "none":
                order = TokenOrder(problem.order).indices(problem.length).to(where)
            contenders = gpu_contenders(problem, where, order)
            bar.expect(steps(contenders))
            bar.now(f"{name}: kernels are compiled, checked, and timed beside torch's\n")
            found = compare(problem, contenders, where, order=order, progress=bar.done)
            chosen = plan(problem, devices.current(), "triton").fwd
            console.print(results(name, problem, found))
            console.print("kernels: " + ", ".join(choice.variant.name for choice in chosen), "\n")
            failures += broken(name, problem, found)
    return failures


def gpu_contenders(problem: Problem, where: torch.device, order: Tensor | None) -> dict[str, Contender]:
    """The generated kernels, torch's flash attention on gathered rows, and FlexAttention."""

    def composed() -> indexed.Attend:
        return partial(indexed.attention, rows=indexed.groups(problem, where, order))

    return {
        OURS: Contender(lambda: ours(problem, "triton")),
        COMPOSITION: Contender(composed, mix_grad="detached"),
        FLEX: Contender(lambda: flex.attention(problem, where, order)),
    }


# ---- Without one -----------------------------------------------------------------------------------------------------


def _on_cpu(console: Console) -> list[str]:
    failures = []
    with Bar.shown(console) as bar:
        if Toolchain.current().triton is None:
            console.print("Without triton no kernel is compiled or interpreted here: pip install triton (on Linux)")
        else:
            failures += _compiled(console, bar)
            failures += _interpreted(console, bar)
        problem = named("readme").problem(dtype="fp32")
        contenders = cpu_contenders(problem)
        bar.expect(steps(contenders))
        bar.now("readme: the torch backend is checked, and timed beside torch's SDPA\n")
        found = compare(problem, contenders, torch.device("cpu"), progress=bar.done)
        console.print(results("readme", problem, found), "")
        failures += broken("readme", problem, found)
        failures += _tuned(console, bar)
    return failures


def cpu_contenders(problem: Problem) -> dict[str, Contender]:
    """The torch backend, and torch's flash attention on rows that are read through views."""
    lengths, rates = zip(*problem.branches, strict=True)
    composed = partial(
        composition.dilated_attention, segment_lengths=lengths, dilation_rates=rates, head_offset=problem.head_offset
    )
    return {
        OURS: Contender(lambda: ours(problem, "torch")),
        COMPOSITION: Contender(lambda: composed, mix_grad="detached"),
    }


def _compiled(console: Console, bar: Bar) -> list[str]:
    """What the kernels of `longnet` take of a GPU that is not here."""
    device = devices.simulated(SCREENED_FOR)
    wanted = offline.launches(named("longnet").problem(), device)
    bar.expect(len(wanted))
    bar.now(f"longnet: {len(wanted)} launches are compiled for {device.arch}, which needs no GPU\n")
    found = []
    for launch, taken in offline.compiled(wanted, device.arch):
        found.append((launch, taken))
        bar.done(f"compiled {launch.choice.variant.name} {launch.choice.op}")
    console.print(resources(found, device), "")
    bad = [f"{launch.choice.variant.name} {launch.choice.op}" for launch, taken in found if not fits(taken, device)]
    return [f"{', '.join(bad)}: does not compile or does not fit {device.name}"] if bad else []


def _interpreted(console: Console, bar: Bar) -> list[str]:
    """Kernels on CPU tensors; Triton's interpreter and compiler cannot share a process."""
    bar.expect(1)
    bar.now("The seed's core in Triton's interpreter, against the float64 oracle")
    command = [sys.executable, "-m", "benchmarks.interpreted"]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    bar.done("interpreted")
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        console.print(f"Triton's interpreter did not run: {reason}\n", markup=False)
        return ["the interpreter did not run"]
    found = json.loads(child.stdout)
    bound = TOLERANCES["fp32"]
    console.print(f"interpreted {', '.join(found['kernels'])}")
    told = ", ".join(f"{name} {error:.0e}" for name, error in found["errors"].items())
    console.print(f"errors: {told}; bounds {bound.out:.0e} and {bound.grad:.0e}\n")
    wrong = too_large(found["errors"], "fp32")
    return [f"interpreted: {wrong}"] if wrong else []


def _tuned(console: Console, bar: Bar) -> list[str]:
    """The tuner's whole loop on this processor, into a folder that is gone afterwards."""
    processor = devices.cpu()
    tasks = of_calls([("demo", TUNED)], processor)
    bar.expect(1)
    bar.now(f"tune: ways to call torch's kernels are checked against the oracle and raced on {processor}\n")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            journal=Path(folder, "run.jsonl"),
            root=Path(folder, "tune_db"),
            gpus=("cpu",),
            limit=6,
            race_us=5e4,
            finals_us=2e5,
            compiler=None,
        )
        journal = tune(tasks, processor, machine.run_row(processor, "make demo"), settings)
    bar.done("tuned")
    console.print(picks(journal), "")
    return [] if len(journal.picks) == len(tasks) else ["tune: no way to call torch's kernels works"]


# ---- What is printed -------------------------------------------------------------------------------------------------


def results(name: str, problem: Problem, found: Mapping[str, Row | str]) -> Table:
    """Times, memory and errors of a workload; a contender without them has its reason."""
    branches = ", ".join(f"{segment}:{rate}" for segment, rate in problem.branches)
    shape = f"B {problem.batch}, N {problem.length}, H {problem.heads}, D {problem.head_dim}, {problem.dtype}"
    first = found[OURS]
    bound = TOLERANCES[problem.dtype]
    table = _table(
        f"{name}: {shape}, branches {branches}",
        ("", "forward\nms", "fwd+bwd\nms", "ratio", "peak\nMiB", "error\nout", "error\ngradients"),
        f"Ratio: of fwd+bwd to ours. Errors: against float64 on {SAMPLED + 2} rows, gradients of these rows whole; "
        f"bounds {bound.out:.0e} and {bound.grad:.0e}.",
    )
    for contender, row in found.items():
        if isinstance(row, str):
            table.add_row(contender, "skipped", *[""] * 5)
            assert table.caption is not None
            table.caption = f"{table.caption}\n{contender}: {escape(row)}"
            continue
        table.add_row(
            contender,
            _milliseconds(row.forward.median),
            _milliseconds(row.both.median),
            f"{row.both.median / first.both.median:.2f}" if isinstance(first, Row) else "",
            f"{row.peak / 2**20:.0f}",
            f"{row.errors['out']:.1e}",
            f"{max(error for result, error in row.errors.items() if result != 'out'):.1e}",
        )
    return table


def broken(name: str, problem: Problem, found: Mapping[str, Row | str]) -> list[str]:
    """What is wrong with our own row, in sentences; the others are only shown."""
    row = found[OURS]
    wrong = row if isinstance(row, str) else too_large(row.errors, problem.dtype)
    return [f"{name}: {wrong}"] if wrong else []


def picks(journal: Journal) -> Table:
    """What was picked on a CPU, and what it gained over the untuned default."""
    branches = ", ".join(f"{segment}:{rate}" for segment, rate in TUNED.branches)
    table = _table(
        f"tuned: B {TUNED.batch}, N {TUNED.length}, H {TUNED.heads}, D {TUNED.head_dim}, {TUNED.dtype}, {branches}",
        ("", "pick", "untuned\nms", "picked\nms", "gain", "why"),
        "view_p1_s4: rows are read where they lie, a call has 1 pair a thread at least and 1/4 of q at most.",
    )
    for pick in journal.picks:
        untuned = pick.default_us or pick.median_us
        table.add_row(
            "forward" if pick.key.op == "fwd" else "backward",
            CallConfig(**pick.config).name,  # type: ignore[arg-type]
            _milliseconds(untuned / 1e3),
            _milliseconds(pick.median_us / 1e3),
            f"{untuned / pick.median_us:.2f}",
            pick.why,
        )
    if any(is_noisy(pick, journal) for pick in journal.picks):
        assert table.caption is not None
        table.caption = (
            f"{table.caption}\nTimes spread wide, as something else runs here: a real run keeps no such pick."
        )
    return table


def resources(found: Sequence[tuple[offline.Launch, Resources | str]], device: devices.Device) -> Table:
    """What each launch takes; a launch that does not compile has its reason."""
    table = _table(
        f"longnet, compiled for {device.name} ({device.arch})",
        ("variant", "op", "config", "shared\nbytes", "regs", "spills\nbytes"),
        f"There are {device.shared_bytes:,} bytes a block, and 255 registers a thread.",
    )
    for launch, taken in found:
        config = launch.choice.config
        row = [folded(launch.choice.variant.name, 24), launch.choice.op, folded(config.name, 18)]
        if isinstance(taken, str):
            table.add_row(*row, "failed", "", "")
            assert table.caption is not None
            table.caption = f"{table.caption}\n{launch.choice.variant.name} {row[1]}: {escape(taken)}"
        else:
            table.add_row(*row, f"{taken.shared_bytes:,}", _or_dash(taken.registers), _or_dash(taken.spills))
    return table


def folded(name: str, width: int) -> str:
    """A name whose words `_` joins, on as many lines as it takes: 80 columns hold no table of long ones."""
    if len(name) <= width:
        return name
    cut = name.rfind("_", 1, width + 1)
    return f"{name[:cut]}\n{folded(name[cut:], width)}"


def fits(taken: Resources | str, device: devices.Device) -> bool:
    """It compiled, and the device can launch it."""
    return not isinstance(taken, str) and taken.shared_bytes <= device.shared_bytes


def _milliseconds(time: float) -> str:
    return f"{time:.3f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:,.0f}"


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def _table(title: str, columns: Sequence[str], caption: str) -> Table:
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.title_justify = table.caption_justify = "left"
    words = ("", "variant", "op", "config", "pick", "why")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    return table


@dataclass
class Bar:
    """Progress: a bar on a terminal, a line for each part of the work elsewhere."""

    console: Console
    progress: Progress

    @classmethod
    @contextmanager
    def shown(cls, console: Console) -> Iterator[Bar]:
        """Until the block ends, however it ends."""
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            progress.add_task("", total=0)
            yield cls(console, progress)

    def expect(self, steps: int) -> None:
        """So many steps more."""
        task = self.progress.tasks[0]
        self.progress.update(task.id, total=(task.total or 0) + steps)

    def now(self, text: str) -> None:
        """A part of the work begins."""
        self.console.print(text)

    def done(self, text: str) -> None:
        """One step of it is over."""
        self.progress.update(self.progress.tasks[0].id, advance=1, description=text)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.exit(main())
