"""Compiling candidates for an architecture, many at once, in processes that may fail: needs no GPU.

What is compiled here lies in Triton's cache on disk afterwards, so that a measuring process does not compile it again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import generated
from ..config import Problem
from ..database import Resources
from ..device import Device
from ..errors import UnsupportedError
from .problems import launched
from .space import Candidate
from .worker import Lost, NoStart, Raised, Worker

Setup = Callable[[Device], Callable[["Compilation"], Resources]]
"""Makes, in a compiling process, the function of a job."""

STARTS = 3
"""Starts of compiling processes that may fail before a run is given up."""

LIMIT_S = 60.0
"""Seconds a compilation may take: one in a hundred of them takes minutes."""

LEAST_BYTES = 4 << 30
"""Memory that a compiling process may take however small its share of the machine's is."""


@dataclass(frozen=True)
class Compilation:
    """One launch to compile.

    Attributes:
        problem: A call of one branch.
        op: "fwd", "dkdv" or "dq".
        merge: As a later branch's launch.
        candidate: A kernel's.
    """

    problem: Problem
    op: str
    merge: bool
    candidate: Candidate


@dataclass(frozen=True)
class Compiled:
    """What came of it: status as in the journal, resources where it compiled, else a message."""

    status: str
    resources: Resources | None = None
    message: str = ""


def compiler(device: Device) -> Callable[[Compilation], Resources]:
    """What a compiling process does."""
    import torch

    from .screen import compile_offline

    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)  # who measures goes first
        limit_memory(max(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // cores(), LEAST_BYTES))
    texts = generated.names()

    def compile_one(job: Compilation) -> Resources:
        choice = launched(job.problem, job.op, job.candidate.config, texts, merge=job.merge)
        found = compile_offline(job.problem, choice, device.arch)
        return Resources(found.shared_bytes, found.registers or 0, found.spills or 0)

    return compile_one


def limit_memory(size: int) -> None:
    """End what this process and those it starts do beyond so many bytes, before it takes the memory of all others."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


class Pool:
    """Compiling processes and the jobs that wait for them, first come first served.

    Args:
        device: What is compiled for.
        processes: How many; None is one a core.
        setup: What makes the function of a job; tests put theirs.
        limit_s: Seconds a job may take.
    """

    def __init__(
        self,
        device: Device,
        processes: int | None = None,
        setup: Setup = compiler,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._device, self._limit_s = device, limit_s
        self.workers = [Worker(setup, device) for _ in range(processes or cores())]
        self._waiting: deque[tuple[Any, Compilation]] = deque()
        self._running: dict[int, tuple[Any, Compilation]] = {}
        self._failed_starts = 0

    def submit(self, label: Any, job: Compilation, *, urgent: bool = False) -> None:
        """Queue a job, an urgent one in front; its answer comes with the label."""
        (self._waiting.appendleft if urgent else self._waiting.append)((label, job))

    def answers(self) -> list[tuple[Any, Compiled]]:
        """What got ready since the last call; idle processes get new jobs. Does not wait."""
        ready = []
        for place, worker in enumerate(self.workers):
            if worker.busy and (found := worker.answer()) is not None:
                label, job = self._running.pop(place)
                if isinstance(found, NoStart):
                    self._retry(label, job, found)
                else:
                    ready.append((label, _compiled(found, self._device)))
            if not worker.busy and self._waiting:
                self._running[place] = self._waiting.popleft()
                worker.submit(self._running[place][1], self._limit_s)
        return ready

    def _retry(self, label: Any, job: Compilation, found: NoStart) -> None:
        """A process that does not start says nothing about its job."""
        self._failed_starts += 1
        if self._failed_starts > STARTS:
            raise UnsupportedError(f"nothing can be compiled here: {found.message}")
        self.submit(label, job, urgent=True)

    @property
    def backlog(self) -> int:
        """Jobs that no process has begun."""
        return len(self._waiting)

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Forget the jobs with such labels that no process has begun."""
        self._waiting = deque(job for job in self._waiting if not unwanted(job[0]))

    def stop(self) -> None:
        """End every process."""
        for worker in self.workers:
            worker.stop()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiled(found: Any, device: Device) -> Compiled:
    if isinstance(found, Lost):
        return Compiled("timeout" if found.timeout else "compile", message=found.message)
    if isinstance(found, Raised):
        return Compiled("compile", message=found.message)
    if found.shared_bytes > device.shared_bytes:
        said = f"{found.shared_bytes:,} bytes of shared memory a block; {device.name} has {device.shared_bytes:,}"
        return Compiled("resources", found, said)
    return Compiled("ok", found)
