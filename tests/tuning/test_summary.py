"""What a run came to, and how far it is: the lines that a person acts on."""

from __future__ import annotations

import builtins
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch.tuning import progress, summary
from dilated_attention_pytorch.tuning.journal import End, Journal, Measurement, Pick, Row
from dilated_attention_pytorch.tuning.ledger import title
from dilated_attention_pytorch.tuning.problems import Task

from .standin import tasks

TASKS = {task.op: task for task in tasks()}
CONFIG = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}


def pick(task: Task, median: float, default: float | None = None) -> Pick:
    return Pick(task.key, CONFIG, "kernel", "fastest", median, median, median, default, None, 7)


def final(task: Task, route: str, median: float) -> Measurement:
    return Measurement(task.key, {}, route, None, "finals", "ok", median, median, median)


def of(*rows: Row) -> Journal:
    journal = Journal()
    for row in rows:
        journal.add(row)
    return journal


def told(journal: Journal) -> dict[str, Any]:
    return summary.values(journal, list(TASKS.values()), Path("run.jsonl"), None)


def test_a_rivals_backward_is_judged_beside_all_of_ours() -> None:
    """All gradients at once against dK and dV alone: we would look slow where we are fast, or the other way round."""
    fwd, dkdv, dq = (TASKS[op] for op in ("fwd", "dkdv", "dq"))
    rivals = [final(fwd, "cudnn", 90.0), final(dkdv, "cudnn", 150.0), final(fwd, "torch", 400.0)]
    found = told(Journal(measurements=rivals, picks=[pick(fwd, 100.0), pick(dkdv, 100.0), pick(dq, 60.0)]))
    assert [(row["median_us"], row["ours_us"]) for row in found["rivals"]] == [(90, 100), (150, 160), (400, 100)]
    text = summary.text(found)
    assert "cudnn takes 0.92 times as long as the picks (geometric mean of 2)" in text
    assert "cudnn is faster for dkdv+dq fp32 D16 144/2 dilated g4: 150.0 us, ours 160.0 us" in text
    assert "torch takes 4.00 times" in text and "torch is faster" not in text


def test_half_a_backward_is_not_judged() -> None:
    """A run that ended before dQ was tuned: dK and dV alone beside all of cuDNN's."""
    dkdv = TASKS["dkdv"]
    assert told(Journal(measurements=[final(dkdv, "cudnn", 150.0)], picks=[pick(dkdv, 100.0)]))["rivals"] == []


def test_what_calls_make_in_place_of_a_joint_launch_is_told() -> None:
    """A pass that was tuned and that no call makes, without a word; or launches of ours taken for an external route."""
    fwd, dq = (replace(TASKS[op], key=replace(TASKS[op].key, branches=((48, 1), (48, 2)))) for op in ("fwd", "dq"))
    picks = [replace(pick(fwd, 100.0), apart_us=90.0), replace(pick(dq, 100.0), apart_us=120.0)]
    journal = Journal(measurements=[final(fwd, "apart", 90.0)], picks=picks)
    found = summary.values(journal, [fwd, dq], Path("run.jsonl"), None)
    assert found["rivals"] == [] and [row["apart_us"] for row in found["joint"]] == [90.0, 120.0]
    named = title(fwd.key)
    assert f"2 timed beside what they stand in for, 1 of them slower: {named}; calls make those" in summary.text(found)
    assert "100.0 us (fastest, apart 90.0 us)" in progress.outcome(fwd, picks[0])


def test_a_rival_that_failed_is_no_candidate_that_failed() -> None:
    """A reader looks for a kernel that computes wrongly, and it was cuDNN that has none for this head dimension."""
    fwd = TASKS["fwd"]
    ours = Measurement(fwd.key, CONFIG, "kernel", "general", "check", "correctness", message="out: relative error 1")
    rival = Measurement(fwd.key, {}, "cudnn", None, "check", "runtime", message="No available kernel")
    found = told(Journal(measurements=[ours, rival], picks=[pick(fwd, 10.0)]))
    assert found["failures"] == {"correctness": 1} and found["rivals_failed"] == {"cudnn runtime": 1}
    assert "external routes that failed, and were not timed: 1 cudnn runtime" in summary.text(found)


