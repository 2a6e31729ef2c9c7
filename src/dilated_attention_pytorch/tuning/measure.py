"""What the measuring process does: check a candidate, then time it. One process a GPU; `worker` tells of its end."""

from __future__ import annotations

import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Problem
from ..device import Device
from ..precision import DENSE_FACTOR, DOUT_FLOOR, TOLERANCES
from . import scenes
from .problems import Task
from .routes import ROUTES, Launch, Outputs, Route, Scene
from .space import APART, Candidate
from .worker import Fatal

GUARD = 512
"""Elements of poison before and behind every output."""

SPREAD = 0.05
"""An interval wider than this share of its median is measured again, and flagged if it stays so wide."""
RESOLUTION_US = 1.0
"""What two events tell apart at best: no interval narrower than this is wide."""
FLUSHED_BYTES = 1 << 28
"""Written before each timed launch on a GPU: more than any level-2 cache holds."""
HEAD_START_CYCLES = 400_000
"""For so long the GPU sleeps for each launch, 0.2 ms or so: a host that also compiles has queued it by then."""

SCENES = 6
"""Scenes that a process keeps: those of two or three tasks that are searched at a time."""
DRAWN_SHARE = 4
"""A part of a GPU's memory that drawn tensors may take: a problem's operations share them, and come one by one."""
DRAWN_BYTES = 1 << 30
"""The same of a host's memory."""


_SEEDS = {"small": 0, "ragged": 1, "whole": 2}
"""Sizes of a task's problem, and what their numbers are drawn by."""


@dataclass(frozen=True)
class CheckJob:
    """Run once on poisoned outputs and compare; `ragged` on the problem with tails, else on the task's own kind."""

    task: Task
    candidate: Candidate
    ragged: bool = False


@dataclass(frozen=True)
class TimeJob:
    """Time candidates in turn.

    Attributes:
        task: The task.
        candidates: What runs in turn; one of them goes first in one round and last in the next.
        budget_us: Microseconds that each may run in all; the least and the most rounds hold whatever it says.
        limit_us: A candidate whose interval lies above is dropped after the least rounds.
    """

    task: Task
    candidates: tuple[Candidate, ...]
    budget_us: float
    limit_us: float = math.inf

    @property
    def queued(self) -> int:
        """Launches that the host has to queue for one of them, at most."""
        return max(len(candidate.launches) if candidate.route == APART else 1 for candidate in self.candidates)


@dataclass(frozen=True)
class Checked:
    """Relative error, the most that is allowed, and what is wrong; "" where nothing is."""

    error: float
    tolerance: float
    wrong: str = ""


@dataclass(frozen=True)
class Timed:
    """Microseconds of a launch: the median and a 95 % interval of it; `noisy` where that stayed too wide."""

    median: float
    low: float
    high: float
    noisy: bool = False


class Corrupted(Exception):
    """A candidate wrote outside of its outputs."""


Job = CheckJob | TimeJob
Answer = Checked | tuple[Timed | str, ...]


def bench(where: str, device: Device, routes: Mapping[str, Route] = ROUTES) -> Callable[[Job], Answer]:
    """The function of a measuring process.

    Args:
        where: The torch device: "cuda:0", "cpu".
        device: What kernels are planned for.
        routes: Ways to run a task by name; tests put stand-ins.
    """
    place = torch.device(where)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    x = torch.zeros(1, device=place, requires_grad=True)
    torch.autograd.grad(x.sum(), x)  # imports for seconds what the first check would wait for
    return Bench(place, device, routes)


