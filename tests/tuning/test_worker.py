"""A process of its own: whatever becomes of it, the tuner hears, and the next job runs."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch.tuning import worker
from dilated_attention_pytorch.tuning.worker import Fatal, Lost, NoStart, Raised, Worker, wait_for_any

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once; `test_a_spawned_process_works` starts a real one."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")


def jobs() -> Callable[[str], Any]:
    """The function of a job, which does what its name says."""
    faulthandler.disable()  # pytest's would tell of what is meant to happen

    def do(job: str) -> Any:
        if job == "hang":
            time.sleep(3600)
        if job.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, job))
        if job == "exit":
            os._exit(7)
        if job == "raise":
            raise ValueError("no such tile\nand a program of a thousand lines")
        if job == "spoil":
            raise Fatal from RuntimeError("CUDA error: an illegal memory access")
        if job == "shout":
            for stream in (1, 2):
                os.write(stream, b"module attributes {ttg.target} {")
        return job, os.getpid()

    return do


@pytest.fixture
def one() -> Iterator[Worker]:
    """A process for `jobs`."""
    made = Worker(jobs)
    yield made
    made.stop()


def ask(of: Worker, job: str, seconds: float = 20.0) -> Any:
    """Its answer, waited for."""
    of.submit(job, seconds)
    while (found := of.answer()) is None:
        wait_for_any([of], 1.0)
    return found


@pytest.mark.parametrize(
    ("job", "seconds", "what"),
    [
        ("hang", 0.1, Lost(True, "no answer within 0.1 s")),
        ("SIGSEGV", 20.0, Lost(False, "its process ended: killed by SIGSEGV")),
        ("SIGKILL", 20.0, Lost(False, "its process ended: killed by SIGKILL")),
        ("exit", 20.0, Lost(False, "its process ended: exit code 7")),
        (
            "spoil",
            20.0,
            Raised("RuntimeError", "RuntimeError: CUDA error: an illegal memory access", True),
        ),
    ],
)
def test_after_a_lost_process_the_next_job_gets_a_new_one(one: Worker, job: str, seconds: float, what: object) -> None:
    """A tuner that waits for ever, dies with the candidate, or measures on in a process that cannot be trusted."""
    _, before = ask(one, "first")
    assert ask(one, job, seconds) == what
    said, after = ask(one, "next")
    assert said == "next" and after != before


def test_an_exception_is_an_answer_of_one_line(one: Worker) -> None:
    """A restart, with torch's import, for each candidate that does not compile; or a whole program in the journal."""
    _, before = ask(one, "first")
    assert ask(one, "raise") == Raised("ValueError", "ValueError: no such tile", fatal=False)
    assert ask(one, "next") == ("next", before)


def test_a_process_says_nothing(one: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    """Pages of intermediate code across the progress bar."""
    ask(one, "shout")
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_is_the_tuners(one: Worker) -> None:
    """Ctrl-C ends the processes first, and the tuner takes it for a fault of their candidates."""
    _, pid = ask(one, "first")
    os.kill(pid, signal.SIGINT)
    assert ask(one, "next") == ("next", pid)


def no_gpu() -> Callable[[str], Any]:
    raise RuntimeError("No CUDA GPUs are available")


def dies_early() -> Callable[[str], Any]:
    os._exit(3)


def slow_start() -> Callable[[str], Any]:
    time.sleep(1.2)
    return jobs()


@pytest.mark.parametrize(
    ("setup", "message"),
    [(no_gpu, "RuntimeError: No CUDA GPUs are available"), (dies_early, "its process ended: exit code 3")],
)
def test_a_process_that_does_not_start_is_no_answer(setup: Callable[[], Any], message: str) -> None:
    """The first candidate of all blamed for a GPU that is not there."""
    assert ask(Worker(setup), "first") == NoStart(message)


def test_a_start_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's import counted as the first candidate's time; or a start that never ends, waited for."""
    slow = Worker(slow_start)
    assert ask(slow, "first", seconds=1.0)[0] == "first"
    slow.stop()
    monkeypatch.setattr(worker, "START_S", 0.1)
    assert ask(slow, "first") == NoStart("no start in 0.1 s")


def hanging_tuner(told: str) -> None:
    """A tuner with a job under way."""
    busy = Worker(jobs)
    _, pid = ask(busy, "first")
    Path(told).write_text(str(pid))
    busy.submit("hang", 3600.0)
    time.sleep(3600)


def test_a_killed_tuner_leaves_no_process_behind(tmp_path: Path) -> None:
    """A process that hangs on the GPU for ever, as nobody is left who would kill it."""
    told = tmp_path / "pid"
    tuner = FORK.Process(target=hanging_tuner, args=(str(told),))
    tuner.start()
    while not (told.exists() and told.read_text()):
        time.sleep(0.01)
    tuner.kill()
    tuner.join()
    end = time.monotonic() + 20
    while _lives(int(told.read_text())):
        assert time.monotonic() < end, "the process outlived its tuner"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and nobody has asked after does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_spawned_process_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works in a forked process alone: a closure as a job's function, or a module that is not imported anew."""
    monkeypatch.setattr(worker, "START_METHOD", "spawn")
    spawned = Worker(jobs)
    said, pid = ask(spawned, "first", seconds=60.0)
    spawned.stop()
    assert said == "first" and pid != os.getpid()