def test_gain_and_state_are_told_of_what_was_asked() -> None:
    """A resumed run that counts another problem's gain, one start's seconds, or ends well though it was cut short."""
    fwd, dq = TASKS["fwd"], TASKS["dq"]
    other = replace(fwd, key=replace(fwd.key, head_dim=128))
    picks = [pick(fwd, 100.0, 200.0), pick(dq, 100.0, 50.0), pick(other, 1.0, 9.0)]
    found = told(of(*picks, End(2.5, finished=True), final(other, "kernel", 1.0), End(4.0, finished=False)))
    assert found["gain"] == {"mean": pytest.approx(1.0), "worst": 0.5}
    assert (found["tuned"], found["problems"], found["seconds"]) == (2, 3, 6.5)
    text = summary.text(found)
    assert text.startswith("2 of 3 problems tuned in 6.5 s") and text.endswith("--resume goes on")
    json.dumps(found)


# ---- Progress --------------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_time_left_is_by_what_this_start_did(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    """A resumed run that divides its first seconds by all that earlier starts did, and promises to end at once."""
    lines = progress.Lines()
    lines.begin(tasks=10, done=6)
    clock(20.0)
    lines.picked(TASKS["fwd"], pick(TASKS["fwd"], 10.0, 12.0))
    lines.picked(TASKS["dq"], None)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "10 problems to tune, 6 of them done before"
    assert second.startswith("[7/10, 60 s left] standin fwd fp32 [144, 2]: 64x32_w4_s2 10.0 us (fastest, default 12.0")
    assert third.startswith("[8/10, 20 s left]") and third.endswith("no candidate works; the journal has the reasons")


def test_no_more_time_is_left_than_of_the_budget(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    """`tune --budget 30s` that promises an hour."""
    lines = progress.Lines(budget_s=30.0)
    lines.begin(tasks=10, done=0)
    clock(20.0)
    for _ in range(9):
        lines.picked(TASKS["fwd"], None)
    clock(15.0)
    lines.picked(TASKS["fwd"], None)
    left = [line.partition("]")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    # Each of 20 s, then of 10, ...; the last one ends when the budget is spent.
    assert left[0] == "[1/10, 10 s left" and left[7] == "[8/10, 5 s left" and left[9] == "[10/10, 0 s left"


@pytest.mark.parametrize(
    ("budget_s", "gone", "left"),
    [(3600.0, 0.0, "1:00:00"), (math.inf, 0.0, "-:--:--"), (30.0, 20.0, "0:00:10"), (math.inf, 20.0, "0:00:40")],
)
def test_a_bar_knows_the_budget(budget_s: float, gone: float, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a terminal: before the first task is done, the budget is all that is known."""
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    bar = progress.shown(budget_s)
    assert isinstance(bar, progress.Bar)
    now = [1000.0]
    monkeypatch.setattr(bar._bar, "get_time", lambda: now[0])
    bar.begin(3, 0)
    if gone:
        bar._bar.advance(bar._row, 0)
        now[0] += gone
        bar.picked(TASKS["fwd"], None)
    bar._bar.refresh()
    bar.end()
    drawn = terminal.getvalue().rpartition("left")[2].split()
    assert drawn[0] == left


def test_a_bar_is_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control sequences in a log file; or a crash on a terminal without rich."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(progress.shown(), progress.Lines)
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert type(progress.shown(quiet=True)) is progress.Progress
    bar = progress.shown()
    assert isinstance(bar, progress.Bar)
    bar.begin(3, 1)
    bar.note("fwd ((2048, 2),): race [bold]64x32")
    bar.picked(TASKS["fwd"], pick(TASKS["fwd"], 10.0))
    bar.end()
    assert "standin fwd fp32 [144, 2]: 64x32_w4_s2 10.0 us (fastest)" in " ".join(terminal.getvalue().split())
    imported = builtins.__import__

    def without_rich(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert isinstance(progress.shown(), progress.Lines)
