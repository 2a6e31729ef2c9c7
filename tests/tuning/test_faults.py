"""Faults that really happen, in the tuner's own machinery: what stays unwritten, what spoils a process, what collides.

A route on a CPU takes the kernel's place, and does what a wrong kernel does; scenes, checks, clocks, worker processes,
locks and searches are the tuner's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import database
from dilated_attention_pytorch.config import RESULTS
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.tuning import journal, measure, routes, worker
from dilated_attention_pytorch.tuning.measure import Answer, Checked, CheckJob, Job, Timed, TimeJob, bench
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.routes import Launch, Launcher, Outputs, Scene
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.tuning.tune import Settings
from dilated_attention_pytorch.tuning.worker import Raised, Worker, wait_for_any

from . import standin
from .standin import DEVICE, PROBLEM, candidates, settings, tasks

FORK = multiprocessing.get_context("fork")
TWO_BRANCHES = replace(PROBLEM, length=192, branches=((48, 2), (96, 3)))
"""The launches of the second one merge."""
EVERY_TASK = [*tasks(PROBLEM), *tasks(TWO_BRANCHES)]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring processes that start at once, with what this one has patched."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")


def checked(ask: Callable[[Job], Answer], task: Task, candidate: Candidate) -> Checked:
    found = ask(CheckJob(task, candidate))
    assert isinstance(found, Checked)
    return found


# ---- What is left unwritten ------------------------------------------------------------------------------------------

Writes = Callable[[Scene, Outputs], None]


def _nothing(scene: Scene, outputs: Outputs) -> None:
    pass


def _half(scene: Scene, outputs: Outputs) -> None:
    for name, expected in scene.expected.items():
        steps = 2 if name == "lse" else 1
        several = expected.shape[steps] // 2
        outputs[name].narrow(steps, 0, several).copy_(expected.narrow(steps, 0, several))


def _no_zeros(scene: Scene, outputs: Outputs) -> None:
    """Rows that the branch does not keep are a matter of the first launch: it clears them, and this one forgot."""
    for name, expected in scene.expected.items():
        own = expected.to(outputs[name].dtype)
        outputs[name].copy_(torch.where(own == 0.0, outputs[name], own))


def _all_but(name: str, scene: Scene, outputs: Outputs) -> None:
    for other, expected in scene.expected.items():
        if other != name:
            outputs[other].copy_(expected)


PARTS: dict[str, Writes] = {
    "nothing": _nothing,
    "half": _half,
    "no zeros": _no_zeros,
    **{f"all but {name}": partial(_all_but, name) for name in ("out", "lse", "dk", "dv", "dq")},
}


def partly(scene: Scene, candidate: Candidate, parts: Mapping[str, str]) -> Launcher:
    """A candidate that writes a part of what it owes, as it is said of its name; any other is right."""
    part = parts.get(candidate.name)
    if part is None:
        return standin.right(scene, candidate)
    return lambda outputs: lambda: PARTS[part](scene, outputs)


def owed(task: Task) -> list[str]:
    """Parts that are too little of this task's results; what is merged has no zeros to clear."""
    return ["nothing", "half", *([] if task.merge else ["no zeros"]), *(f"all but {name}" for name in RESULTS[task.op])]


CASES = [(task, part) for task in EVERY_TASK for part in owed(task)]


def told(task: Task) -> str:
    return f"{task.op}-{task.key.branches[0][0]}-{'merge' if task.merge else 'first'}"


@pytest.mark.parametrize(
    ("task", "part"), CASES, ids=[f"{told(task)}-{part}".replace(" ", "-") for task, part in CASES]
)
def test_who_leaves_something_out_is_wrong_even_behind_one_who_did_not(task: Task, part: str) -> None:
    """A kernel that skips tiles, and whose buffer holds a right candidate's results, or zeros where these are due."""
    first, second, third = candidates(task)[:3]
    ask = bench("cpu", DEVICE, {"kernel": partial(partly, parts={second.name: part})})
    assert not checked(ask, task, first).wrong
    found = checked(ask, task, second)
    assert found.wrong and (task.merge or "NaN" in found.wrong)
    assert not checked(ask, task, third).wrong


