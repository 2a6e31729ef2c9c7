"""Two picks for one launch timed again: the tuner's repeatability, and what one GPU loses with another one's picks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cross_device, repeatability, retimed
from dilated_attention_pytorch import cli, database
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import ProblemKey
from dilated_attention_pytorch.database import Database, Entry
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.tuning import problems, worker
from dilated_attention_pytorch.tuning.measure import Answer, Checked, CheckJob, Job
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.search import CLOSE
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.tuning.tune import Progress, Settings

from .measurements import KERNEL, KERNELS, TOOLCHAIN, entry
from .tuning import standin
from .tuning.standin import DEVICE, PROBLEM, candidates, microseconds, tasks

H100, H200 = devices.simulated("h100"), devices.simulated("h200")


@pytest.fixture
def how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Launches that compute nothing, and take what their names say."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")
    return standin.settings(tmp_path, measurer=standin.without_torch, gpus=(str(tmp_path / "asked"),), root=None)


def picks(every: list[Task], choose: Callable[[list[Candidate]], Candidate]) -> dict[ProblemKey, Entry]:
    """An entry for each task, of the candidate that is chosen from those by speed, the slowest last."""
    found = {}
    for task in every:
        ranked = sorted(candidates(task), key=lambda candidate: microseconds(candidate.name))
        found[task.key] = replace(entry(task.op), key=task.key, config=choose(ranked).config)
    return found


def fastest(ranked: list[Candidate]) -> Candidate:
    """The first of those by speed."""
    return ranked[0]


def slowest(ranked: list[Candidate]) -> Candidate:
    """The last."""
    return ranked[-1]


def test_the_same_picks_take_no_time(how: Settings) -> None:
    """Noise between two timings of one kernel, told as a difference of two picks."""
    every = tasks()
    same = picks(every, slowest)
    found = retimed.side_by_side(same, same, every, DEVICE, how, Progress())
    assert found["same_configuration"] == found["measured"] == found["asked"] == len(every)
    assert (found["share_within"], found["worst"], found["seconds"]) == (1.0, 1.0, 0.0)
    assert not how.journal.exists()


@pytest.mark.parametrize("turned", [False, True])
def test_a_ratio_is_the_first_s_time_over_the_second_s(how: Settings, turned: bool) -> None:
    """A ratio upside down; a pick that is far slower and drops out of the finals, and out of the result."""
    every = tasks()
    sides = [picks(every, slowest), picks(every, fastest)]
    sides[0][every[0].key] = sides[1][every[0].key]
    found = retimed.side_by_side(*(reversed(sides) if turned else sides), every, DEVICE, how, Progress())
    assert (found["asked"], found["measured"], found["same_configuration"]) == (len(every), len(every), 1)
    for task, row in zip(every[1:], found["rows"][1:], strict=True):
        slow, fast = (microseconds(side[task.key].config.name) for side in sides)
        assert slow > CLOSE * fast
        assert row["ratio"] == pytest.approx(fast / slow if turned else slow / fast)
    assert found["share_within"] == pytest.approx(1 / len(every))
    json.dumps(found)
    repeatability.show(found)
    cross_device.show(found)


def test_entries_of_other_problems_are_counted(how: Settings) -> None:
    """An entry that nobody can time, silently left out of the share."""
    every = tasks()
    first = picks(every, slowest)
    found = retimed.side_by_side(first, first, every[1:], DEVICE, how, Progress())
    assert (found["entries"], found["in_both"], found["asked"]) == ([len(every)] * 2, len(every), len(every) - 1)


def test_branches_apart_and_together_differ(how: Settings) -> None:
    """Two databases after which calls launch different kernels, taken for the same as their configurations are."""
    every = tasks()
    same = picks(every, slowest)
    times = {joined: replace(entry().time_us, median=100.0, apart=apart) for joined, apart in ((1, 103.0), (0, 90.0))}
    sides = [{key: replace(one, time_us=times[joined]) for key, one in same.items()} for joined in (1, 0)]
    found = retimed.side_by_side(*sides, every, DEVICE, how, Progress())
    assert [row["ratio"] for row in found["rows"]] == pytest.approx(len(every) * [100 / 90])
    assert found["rows"][0]["apart"] == [False, True]


def wrong(where: str, device: Device, routes: object) -> Callable[[Job], Answer]:
    """The slowest candidate of each launch is wrong."""
    answer = standin.without_torch(where, device, {})
    names = {replace(one, key=key).config.name for key, one in picks(tasks(), slowest).items()}

    def check(job: Job) -> Answer:
        if isinstance(job, CheckJob) and job.candidate.name in names:
            return Checked(0.5, 1e-5, "out: relative error 5.0e-01")
        return answer(job)

    return check


def test_a_pick_that_is_wrong_has_no_ratio(how: Settings) -> None:
    """An entry whose kernel is wrong on this GPU, counted as no loss."""
    every = tasks()
    sides = picks(every, slowest), picks(every, fastest)
    found = retimed.side_by_side(*sides, every, DEVICE, replace(how, measurer=wrong), Progress())
    assert found["measured"] == 0 and found["share_within"] is None
    assert all(row["failure"].startswith("check: correctness") for row in found["rows"])
    cross_device.show(found)


def test_time_that_is_over_is_told(how: Settings) -> None:
    """Launches that nobody timed, counted as repeatable."""
    every = tasks()
    sides = picks(every, slowest), picks(every, fastest)
    found = retimed.side_by_side(*sides, every, DEVICE, replace(how, budget_s=0.0), Progress())
    assert found["asked"] == len(every) and found["measured"] == len(found["rows"]) == 0


# ---- One GPU's picks on another --------------------------------------------------------------------------------------


def of_two_gpus(root: Path, **provenance: str) -> Database:
    """A database in which each GPU has a pick of its own; those of the H200 may be from elsewhere."""
    every = problems.of_calls([("standin", PROBLEM)], H100)
    database.save(H100, picks(every, fastest).values(), root)
    borrowed = [
        replace(one, provenance=replace(one.provenance, **provenance))  # type: ignore[arg-type]
        for one in picks(every, slowest).values()
    ]
    database.save(H200, borrowed, root)
    return Database(root, lambda: KERNELS)


def test_the_loss_of_borrowed_picks(how: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gain of the lender told as the loss of the borrower."""
    monkeypatch.setattr(cross_device.Toolchain, "current", lambda: TOOLCHAIN)
    found = of_two_gpus(tmp_path / "two")
    measured = cross_device.measure(H200, H100, found, [("standin", PROBLEM)], how, Progress())
    assert measured["measured"] == measured["asked"] == 3
    assert all(row["ratio"] > 1 for row in measured["rows"])
    with pytest.raises(ArgumentError, match="lends nvidia-h100-80gb-hbm3"):
        cross_device.measure(H100, H100, found, [], how, Progress())
    with pytest.raises(ArgumentError, match="lends nvidia-l4"):
        cross_device.measure(H100, devices.simulated("l4"), found, [], how, Progress())


