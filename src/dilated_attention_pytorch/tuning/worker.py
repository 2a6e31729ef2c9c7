"""A process of its own that does one job at a time, and is killed where it does not come back.

A candidate may hang, end its process, spoil the GPU's state or fill a screen with intermediate code. None of that may
reach the tuner: it sees an answer, or a `Lost` with the reason.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

START_METHOD = "spawn"
"""A forked child of a process that has run torch's threads may hang, and one that has run CUDA cannot use it."""

START_S = 180.0
"""Seconds a process may take to import torch and to find its GPU: a cold disk is slow."""


@dataclass(frozen=True)
class Lost:
    """No answer: the process was killed after its time was over, or ended by itself.

    Attributes:
        timeout: It was killed for its time.
        message: What happened, in words.
    """

    timeout: bool
    message: str


@dataclass(frozen=True)
class Raised:
    """The job raised, an exception of this class; `fatal` where the process cannot go on and has ended."""

    kind: str
    message: str
    fatal: bool


@dataclass(frozen=True)
class NoStart:
    """The process never came to its first job: no GPU, or nothing to import. Another start may fare better."""

    message: str


class Fatal(Exception):
    """Raised by a job after which its process cannot be trusted, with the reason as its cause."""


class Worker:
    """One spawned process.

    Args:
        setup: Called in the process with `arguments`; returns the function of a job that gives its answer.
        arguments: What pickles.
    """

    def __init__(self, setup: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        self._setup, self._arguments = setup, arguments
        self._process: Any = None
        self.connection: Connection | None = None
        self._deadline = 0.0
        self._limit = 0.0
        self._begun = False
        self.busy = False

    def submit(self, job: Any, seconds: float) -> None:
        """Hand over a job with its time limit; the process is started where there is none, in a time of its own."""
        assert not self.busy, "one job at a time"
        self.start()
        assert self.connection is not None
        with contextlib.suppress(OSError):  # a process that has ended: `answer` says so
            self.connection.send(job)
        self._limit, self.busy = seconds, True
        self._deadline = time.monotonic() + (seconds if self._begun else START_S)

    def answer(self) -> Any | Raised | Lost | NoStart | None:
        """What came of the job, or None while it runs. Does not wait."""
        assert self.connection is not None and self.busy
        try:
            while self.connection.poll():
                found = self.connection.recv()
                if found == _READY:
                    self._begun = True
                    self._deadline = time.monotonic() + self._limit
                    continue
                self.busy = False
                begun = self._begun
                if isinstance(found, Raised) and found.fatal:
                    self.stop()
                    return found if begun else NoStart(found.message)
                return found
        except (EOFError, OSError):
            self._process.join(5)
            ending, begun = _ending(self._process.exitcode), self._begun
            self.stop()
            return Lost(False, f"its process ended: {ending}") if begun else NoStart(f"its process ended: {ending}")
        if time.monotonic() > self._deadline:
            begun = self._begun
            self.stop()
            return Lost(True, f"no answer within {self._limit:g} s") if begun else NoStart(f"no start in {START_S:g} s")
        return None

    @property
    def seconds_left(self) -> float:
        """Until the job is killed."""
        return max(self._deadline - time.monotonic(), 0.0)

    def stop(self) -> None:
        """Kill the process; the next job gets a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            assert self.connection is not None
            self.connection.close()
        self._process, self.connection, self._begun, self.busy = None, None, False, False

    def start(self) -> None:
        """Start the process where there is none; a job that comes later finds it ready, or starting."""
        if self._process is not None:
            return
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._setup, self._arguments, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self.connection = ours


def wait_for_any(workers: Sequence[Worker], seconds: float) -> None:
    """Sleep until one of them has something to say or runs out of time, or the seconds are over."""
    busy = [worker for worker in workers if worker.busy]
    if busy:
        seconds = min(seconds, *(worker.seconds_left for worker in busy)) + 0.001
        wait([worker.connection for worker in busy if worker.connection], timeout=seconds)


_READY = "ready"


def _serve(
    connection: Connection, setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...], parent: int
) -> None:
    """The process: jobs in, answers out, until the tuner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tuner's to answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _silence()
    try:
        do = setup(*arguments)
    except Exception as error:
        connection.send(Raised(_kind(error), _first_line(error), fatal=True))
        return
    connection.send(_READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = do(job)
        except Fatal as error:
            connection.send(Raised(_kind(error.__cause__), _first_line(error.__cause__), fatal=True))
            return
        except Exception as error:
            answer = Raised(_kind(error), _first_line(error), fatal=False)
        connection.send(answer)


def _end_with(parent: int) -> None:
    """A tuner that was killed leaves no process behind, not even one that hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _silence() -> None:
    """Compilers print the intermediate code of what fails to the streams themselves."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(nowhere, number)


def _kind(error: BaseException | None) -> str:
    return type(error).__name__


def _first_line(error: BaseException | None) -> str:
    """Enough to know it by: compilers' messages hold the whole program."""
    lines = str(error).strip().splitlines() or [""]
    return f"{_kind(error)}: {lines[0]}"[:400]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
