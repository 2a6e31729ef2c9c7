"""A whole run: prepare, check and time case after case; a result file that is whole whenever it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import latency, measure, prepare, results
from benchmarks.cases import Case
from benchmarks.compare import Contender
from benchmarks.contenders import OURS, contenders, set_up_compilers
from benchmarks.environment import environment
from benchmarks.measure import Settings, Sticky
from benchmarks.results import LEFT_OUT, Document

PREPARED_TOGETHER = 48
PREPARING = 0.45
"""Of what is left of the budget, for compilers."""

WHAT = (
    "ms are [median, low, high] of the GPU's time with a cold level-2 cache, low to high a 95 % interval of the median;"
    " contenders take turns; gradients of a case's backward are all three; peak_bytes are above the inputs; a ratio is"
    " the best peer's time over ours"
)

Contenders = Callable[[Case, torch.device], dict[str, Contender]]


def run(
    cases: Sequence[Case],
    where: torch.device,
    path: Path,
    settings: Settings,
    *,
    budget: float,
    resume: bool,
    processes: int = prepare.PROCESSES,
    command: str = "python -m benchmarks",
    participants: Contenders = contenders,
    ceilings: Callable[[torch.device], Mapping[str, float]] = measure.ceilings,
    shown: Callable[[int], Shown] | None = None,
) -> Document:
    """Measure cases and write each to the result file when it is done.

    Args:
        cases: The most important first.
        where: The torch device.
        path: The result file. What it has of other cases stays.
        settings: How thoroughly.
        budget: Seconds after which no further case begins.
        resume: Cases that the file has are not measured again.
        processes: That compile at a time; 0 leaves it to the process that times.
        command: As the file tells it.
        participants: Who takes part in a case.
        ceilings: Measures the GPU's.
        shown: Makes what shows the progress of so many cases.

    Returns:
        What the file holds.

    Raises:
        Sticky: A contender spoiled the GPU. The file says so; a new process can resume.
    """
    begun = time.monotonic()
    document = results.load(path) if path.is_file() else {"what": WHAT, "runs": [], "cases": {}, "spoiled": {}}
    if resume:
        cases = [case for case in cases if case.name not in document["cases"]]
    else:
        document["spoiled"] = {}
    if where.type == "cuda":
        set_up_compilers()
    number = _begin(document, command, settings, ceilings(where))
    measure.release()

    def left() -> float:
        return budget - (time.monotonic() - begun)

    with (Shown if shown is None else shown)(len(cases)) as display:
        for together in _batches(cases):
            if left() <= 0:
                break
            wanted = prepare.jobs(together, where) if processes else []
            start = time.monotonic()
            prepared = prepare.prepare(wanted, str(where), PREPARING * left(), display.note, processes)
            if wanted:
                seconds = time.monotonic() - start
                failed = [f"\n    {case.name}, {who}: {why}" for (case, who), why in prepared.failed.items()]
                display.say(
                    f"{len(wanted)} contenders prepared in {seconds:.0f} s; {len(prepared.left)} are not ready, "
                    f"{len(failed)} ended their process{''.join(failed)}"
                )
            for case in together:
                if left() <= 0:
                    break
                without = _without(case, prepared, document)
                start = time.monotonic()
                display.begin(case.name)
                try:
                    rows = _rows(case, where, settings, participants, without, display.note)
                except Sticky as spoiled:
                    document["spoiled"].setdefault(case.name, {})[str(spoiled)] = measure.told(spoiled.__cause__)
                    results.save(document, path)
                    raise
                found = results.record(case, rows, document["runs"][number]["ceilings"], time.monotonic() - start)
                document["cases"][case.name] = {"run": number, **found}
                results.save(document, path)
                display.done(case.name, found)
    document["runs"][number]["left_out"] = [case.name for case in cases if case.name not in document["cases"]]
    document["runs"][number]["seconds"] = round(time.monotonic() - begun)
    _drop_empty_runs(document)
    results.save(document, path)
    return document


def _rows(
    case: Case,
    where: torch.device,
    settings: Settings,
    participants: Contenders,
    without: Mapping[str, str],
    note: Callable[[str], None],
) -> Mapping[str, Any]:
    """Of a case; where there is no memory for its inputs, nobody has one but for that reason."""
    if case.level == "latency":
        return latency.measure(case, where, note)
    who = participants(case, where)
    try:
        return measure.measure(case, who, where, settings, ours=OURS, without=without, note=note)
    except torch.OutOfMemoryError as error:
        return {name: {"failed": f"no memory for the inputs: {measure.told(error)}"} for name in who}


def again() -> None:
    """Start this program anew, to go on behind what spoiled the GPU."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *arguments, "--resume"])