@pytest.mark.parametrize("task", EVERY_TASK, ids=told)
def test_each_candidate_is_given_memory_of_its_own_full_of_poison(task: Task) -> None:
    """One candidate's outputs handed to the next; or memory that nobody filled, which by chance holds the results."""
    given: list[Outputs] = []

    def noting(scene: Scene, candidate: Candidate) -> Launcher:
        def launcher(outputs: Outputs) -> Launch:
            for name, output in outputs.items():
                held = scene.before[name].to(output.dtype) if scene.merge else torch.full_like(output, torch.nan)
                assert torch.equal(output.nan_to_num(7.0), held.nan_to_num(7.0)), name
            given.append(outputs)
            return standin.right(scene, candidate, pace=0.0)(outputs)

        return launcher

    ask = bench("cpu", DEVICE, {"kernel": noting})
    chosen = candidates(task)[:3]
    for candidate in chosen:
        for ragged in (False, True):
            found = ask(CheckJob(task, candidate, ragged))
            assert isinstance(found, Checked) and not found.wrong
    timed = ask(TimeJob(task, tuple(chosen), budget_us=100.0))
    assert all(isinstance(each, Timed) for each in timed)  # type: ignore[union-attr]
    memories = [output.untyped_storage().data_ptr() for outputs in given for output in outputs.values()]
    assert len(set(memories)) == len(memories)


# ---- What spoils a process -------------------------------------------------------------------------------------------

# Told by torch 2.11.0 and Triton 3.6.0 on an H100: of the launch itself, or of a later call in the same process.
SPOILT = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address",
    "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k, &falpha, a, CUD",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Triton Error [CUDA]: device-side assert triggered",
    "HIP error: an illegal memory access was encountered",
]


class OutOfResources(Exception):
    """As Triton's, which is not installed everywhere."""


HARMLESS = [
    OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes or"),
    OutOfResources("out of resource: threads, Required: 2048, Hardware limit: 1024"),
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 4096.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    ValueError("Did you forget to add @triton.jit ?"),
]
ERRORS: list[tuple[Exception, bool, bool]] = [
    *((RuntimeError(message), False, True) for message in SPOILT),
    # Said by a launch after one that spoiled the process, in words that other errors share: the GPU has to be asked.
    (RuntimeError("Triton Error [CUDA]: misaligned address"), True, True),
    (HARMLESS[2], True, True),
    *((error, False, False) for error in HARMLESS),
]
"""What is raised, whether the GPU says so too when it is asked, and whether the process is to end."""
_spoilt = False
"""Of this process: its GPU answers no more."""


def raising(scene: Scene, candidate: Candidate, guilty: str, error: Exception, spoils: bool, told: Path) -> Launcher:
    """Every candidate is right but one, which raises; who runs where is told."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            global _spoilt
            with told.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            if candidate.name == guilty:
                _spoilt = spoils
                raise error
            standin.right(scene, candidate, pace=0.0)(outputs)()

        return run

    return launcher


def asked_of_the_gpu(clock: measure._CpuClock) -> None:
    """Synchronizing says what became of the process, whoever asks."""
    if _spoilt:
        raise RuntimeError("CUDA error: misaligned address")


@pytest.fixture
def ask_in_a_process(forked: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Asks a measuring process, one for the whole test unless it ends."""
    monkeypatch.setattr(measure._CpuClock, "wait", asked_of_the_gpu)
    made: list[Worker] = []

    def ask(route: object, job: Job) -> Any:
        if not made:
            made.append(Worker(standin.with_torch, "cpu", DEVICE, {"kernel": route}))
        made[0].submit(job, 60.0)
        while (found := made[0].answer()) is None:
            wait_for_any(made, 1.0)
        return found

    yield ask
    for each in made:
        each.stop()


@pytest.mark.parametrize("together", [False, True], ids=["checked", "timed in turn"])
@pytest.mark.parametrize(("error", "spoils", "ends"), ERRORS)
def test_a_process_ends_with_its_gpus_state_and_not_for_want_of_memory(
    ask_in_a_process: Callable[..., Any], tmp_path: Path, error: Exception, spoils: bool, ends: bool, together: bool
) -> None:
    """Each candidate after an illegal access fails for it; or seconds are lost to a new process for tiles too large."""
    (task, *_) = tasks()
    first, second, third = candidates(task)[:3]
    route = partial(raising, guilty=second.name, error=error, spoils=spoils, told=tmp_path / "pids")
    assert is_right(ask_in_a_process(route, CheckJob(task, first)))
    if together:
        found = ask_in_a_process(route, TimeJob(task, (first, second, third), budget_us=100.0))
        if not ends:
            before, failed, after = found
            assert isinstance(before, Timed) and isinstance(after, Timed)
            assert failed == f"{type(error).__name__}: {error}"
    else:
        found = ask_in_a_process(route, CheckJob(task, second))
    if ends or not together:
        assert found == Raised(type(error).__name__, f"{type(error).__name__}: {error}", fatal=ends)
    assert is_right(ask_in_a_process(route, CheckJob(task, third)))
    first_pid, *_, last_pid = (tmp_path / "pids").read_text().split()
    assert (first_pid != last_pid) == ends


