"""The whole loop on a CPU, with stand-ins that go wrong: whatever happens, the run ends well and nothing is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch import database, device
from dilated_attention_pytorch.config import OPS, LaunchConfig, Problem
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.errors import DatabaseError
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.tuning import folding, journal, problems, space, worker
from dilated_attention_pytorch.tuning.journal import Journal, Pick
from dilated_attention_pytorch.tuning.measure import TimeJob
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.search import candidate_of
from dilated_attention_pytorch.tuning.tune import DeviceLost, Settings, takes_tails

from ..measurements import entry
from . import standin
from .standin import FAULTS, candidates, settings, tasks

FORK = multiprocessing.get_context("fork")
STATUS = {
    "hang": "timeout",
    "crash": "runtime",
    "out of bounds": "illegal_access",
    "nan": "correctness",
    "wrong": "correctness",
    "partial": "correctness",
    "out of memory": "resources",
    "illegal access": "illegal_access",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, dict[str, str], Journal, Path]:
    """One task whose first candidates after the default each have a fault, tuned."""
    folder = tmp_path_factory.mktemp("faulty")
    (task, *_) = tasks()
    names = [candidate.name for candidate in candidates(task)]
    faults = dict(zip(names[1:], FAULTS, strict=False))
    how = settings(folder, faults, limit=len(FAULTS) + 3, candidate_s=2.0, measurer=standin.with_torch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "START_METHOD", "fork")  # four of the faults cost a new process
        found = standin.run([task], how)
    return task, faults, found, folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_row(faulty: tuple[Task, dict[str, str], Journal, Path], fault: str) -> None:
    """A candidate that hangs, crashes, writes elsewhere or computes wrongly ends the tuner, or is believed."""
    _, faults, found, _ = faulty
    (name,) = [name for name, own in faults.items() if own == fault]
    rows = [row for row in found.measurements if standin.Candidate(row.route, tuple(row.config.items())).name == name]
    assert [row.stage for row in rows if row.stage != "screen"] == ["check"]
    assert rows[-1].status == STATUS[fault] and rows[-1].message


def test_the_others_are_measured_nevertheless(faulty: tuple[Task, dict[str, str], Journal, Path]) -> None:
    """After a restart nothing works any more; or the winner is one that failed."""
    task, faults, found, folder = faulty
    (pick,) = found.picks
    assert standin.Candidate(pick.route, tuple(pick.config.items())).name not in faults
    assert found.ends[-1].finished
    (entry,) = database.read(folder / "db" / standin.DEVICE.arch / standin.DEVICE.name / f"{task.op}.yaml").values()
    assert entry.key == task.key and entry.check.error < entry.check.tolerance
    assert entry.time_us.median <= (entry.time_us.default or 0)


# ---- Runs without torch: killed, full, side by side ------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A run that computes nothing, whose processes are forked: they start at once."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")
    return settings(tmp_path, measurer=standin.without_torch, gpus=(str(tmp_path / "asked"),), limit=4)


def start(what: list[Task], how: Settings) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=standin.run, args=(what, how))
    process.start()
    return process


def measured(found: Journal) -> Counter[tuple[object, ...]]:
    """How often each candidate of a problem has a row at a stage; checks come once small and once ragged."""
    return Counter((row.key, row.stage, row.route, tuple(row.config.items())) for row in found.measurements)


def test_a_run_that_is_killed_goes_on(quick: Settings) -> None:
    """kill -9 at ten random moments: a row is lost or measured again, or the picks differ from an undisturbed run's."""
    what = tasks(standin.NESTED, *(replace(standin.PROBLEM, head_dim=dim) for dim in (8, 16)))
    undisturbed = standin.run(what, replace(quick, journal=quick.journal.with_name("other.jsonl"), root=None))
    chance = random.Random(7)
    before: Counter[tuple[object, ...]] = Counter()
    for _ in range(10):
        process = start(what, quick)
        time.sleep(chance.uniform(0.05, 0.35))
        process.kill()
        process.join()
        if quick.journal.exists():
            now = measured(journal.read(quick.journal))
            assert not before - now, "a row of an earlier start is gone"
            before = now
    found = standin.run(what, quick)
    assert found.ends[-1].finished
    assert measured(found) == measured(undisturbed)
    assert {pick.key: pick.config for pick in found.picks} == {pick.key: pick.config for pick in undisturbed.picks}
    assert len(found.picks) == len(what)
    assert quick.root is not None
    saved = [entry for path in database.Database(quick.root).files() for entry in database.read(path).values()]
    assert {entry.key for entry in saved} == {task.key for task in what}


