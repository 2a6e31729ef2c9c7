"""Configurations of the same launches timed again beside each other: what the measurements of the tuner share."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from dilated_attention_pytorch.config import ProblemKey
from dilated_attention_pytorch.database import FRESH, TOOLCHAIN_STALE, Database, Entry, status
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.tuning import ledger, machine
from dilated_attention_pytorch.tuning.journal import Journal, Measurement
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.search import candidate_of
from dilated_attention_pytorch.tuning.space import KERNEL, Candidate
from dilated_attention_pytorch.tuning.tune import Progress, Settings, tune

RESULTS = Path(__file__).resolve().parent / "results"
SAME = 1.02
"""Times no further apart than this factor are the same."""

Row = dict[str, Any]


def usable(found: Database, device: Device, name: str, toolchain: Toolchain) -> dict[ProblemKey, Entry]:
    """Entries of the device of this name, of the architecture of `device`, that a lookup takes as measured."""
    ops = sorted({path.stem for path in found.files() if path.parent.name == name})
    return {
        key: entry
        for op in ops
        for key, entry in found.entries(device.arch, name, op).items()
        if status(entry, device.arch, toolchain, found.kernels) in (FRESH, TOOLCHAIN_STALE)
    }


def side_by_side(
    first: Mapping[ProblemKey, Entry],
    second: Mapping[ProblemKey, Entry],
    tasks: Sequence[Task],
    device: Device,
    settings: Settings,
    shown: Progress,
) -> dict[str, Any]:
    """Each launch that both have an entry for: the time of the first's configuration over that of the second's.

    Where the two are the same it is 1 and nothing is run; the others are checked and timed in turn, with the untuned
    default. Where calls follow the one entry and launch branches together, and after the other apart, the ratio is what
    either entry's own times make of that, whichever is further from 1.

    Args:
        first: Entries by key.
        second: Entries by key.
        tasks: What the keys were measured on; others are counted as not asked.
        device: What measures.
        settings: Of the measuring; what is measured is settled here.
        shown: Who is told how far it is.

    Returns:
        Counts, and a row for each launch that was compared.
    """
    both = [task for task in tasks if task.key in first and task.key in second]
    picks = {task.key: [Candidate.of(side[task.key].config) for side in (first, second)] for task in both}
    differing = [task for task in both if len(set(picks[task.key])) > 1]
    journal = Journal()
    if differing:
        routes = {name: route for name, route in settings.routes.items() if name == KERNEL}
        journal = tune(
            differing,
            device,
            machine.run_row(device, "benchmarks.retimed"),
            replace(settings, root=None, limit=None, steps=0, finalists=2, routes=routes),
            ranked={task.key: picks[task.key] for task in differing},
            incumbents={task.key: picks[task.key][0] for task in differing},
            progress=shown,
        )
    rows = [
        _joined(row, first[task.key], second[task.key])
        for task in both
        for row in _compared(task, picks[task.key], journal)
    ]
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return {
        "entries": [len(first), len(second)],
        "in_both": len(first.keys() & second.keys()),
        "asked": len(both),
        "measured": len(ratios),
        "same_configuration": len(both) - len(differing),
        "share_within": sum(max(ratio, 1 / ratio) <= SAME for ratio in ratios) / len(ratios) if ratios else None,
        "geometric_mean": statistics.geometric_mean(ratios) if ratios else None,
        "best": min(ratios, default=None),
        "worst": max(ratios, default=None),
        "seconds": journal.ends[-1].seconds if differing else 0.0,
        "rows": rows,
    }


def _compared(task: Task, picks: Sequence[Candidate], journal: Journal) -> Iterator[Row]:
    """Nothing of a launch that no time was left for."""
    row = {"launch": ledger.title(task.key), "problem": asdict(task.problem), "op": task.op}
    if len(set(picks)) == 1:
        yield {**row, "configs": [pick.name for pick in picks], "ratio": 1.0, "failure": ""}
        return
    times, failure = timed(journal, task.key), failed(journal, task.key, picks)
    if failure or all(pick in times for pick in picks):
        told_of = [told(times.get(pick), pick) for pick in picks]
        ratio = None if failure else median(times[picks[0]]) / median(times[picks[1]])
        yield {**row, "configs": [pick.name for pick in picks], "times": told_of, "ratio": ratio, "failure": failure}


def _joined(row: Row, *sides: Entry) -> Row:
    """A row, with what it costs that only one of two entries has calls launch branches apart."""
    times = [side.time_us for side in sides]
    if row["ratio"] is None or times[0].is_beaten == times[1].is_beaten:
        return row
    apart_over_joint = [time.apart / time.median for time in times if time.apart is not None]
    ratios = [ratio if times[0].is_beaten else 1 / ratio for ratio in apart_over_joint]
    return {**row, "apart": [time.is_beaten for time in times], "ratio": max(ratios, key=lambda r: abs(math.log(r)))}


# ---- Rows of a journal -----------------------------------------------------------------------------------------------


def timed(journal: Journal, key: ProblemKey) -> dict[Candidate, Measurement]:
    """The times of a launch's candidates: of the finals, or of the race where one was too slow for them."""
    own = [row for row in journal.measurements if row.key == key and row.status == "ok" and row.median_us is not None]
    own.sort(key=lambda row: row.stage == "finals")
    # Who had no finals yet may come to them.
    return {candidate_of(row): row for row in own} if any(row.stage == "finals" for row in own) else {}


def failed(journal: Journal, key: ProblemKey, candidates: Sequence[Candidate]) -> str:
    """Why one of these candidates of a launch has no time, in words; "" where none failed."""
    failures = [
        f"{row.stage}: {row.status}, {row.message}"
        for row in journal.measurements
        if row.key == key and candidate_of(row) in candidates and row.status not in ("ok", "screened")
    ]
    return failures[0] if failures else ""


def told(row: Measurement | None, candidate: Candidate) -> Row:
    """A candidate and its time, if it has one."""
    if row is None:
        return {"config": candidate.name, "us": None}
    return {
        "config": candidate.name,
        "us": round(median(row), 3),
        "low": round(row.low_us or 0.0, 3),
        "high": round(row.high_us or 0.0, 3),
        "noisy": bool(row.flag),
    }


def median(row: Measurement) -> float:
    """Microseconds of a row that was timed."""
    assert row.median_us is not None, "it was timed"
    return row.median_us


# ---- The command -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, budget: float) -> None:
    """What all these measurements can be told."""
    parser.add_argument("--budget", type=float, default=budget, help=f"seconds (default {budget:g})")
    parser.add_argument("--journal", type=Path, help="a file that keeps the measurements: the same command goes on")
    parser.add_argument("--output", type=Path, help="the result file; named after the GPU unless given")


def settings(arguments: argparse.Namespace, folder: str) -> Settings:
    """Of a measurement that writes no database; its journal is kept where one is named."""
    journal = arguments.journal or Path(folder) / "run.jsonl"
    return Settings(journal, root=None, budget_s=arguments.budget)


def write(name: str, arguments: argparse.Namespace, device: Device, found: Mapping[str, Any]) -> Row:
    """The result file of a measurement, with its command and its environment."""
    document = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "environment": environment(),
        **found,
    }
    output = arguments.output or RESULTS / f"{name}_{device.name}.json"
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def us(told: Mapping[str, Any]) -> str:
    """A time in a table."""
    return "-" if told["us"] is None else f"{told['us']:.1f}"


def slowest_first(rows: Sequence[Row], name: str) -> list[Row]:
    """Rows by a ratio, those without one in front."""
    return sorted(rows, key=lambda row: -(math.inf if row[name] is None else row[name]))