def is_right(found: object) -> bool:
    return isinstance(found, Checked) and not found.wrong


def outside(scene: Scene, candidate: Candidate, guilty: str, told: Path) -> Launcher:
    """One candidate writes behind its outputs."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            with told.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            if candidate.name == guilty:
                standin.FAULTS["out of bounds"](scene, outputs)
            else:
                standin.right(scene, candidate, pace=0.0)(outputs)()

        return run

    return launcher


def test_a_process_ends_with_who_writes_elsewhere(ask_in_a_process: Callable[..., Any], tmp_path: Path) -> None:
    """Who wrote behind its outputs may have written anywhere, and what comes next is measured on that."""
    (task, *_) = tasks()
    first, second, third = candidates(task)[:3]
    route = partial(outside, guilty=second.name, told=tmp_path / "pids")
    for candidate in (first, second, third):
        found = ask_in_a_process(route, CheckJob(task, candidate))
        name = next(iter(RESULTS[task.op]))
        spoilt = Raised("Corrupted", f"Corrupted: wrote behind {name}", fatal=True)
        assert found == spoilt if candidate is second else is_right(found)
    first_pid, second_pid, last_pid = (tmp_path / "pids").read_text().split()
    assert first_pid == second_pid != last_pid


def scribbling(scene: Scene, candidate: Candidate, raises: bool) -> Launcher:
    """Writes where everybody reads from."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            for shared in (scene.q, scene.k, *scene.expected.values()):
                shared.fill_(3.0)
            for output in outputs.values():
                output.fill_(torch.nan)
            if raises:
                raise OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448")

        return run

    return launcher


def again_for_itself(scene: Scene, candidate: Candidate) -> Launcher:
    """A right candidate, which computes what it writes from what it reads."""
    compute = routes.torch_route(scene, Candidate("torch"))

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            found = compute(outputs)()
            assert isinstance(found, dict)
            for name, output in outputs.items():
                output.copy_(found[name])

        return run

    return launcher


@pytest.mark.parametrize("task", tasks(), ids=told)
@pytest.mark.parametrize("raises", [False, True], ids=["wrong", "raises"])
def test_what_a_failed_candidate_may_have_spoilt_is_drawn_anew(task: Task, raises: bool) -> None:
    """A wrong kernel that writes over the inputs, or over what is compared with: right ones are dropped for it."""
    ask = bench("cpu", DEVICE, {"kernel": again_for_itself, "torch": partial(scribbling, raises=raises)})
    right = CheckJob(task, candidates(task)[0])
    assert not checked(ask, task, right.candidate).wrong
    with suppress(OutOfResources):
        assert checked(ask, task, Candidate("torch")).wrong and not raises
    found = checked(ask, task, right.candidate)
    assert not found.wrong and found.error < 1e-5


