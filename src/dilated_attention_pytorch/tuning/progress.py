"""How far a run is: a bar with the time that is left on a terminal, a line a task elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from .journal import Pick
from .problems import Task
from .search import candidate_of
from .tune import Progress


def shown(quiet: bool = False) -> Progress:
    """What suits where stderr goes: a bar if that is a terminal and rich is installed."""
    if quiet:
        return Progress()
    if sys.stderr.isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines()


def title(task: Task) -> str:
    """`longnet dkdv bf16 [2048, 1] causal`: enough to tell a run's tasks apart."""
    key = task.key
    words = [task.workload, key.op, key.dtype, *(f"[{rows}, {stride}]" for rows, stride in key.branches)]
    words += [key.order] if key.order != "none" else []
    words += ["all"] if key.queries == "all" else []
    words += ["causal"] if key.causal else []
    return " ".join([*words, *key.flags])


def outcome(task: Task, pick: Pick | None) -> str:
    """What came of a task, as a line."""
    if pick is None:
        return f"{title(task)}: no candidate works; the journal has the reasons"
    gain = f", default {pick.default_us:.1f} us" if pick.default_us else ""
    apart = f", apart {pick.apart_us:.1f} us" if pick.apart_us else ""
    return f"{title(task)}: {candidate_of(pick).name} {pick.median_us:.1f} us ({pick.why}{gain}{apart})"


class Lines(Progress):
    """A line when a task is done, with the number of tasks and the time that is left."""

    def begin(self, tasks: int, done: int) -> None:
        """Say what is ahead."""
        self._tasks, self._before, self._done, self._begun = tasks, done, done, time.monotonic()
        resumed = f", {done} of them done before" if done else ""
        print(f"{tasks} problems to tune{resumed}", file=sys.stderr, flush=True)

    def picked(self, task: Task, pick: Pick | None) -> None:
        """Say what came of it."""
        self._done += 1
        each = (time.monotonic() - self._begun) / (self._done - self._before)
        left = f"{each * (self._tasks - self._done):.0f} s left"
        print(f"[{self._done}/{self._tasks}, {left}] {outcome(task, pick)}", file=sys.stderr, flush=True)


class Bar(Progress):
    """rich's bar, below a line for each task that is done.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns: tuple[Any, ...] = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True, highlight=False), transient=True)

    def begin(self, tasks: int, done: int) -> None:
        """Draw it."""
        self._bar.start()
        self._row = self._bar.add_task("compiling", total=tasks, completed=done)

    def note(self, text: str) -> None:
        """Beside the bar."""
        self._bar.update(self._row, description=text)

    def picked(self, task: Task, pick: Pick | None) -> None:
        """Above the bar."""
        self._bar.console.print(outcome(task, pick), markup=False)
        self._bar.advance(self._row)

    def end(self) -> None:
        """Take it away."""
        self._bar.stop()
