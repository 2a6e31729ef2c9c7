"""Compiling in processes that may fail: a candidate that cannot be compiled is a row, and costs no other."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.database import Resources
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.errors import UnsupportedError
from dilated_attention_pytorch.tuning import screening, worker
from dilated_attention_pytorch.tuning.screening import STARTS, Compilation, Compiled, Pool
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.tuning.worker import wait_for_any

from .standin import PROBLEM

L4 = devices.simulated("l4")
STAGES = {1: "good", 2: "hang", 3: "crash", 4: "eats", 5: "raise", 6: "large"}
"""What a compilation does, by its pipeline stages."""


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start at once."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")


def faulty(device: Device) -> Callable[[Compilation], Resources]:
    """A compiler that goes wrong as real ones do, in a process that may take 300 MB more than it has."""
    faulthandler.disable()  # pytest's would tell of what is meant to happen
    (taken,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    screening.limit_memory((int(taken) << 10) + (300 << 20))

    def compile_one(job: Compilation) -> Resources:
        what = STAGES[job.candidate.config.num_stages]
        if what == "hang":
            time.sleep(3600)
        if what == "crash":
            os.kill(os.getpid(), signal.SIGABRT)  # as LLVM's assertions do
        if what == "eats":
            held = [bytearray(64 << 20) for _ in range(1000)]
            assert not held, "64 GB were there to be had"
        if what == "raise":
            raise ValueError("'tt.dot' op failed")
        return Resources(1 << 20 if what == "large" else 1000, 32, 0)

    return compile_one


def job(stages: int) -> Compilation:
    return Compilation(PROBLEM, "fwd", False, Candidate.of(LaunchConfig(32, 32, num_stages=stages)))


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Two processes, of three seconds a job."""
    made = Pool(L4, 2, faulty, limit_s=3.0)
    yield made
    made.stop()


def take(pool: Pool, count: int) -> list[tuple[object, Compiled]]:
    """So many answers in the order in which they came."""
    found: list[tuple[object, Compiled]] = []
    while len(found) < count:
        found += pool.answers()
        wait_for_any(pool.workers, 1.0)
    return found


def test_every_fault_is_an_answer_and_costs_no_other(pool: Pool) -> None:
    """A screening that ends with its first assertion in LLVM, waits for ever, or takes the machine's memory."""
    asked = [2, 1, 3, 1, 4, 1, 5, 1, 6, 1]
    for place, stages in enumerate(asked):
        pool.submit(place, job(stages))
    found = dict(take(pool, len(asked)))
    assert all(found[place] == Compiled("ok", Resources(1000, 32, 0)) for place in range(1, len(asked), 2))
    told = {STAGES[asked[place]]: (found[place].status, found[place].message) for place in range(0, len(asked), 2)}
    assert told == {
        "hang": ("timeout", "no answer within 3 s"),
        "crash": ("compile", "its process ended: killed by SIGABRT"),
        "eats": ("compile", "MemoryError: "),
        "raise": ("compile", "ValueError: 'tt.dot' op failed"),
        "large": ("resources", "1,048,576 bytes of shared memory a block; nvidia-l4 has 101,376"),
    }


def test_what_is_urgent_goes_first_and_what_is_dropped_does_not_go(pool: Pool) -> None:
    """Finalists that wait behind the next problem's fifty candidates; hours for a problem that was given up."""
    pool.workers = pool.workers[:1]
    for label in ("now", "later", "given up"):
        pool.submit(label, job(1))
    pool.answers()  # the first is under way
    pool.submit("urgent", job(1), urgent=True)
    pool.drop(lambda label: label == "given up")
    assert pool.backlog == 2
    assert [label for label, _ in take(pool, 3)] == ["now", "urgent", "later"]
    assert pool.answers() == [] and not any(one.busy for one in pool.workers)


class Starting:
    """A compiler whose process does not start so many times; what it tried is in a file."""

    def __init__(self, path: Path, failures: int) -> None:
        self.path, self.failures = path, failures

    def __call__(self, device: Device) -> Callable[[Compilation], Resources]:
        tried = len(self.path.read_text()) if self.path.exists() else 0
        self.path.write_text("x" * (tried + 1))
        if tried < self.failures:
            raise ModuleNotFoundError("No module named 'triton'")
        return faulty(device)


def test_a_process_that_does_not_start_is_no_verdict(tmp_path: Path) -> None:
    """A candidate that is left out, as the machine was short of memory for a moment."""
    pool = Pool(L4, 1, Starting(tmp_path / "tried", STARTS))
    pool.submit("only", job(1))
    assert take(pool, 1) == [("only", Compiled("ok", Resources(1000, 32, 0)))]
    pool.stop()


def test_a_machine_that_cannot_compile_is_told(tmp_path: Path) -> None:
    """A run that starts processes for ever, or ends with every candidate failed."""
    pool = Pool(L4, 1, Starting(tmp_path / "tried", 99))
    pool.submit("only", job(1))
    with pytest.raises(UnsupportedError, match=r"nothing can be compiled here: .*No module named 'triton'"):
        take(pool, 1)
    pool.stop()
    assert len((tmp_path / "tried").read_text()) == STARTS + 1