def test_what_is_stood_in_for_is_launched_whatever_calls_make(quick: Settings, tmp_path: Path) -> None:
    """Tuned again, one launch for all gradients is compared with nothing, because calls have made it since."""
    what = tasks(replace(standin.PROBLEM, branches=((96, 2),)))
    first = standin.run(what, quick)
    joint = [task for task in what if task.op == "bwd"]
    again = standin.run(joint, replace(quick, journal=tmp_path / "again.jsonl"))
    (found,) = [candidate_of(row) for row in again.measurements if (row.route, row.stage) == ("apart", "finals")]
    picks = {pick.key.op: pick.config for pick in first.picks}
    assert [(op, config.to_dict()) for op, _, config in found.launches] == [(op, picks[op]) for op in ("dkdv", "dq")]


def test_calls_follow_what_was_measured_of_a_pass(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that is measured and not recorded, or recorded and not followed, or compared with other tiles."""

    def microseconds(name: str) -> float:
        return 50.0 if name.startswith("apart fwd") else 900.0 if name.startswith("apart") else 100.0

    monkeypatch.setattr(standin, "microseconds", microseconds)
    what = tasks(standin.NESTED)
    found = standin.run(what, quick)
    picks = {pick.key: pick for pick in found.picks}
    finals = [row for row in found.measurements if (row.route, row.stage) == ("apart", "finals")]
    assert sorted(row.key.op for row in finals) == sorted(OPS)
    for row in finals:
        parts = [key for task in what if task.key == row.key for key in problems.parts(task)]
        before = list(picks)[: list(picks).index(row.key)]
        assert {*parts} <= {*before}
        assert [config.to_dict() for *_, config in candidate_of(row).launches] == [picks[key].config for key in parts]
        assert picks[row.key].apart_us == microseconds(candidate_of(row).name)
    assert quick.root is not None
    planned = plan(standin.NESTED, standin.DEVICE, "triton", committed=database.Database(quick.root))
    assert [choice.branches for choice in planned.launches] == [(0,), (1,), (0, 1), (0, 1)]
    assert {choice.rung for choice in (*planned.launches, *planned.beaten)} == {"exact"}
    asked = Path(quick.gpus[0])
    told = asked.read_text()
    standin.run(what, quick)
    assert asked.read_text() == told, "a run that goes on measured again"


def test_parts_that_are_not_tuned_are_as_the_database_has_them(quick: Settings) -> None:
    """A pass that is compared with untuned branches, although somebody tuned them."""
    assert quick.root is not None
    tuned = LaunchConfig(16, 32, num_stages=1)
    database.save(standin.DEVICE, [entry("fwd", standin.NESTED, branch=1, config=tuned)], quick.root)
    joint = [task for task in tasks(standin.NESTED) if task.key.is_joint and task.op == "fwd"]
    found = standin.run(joint, quick)
    [row] = [row for row in found.measurements if (row.route, row.stage) == ("apart", "finals")]
    assert [config == tuned for *_, config in candidate_of(row).launches] == [False, True]


def test_two_tuners_at_once_lose_nothing(quick: Settings, tmp_path: Path) -> None:
    """Each writes the file as it read it before the other wrote."""
    halves = [tasks(replace(standin.PROBLEM, head_dim=dim)) for dim in (16, 24)]
    for number in range(len(halves)):
        (tmp_path / str(number)).mkdir()
    both = [start(what, replace(quick, journal=tmp_path / str(n) / "run.jsonl")) for n, what in enumerate(halves)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert quick.root is not None
    saved = [entry for path in database.Database(quick.root).files() for entry in database.read(path).values()]
    assert {entry.key for entry in saved} == {task.key for what in halves for task in what}


def test_a_full_disk_ends_the_run_in_a_sentence(quick: Settings) -> None:
    """A traceback after an hour of measuring, or half a line that spoils the journal."""
    quick.journal.symlink_to("/dev/full")
    with pytest.raises(DatabaseError, match=r"No space left on device; mend that, and go on with --resume"):
        standin.run(tasks(), quick)


def _limited(what: list[Task], how: Settings, size: int) -> None:
    """Tune where files may grow to so many bytes: the write that goes beyond is cut, and the next fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(DatabaseError, match="cannot be written to"):
        standin.run(what, how)


@pytest.mark.parametrize("size", [3000, 9999])
def test_a_disk_that_fills_up_loses_no_row(quick: Settings, size: int) -> None:
    """The row that no longer fitted is half written, and the next start cannot read the journal."""
    what = tasks()
    process = FORK.Process(target=_limited, args=(what, quick, size))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    before = measured(journal.read(quick.journal))
    found = standin.run(what, quick)
    assert before and not before - measured(found)
    assert found.ends[-1].finished and len(found.picks) == len(what)


def test_a_read_only_database_is_told_before_the_work(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of measuring that cannot be kept."""
    assert quick.root is not None
    quick.root.write_text("a file in the folder's place, which holds for root too")
    with pytest.raises(DatabaseError, match="cannot be written to"):
        standin.run(tasks(), quick)
    assert not quick.journal.exists()


def test_a_file_system_without_writes_is_told_before_the_work(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where it is mounted so: not even root may write, and nothing in the folder's modes tells."""
    assert quick.root is not None
    quick.root.mkdir()
    opened = os.open

    def refuse(path: str, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_ACCMODE and Path(path).is_relative_to(quick.root):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DatabaseError, match="cannot be written to: Read-only file system"):
        standin.run(tasks(), quick)
    assert not quick.journal.exists()


def test_a_database_that_turns_read_only_loses_no_pick(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is mounted anew for reading alone, after an error: the winners of an hour are nowhere."""

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(DatabaseError, match="cannot be written to: Read-only file system"):
            standin.run(tasks(), quick)
    assert quick.root is not None and not list(quick.root.rglob("*.yaml"))
    (early,) = journal.read(quick.journal).picks
    found = standin.run(tasks(), quick)
    assert found.picks[0] == early and found.ends[-1].finished
    saved = [entry for path in database.Database(quick.root).files() for entry in database.read(path).values()]
    assert {entry.key for entry in saved} == {pick.key for pick in found.picks}


@pytest.mark.parametrize("who", ["default", "second"])
def test_times_that_spread_too_wide_are_no_evidence(quick: Settings, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """An entry that holds a time of the default or of the runner-up that was flagged, and does not say so."""
    [task, *_] = tasks()
    default, *_ = names = [candidate.name for candidate in candidates(task)[:4]]
    times = {name: 100.0 + 4 * place for place, name in enumerate([*names[1:], default])}
    noisy = default if who == "default" else names[2]

    def spreading(where: str, device: Device, routes: object) -> object:
        ask = standin.without_torch(where, device, {})

        def answer(job: standin.Job) -> object:
            found = ask(job)
            if isinstance(found, tuple):
                assert isinstance(job, TimeJob)
                pairs = zip(job.candidates, found, strict=True)
                return tuple(replace(timed, noisy=one.name == noisy) for one, timed in pairs)
            return found

        return answer

    monkeypatch.setattr(standin, "microseconds", times.__getitem__)
    found = standin.run([task], replace(quick, measurer=spreading, steps=0))
    [pick] = found.picks
    assert candidate_of(pick).name == names[1]
    expected = {"default": (None, times[names[2]]), "second": (times[default], None)}[who]
    assert (pick.default_us, pick.second_us) == expected
    assert quick.root is not None
    entries = [entry for path in database.Database(quick.root).files() for entry in database.read(path).values()]
    assert [(entry.time_us.default, entry.time_us.second) for entry in entries] == (
        [] if who == "default" else [expected]
    )


def test_picks_are_saved_together(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of hundreds of entries that is read and written anew for each: a minute in which the GPU waits."""
    saved: list[int] = []
    fold = folding.fold

    def counting(found: Journal, picks: list[Pick], *where: Any) -> list[Path]:
        saved.append(len(picks))
        return fold(found, picks, *where)

    monkeypatch.setattr(folding, "fold", counting)
    found = standin.run(tasks(), quick)
    assert saved == [1, len(found.picks) - 1]


def vanishing(where: str, device: Device, routes: object) -> object:
    """A GPU that answers ten jobs and is gone, for good."""
    asked = Path(where)
    if asked.exists() and len(asked.read_text().splitlines()) >= 10:
        raise RuntimeError("No CUDA GPUs are available")
    answer = standin.without_torch(where, device, {})

    def until_it_goes(job: standin.Job) -> object:
        if asked.exists() and len(asked.read_text().splitlines()) >= 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(job)

    return until_it_goes


def test_a_gpu_that_vanishes_ends_the_run_in_a_sentence(quick: Settings) -> None:
    """The tuner restarts a process without a GPU for ever, or blames the candidates that were left."""
    with pytest.raises(DeviceLost, match=r"does not answer any more .*No CUDA GPUs.* go on with --resume"):
        standin.run(tasks(), replace(quick, measurer=vanishing))
    left = journal.read(quick.journal)
    assert not left.ends[-1].finished
    assert sum(row.status == "runtime" for row in left.measurements) <= 1
    assert standin.run(tasks(), quick).ends[-1].finished


def test_one_gpu_of_two_may_vanish(quick: Settings, tmp_path: Path) -> None:
    """The problems of the lost GPU are never tuned."""
    (tmp_path / "asked").write_text("gone\n" * 10)
    found = standin.run(tasks(), replace(quick, measurer=vanishing_first, gpus=(*quick.gpus, str(tmp_path / "two"))))
    assert found.ends[-1].finished and len(found.picks) == 3


def vanishing_first(where: str, device: Device, routes: object) -> object:
    """The GPU that the file "asked" stands for is gone."""
    return vanishing(where, device, routes) if where.endswith("asked") else standin.without_torch(where, device, {})


def test_two_runs_do_not_share_a_journal(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tune --resume` twice: both ask the GPU for the same, and the second begins with what the first had then."""
    monkeypatch.setattr(journal, "GONE_S", 0.1)
    with (
        journal.Writer(quick.journal),
        pytest.raises(DatabaseError, match="is being written by another run"),
    ):
        standin.run(tasks(), quick)
    assert not quick.journal.read_text() and not Path(quick.gpus[0]).exists()
    assert standin.run(tasks(), quick).ends[-1].finished


def test_a_budget_that_is_spent_leaves_a_journal_to_go_on_with(quick: Settings) -> None:
    """Time over: everything that was measured is thrown away."""
    what = tasks(*(replace(standin.PROBLEM, head_dim=dim) for dim in (8, 16, 24, 32)))
    first = standin.run(what, replace(quick, budget_s=0.2))
    assert not first.ends[-1].finished and len(first.picks) < len(what)
    again = standin.run(what, quick)
    assert again.ends[-1].finished and len(again.picks) == len(what)
    assert again.picks[: len(first.picks)] == first.picks


def test_tuning_again_changes_no_file(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that differs after each tuning of what is fine."""
    # A step around a winner that a step had found would go further, and find what is better indeed.
    monkeypatch.setattr(space, "neighbours", lambda task, device, candidate: [])
    standin.run(tasks(), quick)
    assert quick.root is not None
    before = {path: path.read_bytes() for path in database.Database(quick.root).files()}
    again = standin.run(tasks(), replace(quick, journal=quick.journal.with_name("again.jsonl")))
    assert before and before == {path: path.read_bytes() for path in database.Database(quick.root).files()}
    assert all(row.incumbent is not None for row in again.problems)


def test_another_machines_run_is_not_gone_on_with(quick: Settings) -> None:
    """Times of two GPUs in one race."""
    standin.run(tasks(), quick)
    with pytest.raises(DatabaseError, match="was measured with device interpreter, and now it is other: begin a new"):
        standin.run(tasks(), quick, replace(standin.DEVICE, name="other"))


@pytest.mark.parametrize(
    ("op", "loads", "tailed"),
    [
        ("fwd", "ring", True),
        ("fwd", "descriptor", True),
        ("dkdv", "ring", True),
        ("bwd", "descriptor", True),
        ("bwd", "ring", False),
    ],
)
def test_who_runs_on_ragged_sizes(op: str, loads: str, tailed: bool) -> None:
    """A winner that is thrown away, because it was asked to run what no call would give it."""
    problem = Problem("bf16", 1, 4096, 4, 4, 64, ((256, 4),))
    [task] = [one for one in problems.of_calls([("x", problem)], device.simulated("h100")) if one.op == op]
    candidate = space.Candidate.of(LaunchConfig(64, 64, num_stages=2, loads=loads))
    assert takes_tails(task, candidate) == tailed