class Bench:
    """Answers jobs; keeps the tensors of the last tasks."""

    def __init__(self, where: torch.device, device: Device, routes: Mapping[str, Route]) -> None:
        self._where, self._device, self._routes = where, device, routes
        self._scenes: OrderedDict[tuple[Any, ...], Scene] = OrderedDict()
        self._drawn: OrderedDict[tuple[Problem, str], Scene] = OrderedDict()
        self._most = DRAWN_BYTES
        if where.type == "cuda":
            self._most = torch.cuda.get_device_properties(where).total_memory // DRAWN_SHARE
        self._clock = _GpuClock(where) if where.type == "cuda" else _CpuClock()

    def __call__(self, job: Job) -> Answer:
        """Do a job.

        Raises:
            Fatal: The process cannot be trusted any more.
            Exception: Whatever the candidate raises.
        """
        try:
            return self._check(job) if isinstance(job, CheckJob) else self._time(job)
        except Corrupted as error:
            raise Fatal from error
        except Exception as error:
            self._forget()
            if self._is_spoiled(error):
                raise Fatal from error
            raise

    def _is_spoiled(self, error: Exception) -> bool:
        """After this error every later call of the process fails: it says so, or the GPU does when it is asked.

        Triton names a launch's error after an earlier launch's: "Triton Error [CUDA]: misaligned address".
        """
        try:
            self._clock.wait()
        except Exception:
            return True
        return _is_sticky(error)

    def _check(self, job: CheckJob) -> Checked:
        worst = Checked(0.0, 1.0)
        for scene in self._checked_scenes(job):
            results, alone = self._run(scene, job.candidate)
            found = compare(scene, results, alone=alone)
            if found.wrong:
                self._forget()  # a wrong candidate may have written anywhere
                return found
            worst = max(worst, found, key=lambda checked: checked.error / checked.tolerance)
        return worst

    def _checked_scenes(self, job: CheckJob) -> Iterator[Scene]:
        task = job.task
        if job.ragged:
            yield self._scene(task, "ragged")
        else:
            yield self._scene(task, "small")
            if self._where.type == "cuda":
                yield self._scene(task, "whole")

    def _scene(self, task: Task, size: str) -> Scene:
        """A scene of a task, made when first asked for: "small" and "ragged" in float64, "whole" to be timed."""
        label = (task.key, size)
        if label not in self._scenes:
            while len(self._scenes) >= SCENES:
                self._scenes.popitem(last=False)
            resized = {"small": scenes.small, "ragged": scenes.ragged}
            problem = resized[size](task.problem) if size in resized else task.problem
            merge = task.merge and size != "ragged"
            self._scenes[label] = scenes.asked(self._tensors(problem, size), task.op, merge, _SEEDS[size])
        self._scenes.move_to_end(label)
        return self._scenes[label]

    def _tensors(self, problem: Problem, size: str) -> Scene:
        """Those of a problem, drawn when first asked for, and kept while there is room."""
        label = (problem, size)
        if label not in self._drawn:
            held = sum(map(_bytes, self._drawn.values()))
            while self._drawn and held > self._most:
                held -= _bytes(self._drawn.popitem(last=False)[1])
            exact = size != "whole"
            self._drawn[label] = scenes.drawn(problem, self._device, self._where, _SEEDS[size], exact)
        self._drawn.move_to_end(label)
        return self._drawn[label]

    def _forget(self) -> None:
        """What a candidate may have written to."""
        self._scenes.clear()
        self._drawn.clear()

    def _run(self, scene: Scene, candidate: Candidate) -> tuple[Outputs, bool]:
        """Outputs of one launch, and whether they are those of the branch alone.

        Raises:
            Corrupted: It wrote outside of them.
        """
        outputs, memories = scenes.fresh(scene, GUARD)
        given = self._routes[candidate.route](scene, candidate)(outputs)()
        self._clock.wait()
        for name, memory in memories:
            for band, side in ((memory[:GUARD], "before"), (memory[-GUARD:], "behind")):
                if not band.isnan().all():
                    raise Corrupted(f"wrote {side} {name}")
        if given is None:
            return outputs, False
        return given() if callable(given) else given, True

    def _time(self, job: TimeJob) -> tuple[Timed | str, ...]:
        scene = self._scene(job.task, "whole")
        launches: list[Launch] = []
        failed: dict[int, str] = {}
        for place, candidate in enumerate(job.candidates):
            outputs, _ = scenes.fresh(scene, GUARD)
            try:
                launch = self._routes[candidate.route](scene, candidate)(outputs)
                launch()
                self._clock.wait()
                launches.append(launch)
            except Exception as error:
                if len(job.candidates) == 1 or self._is_spoiled(error):
                    raise
                failed[place] = f"{type(error).__name__}: {error}".partition("\n")[0]
        timed = iter(self._timed(launches, job))
        return tuple(failed.get(place) or next(timed) for place in range(len(job.candidates)))

    def _timed(self, launches: list[Launch], job: TimeJob) -> list[Timed]:
        found = self._series(launches, job)
        if any(map(_is_wide, found)) and min(timed.low for timed in found) <= job.limit_us:
            again = self._series(launches, job)
            narrower = zip(found, again, strict=True)
            found = [min(pair, key=lambda timed: (timed.high - timed.low) / timed.median) for pair in narrower]
        return [Timed(t.median, t.low, t.high, noisy=_is_wide(t)) for t in found]

    def _series(self, launches: list[Launch], job: TimeJob) -> list[Timed]:
        least, most = self._clock.rounds
        times = self._clock.times(launches, least, job.queued)
        found = [interval(taken) for taken in times]
        if not launches or all(timed.low > job.limit_us for timed in found):
            return found
        slowest = max(timed.median for timed in found)
        more = min(int(job.budget_us / (slowest + self._clock.overhead_us)), most) - least
        for taken, further in zip(times, self._clock.times(launches, max(more, 0), job.queued), strict=True):
            taken += further
        return [interval(taken) for taken in times]


# ---- Comparing -------------------------------------------------------------------------------------------------------


