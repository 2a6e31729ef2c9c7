"""How far a run is: a bar with the time that is left on a terminal, a line a task elsewhere. Both go to stderr."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

from .journal import Pick
from .problems import Task
from .search import candidate_of
from .tune import Progress


def shown(budget_s: float = math.inf, *, quiet: bool = False) -> Progress:
    """What suits where stderr goes: a bar if that is a terminal and rich is installed.

    Args:
        budget_s: Seconds that the run may take.
        quiet: Show nothing.
    """
    if quiet:
        return Progress()
    if sys.stderr.isatty():
        try:
            return Bar(budget_s)
        except ImportError:
            pass
    return Lines(budget_s)


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
    """A line when a task is done, with the number of tasks and the time that is left, of the budget at most."""

    def __init__(self, budget_s: float = math.inf) -> None:
        self._budget_s = budget_s

    def begin(self, tasks: int, done: int) -> None:
        """Say what is ahead."""
        self._tasks, self._before, self._done, self._begun = tasks, done, done, time.monotonic()
        resumed = f", {done} of them done before" if done else ""
        print(f"{tasks} problems to tune{resumed}", file=sys.stderr, flush=True)

    def picked(self, task: Task, pick: Pick | None) -> None:
        """Say what came of it."""
        self._done += 1
        gone = time.monotonic() - self._begun
        expected = gone / (self._done - self._before) * (self._tasks - self._done)
        left = f"{min(expected, _of_budget(self._budget_s, gone)):.0f} s left"
        print(f"[{self._done}/{self._tasks}, {left}] {outcome(task, pick)}", file=sys.stderr, flush=True)


def _of_budget(budget_s: float, gone: float) -> float:
    """Seconds that are left of it."""
    return max(budget_s - gone, 0.0)


class Bar(Progress):
    """rich's bar, below a line for each task that is done; the time that is left is of the budget at most.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, budget_s: float = math.inf) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.progress import Task as Row
        from rich.text import Text

        class TimeLeft(ProgressColumn):
            max_refresh = 0.5

            def render(self, task: Row) -> Text:
                expected = math.inf if task.time_remaining is None else task.time_remaining
                left = min(expected, _of_budget(budget_s, task.elapsed or 0.0))
                return Text("-:--:--" if left == math.inf else str(timedelta(seconds=int(left))))

        columns: tuple[Any, ...] = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
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