def spoiling(scene: Scene, candidate: Candidate) -> Launcher:
    """Clears what it reads, and gives what comes of nothing."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            for read in (scene.q, scene.k, scene.v, scene.dout):
                read.zero_()
            for output in outputs.values():
                output.zero_()

        return run

    return launcher


@pytest.mark.parametrize("task", tasks(), ids=told)
def test_who_spoils_what_it_reads_is_not_held_to_less_for_it(task: Task) -> None:
    """The rounding that is allowed, worked out from spoilt inputs: as large as the error, so that it is none."""
    ask = bench("cpu", DEVICE, {"torch": spoiling})
    assert checked(ask, task, Candidate("torch")).wrong


# ---- Finals that no process survives ---------------------------------------------------------------------------------

FINALS_US = 4321.0


def losing(where: str, device: Device, routes: Mapping[str, object], how: str, guilty: str) -> Callable[[Job], Answer]:
    """No process survives finals of several, nor the guilty one's alone; in the race everything was well."""
    quiet = standin.without_torch(where, device, routes)

    def answer(job: Job) -> Answer:
        if isinstance(job, CheckJob) or job.budget_us != FINALS_US:
            return quiet(job)
        names = [candidate.name for candidate in job.candidates]
        with Path(where + ".finals").open("a") as stream:
            stream.write(" ".join(names) + "\n")
        if how == "memory":
            if len(names) > 1:
                raise MemoryError("out of memory: all of their outputs at once")
        elif guilty in names or len(names) > 1:
            match how:
                case "spoils":
                    raise worker.Fatal from RuntimeError("CUDA error: an illegal memory access was encountered")
                case "ends":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(3600)
        return quiet(job)

    return answer


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("how", "status"), [("spoils", "illegal_access"), ("ends", "runtime"), ("hangs", "timeout"), ("memory", "ok")]
)
def test_finals_that_fail_together_are_run_one_by_one(
    forked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, status: str, count: int
) -> None:
    """All finalists lost for one of them, or for want of memory for all at once; or tried together for ever."""
    monkeypatch.setattr(standin, "microseconds", lambda name: 100.0)
    (task, *_) = tasks()
    first, second, *_ = chosen = [candidate.name for candidate in candidates(task)[:count]]
    where = str(tmp_path / "asked")
    given = {"gpus": (where,), "limit": count, "steps": 0, "finals_us": FINALS_US, "candidate_s": 1.0}
    how_to = settings(
        tmp_path, measurer=partial(losing, how=how, guilty=second), routes={"kernel": standin.right}, **given
    )
    _finish(*_start(([task], how_to)))
    found = journal.read(how_to.journal)
    asked = Path(where + ".finals").read_text().splitlines()
    assert asked == [" ".join(chosen), *chosen]
    rows = {candidate_name(row): row for row in found.measurements if row.stage == "finals"}
    assert {name: row.status for name, row in rows.items()} == {**dict.fromkeys(chosen, "ok"), second: status}
    assert all((row.median_us is not None) == (row.status == "ok") for row in rows.values())
    (pick,) = found.picks
    assert pick.candidates == count and Candidate(pick.route, tuple(pick.config.items())).name == first


def candidate_name(row: journal.Measurement) -> str:
    return Candidate(row.route, tuple(row.config.items())).name


def _start(*runs: tuple[list[Task], Settings]) -> list[BaseProcess]:
    """Runs in processes of their own: one that never ends is this test's failure, and not its end."""
    started = [FORK.Process(target=standin.run, args=run) for run in runs]
    for process in started:
        process.start()
    return started


def _finish(*started: BaseProcess) -> None:
    end = time.monotonic() + 40
    for process in started:
        process.join(max(end - time.monotonic(), 0.0))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * len(codes)


# ---- Two tuners, one database ----------------------------------------------------------------------------------------

WINDOW_S = 0.3
"""Between a tuner's reading of a file and its writing: what another writes meanwhile is lost, if it may write."""


def test_two_tuners_that_save_at_the_same_moment_lose_nothing(
    forked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each writes the file as it read it before the other wrote: a whole run's picks of one of them are gone."""
    save, write, together = database.save, database.write, FORK.Barrier(2)

    def at_once(*arguments: Any) -> list[Path]:
        with suppress(threading.BrokenBarrierError):
            together.wait(20.0)
        return save(*arguments)

    def slowly(*arguments: Any) -> bool:
        time.sleep(WINDOW_S)
        return write(*arguments)

    monkeypatch.setattr(database, "save", at_once)
    monkeypatch.setattr(database, "write", slowly)
    halves = [tasks(replace(PROBLEM, head_dim=dim)) for dim in (16, 24)]
    runs = []
    for number, what in enumerate(halves):
        gpu = (str(tmp_path / f"asked {number}"),)
        how = settings(tmp_path, measurer=standin.without_torch, gpus=gpu, limit=3)
        runs.append((what, replace(how, journal=tmp_path / f"{number}.jsonl")))
    _finish(*_start(*runs))
    saved = [entry for path in Database(tmp_path / "db").files() for entry in database.read(path).values()]
    assert {entry.key for entry in saved} == {task.key for what in halves for task in what}
    assert together.broken is False