def compare(scene: Scene, results: Outputs, *, alone: bool = False) -> Checked:
    """Hold the results to the bound of their dtype; the worst of them is told.

    An error's norm may be the largest of the tolerance times the norm of what is expected, twice the error of the dense
    formula in that dtype on the same inputs, if they are, and `DOUT_FLOOR` of dout's norm. What is told is its share of
    what it is held to.

    Args:
        scene: What was run.
        results: What came out.
        alone: Nothing was merged, and results that are not there are not missed: those of an external route.
    """
    problem = scene.problem
    tolerances = TOLERANCES["tf32" if problem.tf32 and problem.dtype == "fp32" else problem.dtype]
    worst = Checked(0.0, tolerances.out)
    for name, expected in (scene.alone if alone else scene.expected).items():
        if alone and name not in results:
            continue
        tolerance = getattr(tolerances, name if name in ("out", "lse") else "grad")
        actual = results[name]
        keyless = expected == -torch.inf
        if not torch.equal(actual == -torch.inf, keyless) or not torch.isfinite(actual[~keyless]).all():
            count = int((~torch.isfinite(actual) & ~keyless).sum())
            wrong = f"{name}: {count} of {actual.numel()} elements NaN or infinite" if count else f"{name}: not -inf"
            return Checked(math.inf, tolerance, wrong)
        difference = _distance(actual, expected)
        norm = max(_norm(expected), DOUT_FLOOR * _norm(scene.dout) / tolerance if name[0] == "d" else 0.0)
        if difference > tolerance * norm and name != "lse" and (scene.rounded or scenes.sums(scene) == scene.sums):
            rounding = _distance(scenes.rounded(scene, alone=alone)[name], expected)
            norm = max(norm, DENSE_FACTOR * rounding / tolerance)
        error = difference / norm if norm else difference
        if error > tolerance:
            return Checked(error, tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}")
        worst = max(worst, Checked(error, tolerance), key=lambda checked: checked.error / checked.tolerance)
    return worst


def _bytes(scene: Scene) -> int:
    """Of the tensors that come with a problem."""
    tensors = (scene.q, scene.k, scene.v, scene.dout, scene.out, scene.lse, scene.delta, *scene.alone.values())
    return sum(tensor.nbytes for tensor in tensors)


def _distance(actual: Tensor, expected: Tensor) -> float:
    return _norm((actual.to(expected.dtype) - expected).masked_fill(expected == -torch.inf, 0.0))


def _norm(x: Tensor) -> float:
    """Of what is not -inf, summed up in float32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(x.masked_fill(x == -torch.inf, 0.0), dtype=dtype))


# ---- Timing ----------------------------------------------------------------------------------------------------------


def interval(times: list[float]) -> Timed:
    """The median, and the ranks that hold it in 95 of 100 series (binomial)."""
    ordered = sorted(times)
    count = len(ordered)
    rank = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
    return Timed(statistics.median(ordered), ordered[rank], ordered[count - 1 - rank])


def _is_wide(timed: Timed) -> bool:
    return timed.high - timed.low > max(SPREAD * timed.median, RESOLUTION_US)


class _CpuClock:
    """Wall time."""

    rounds = (3, 25)
    overhead_us = 0.0

    def wait(self) -> None:
        """A CPU's work is done when the call returns."""

    def times(self, launches: list[Launch], rounds: int, queued: int) -> list[list[float]]:
        """Microseconds of each in each round; who goes first alternates."""
        times: list[list[float]] = [[] for _ in launches]
        for number in range(rounds):
            for place in _order(len(launches), number):
                start = time.perf_counter()
                launches[place]()
                times[place].append(1e6 * (time.perf_counter() - start))
        return times


class _GpuClock:
    """The GPU's time between two events, with a cold level-2 cache; launches are queued ahead of it."""

    rounds = (7, 100)
    overhead_us = 350.0
    """The flush and the head start."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=where)

    def wait(self) -> None:
        """Until the GPU is done."""
        torch.cuda.synchronize(self._where)

    def times(self, launches: list[Launch], rounds: int, queued: int) -> list[list[float]]:
        """Microseconds of each, which queues so many launches at most, in each round; who goes first alternates."""
        events: list[list[tuple[Any, Any]]] = [[] for _ in launches]
        for number in range(rounds):
            for place in _order(len(launches), number):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                self._flushed.zero_()
                torch.cuda._sleep(queued * HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
                start.record()
                launches[place]()
                stop.record()
                events[place].append((start, stop))
        self.wait()
        return [[1e3 * start.elapsed_time(stop) for start, stop in pairs] for pairs in events]


def _order(count: int, number: int) -> Iterator[int]:
    return iter(range(count)[:: -1 if number % 2 else 1])


def _is_sticky(error: Exception) -> bool:
    """A CUDA error after which every later call of the process fails; none that is for want of memory."""
    text = str(error)
    if "out of memory" in text or "out of resource" in text:
        return False
    return any(sign in text for sign in ("CUDA error", "illegal memory access", "device-side assert", "HIP error"))