def test_stale_picks_are_not_lent(how: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tuned for another kernel text, told as what another GPU's picks cost."""
    monkeypatch.setattr(cross_device.Toolchain, "current", lambda: TOOLCHAIN)
    found = of_two_gpus(tmp_path / "two", kernel=KERNEL[::-1])
    with pytest.raises(ArgumentError, match="nothing of nvidia-h200 that still counts"):
        cross_device.measure(H200, H100, found, [("standin", PROBLEM)], how, Progress())


# ---- The commands ----------------------------------------------------------------------------------------------------


def test_databases_are_tuned_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison of nothing with nothing, or a database that is tuned again though it is there."""
    asked: list[list[str]] = []

    def tune(given: list[str]) -> int:
        asked.append(given)
        of_two_gpus(tmp_path / "fresh")
        return 0

    monkeypatch.setattr(cli, "main", tune)
    monkeypatch.setattr(repeatability.Toolchain, "current", lambda: TOOLCHAIN)
    monkeypatch.setattr(database, "rendered_kernels", lambda: KERNELS)
    for _ in range(2):
        assert len(repeatability.entries(tmp_path / "fresh", "quick", H100)) == 3
    (given,) = asked
    assert given[:5] == ["tune", "--preset", "quick", "--db", str(tmp_path / "fresh")]
    monkeypatch.setattr(cli, "main", lambda given: 2)
    with pytest.raises(ArgumentError, match="tune into another folder"):
        repeatability.entries(tmp_path / "nothing", "quick", H100)


@pytest.mark.parametrize(
    ("module", "given"), [(repeatability, ["a", "b"]), (cross_device, ["--of", "h200"])], ids=["repeat", "cross"]
)
def test_without_a_gpu_nothing_is_measured(
    module: object, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or a result of a CPU."""
    monkeypatch.setattr(sys, "argv", ["program", *given])
    monkeypatch.setattr(devices, "current", lambda where=None: None)
    assert module.main() == 2  # type: ignore[attr-defined]
    assert "needs a GPU" in capsys.readouterr().out