def _begin(document: Document, command: str, settings: Settings, ceilings: Mapping[str, float]) -> int:
    """The number of a run; one that goes on in the same environment is the same."""
    found = environment()
    for number, run in enumerate(document["runs"]):
        same = run["environment"] == found and run["settings"] == asdict(settings)
        if same and results.zero_rows(run) == results.ZERO_ROWS:
            run["commands"] += [command] if command not in run["commands"] else []
            return number
    document["runs"].append(
        {
            "commands": [command],
            "environment": found,
            "settings": asdict(settings),
            "zero_rows": results.ZERO_ROWS,
            "ceilings": dict(ceilings),
        }
    )
    return len(document["runs"]) - 1


def _drop_empty_runs(document: Document) -> None:
    """Runs of which every case was measured again since."""
    used = sorted({case["run"] for case in document["cases"].values()})
    document["runs"] = [document["runs"][number] for number in used]
    for case in document["cases"].values():
        case["run"] = used.index(case["run"])


def _batches(cases: Iterable[Case]) -> Iterable[list[Case]]:
    for _, tier in groupby(cases, key=lambda case: case.tier):
        together = list(tier)
        for start in range(0, len(together), PREPARED_TOGETHER):
            yield together[start : start + PREPARED_TOGETHER]


def _without(case: Case, prepared: prepare.Prepared, document: Document) -> dict[str, str]:
    """Who is not tried in a case, with the reason; ours is compiled where it is timed, if it must."""
    reasons = {name: f"{LEFT_OUT}: not compiled within the budget" for of, name in prepared.left if of == case}
    reasons.pop(OURS, None)
    reasons |= {name: reason for (of, name), reason in prepared.failed.items() if of == case}
    return reasons | document["spoiled"].get(case.name, {})


# ---- Showing ---------------------------------------------------------------------------------------------------------


class Shown(AbstractContextManager["Shown"]):
    """A bar on a terminal, and a line for every case that is done."""

    def __init__(self, cases: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 150)
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=cases)
        self._name = ""

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A case begins."""
        self._name = name
        self.note("")

    def note(self, text: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=f"{self._name} {text}".strip())

    def done(self, name: str, case: Mapping[str, Any]) -> None:
        """A case is done: its ratios and who failed."""
        self._bar.advance(self._task)
        self.say(line(name, case))

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)


def line(name: str, case: Mapping[str, Any]) -> str:
    """A case in a line: milliseconds of ours, the best peer and the ratio; the reasons of those who failed."""
    words = [f"{name} ({case['seconds']:.0f} s)"]
    for measurement in results.MEASUREMENTS:
        mine, peer = results.median(case["rows"].get(OURS, {}), measurement), results.best_peer(case, measurement)
        if mine is not None:
            beside = "" if peer is None else f", {peer[0]} {peer[1]:.4g}: {peer[1] / mine:.2f}"
            words.append(f"{measurement} {mine:.4g} ms{beside}")
    failed = [f"{who}: {row['failed']}" for who, row in case["rows"].items() if "failed" in row]
    return "\n    ".join(["; ".join(words), *failed])
