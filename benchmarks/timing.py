"""The clock and the scale: interleaved times, and the most memory that tensors took."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dilated_attention_pytorch.tuning.measure import interval

# The profiler's own library reports its start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Call = Callable[[], object]
"""What is timed. Where it has a `before`, that runs ahead, once for every call, and is not timed."""

PATIENCE = 10.0
"""Seconds after which no further round begins, once there are `LEAST_ROUNDS`: a slow machine gets fewer."""

LEAST_ROUNDS = 3

HOPELESS = 10.0
"""Who takes so many times the quickest's time is timed in the least rounds only."""

FLUSHED_BYTES = 1 << 28
"""Written before each timed call on a GPU: more than any level-2 cache holds."""

HEAD_START = 1.5
"""For so many times what the host takes to queue a call, the GPU sleeps before it: it never waits for the host."""

LEAST_HEAD_START_S = 2e-4

CYCLES_A_SECOND = 2e9
"""Of a GPU's clock, at most."""


class Spread(NamedTuple):
    """Times of one call in milliseconds."""

    median: float
    low: float
    high: float


class Failed(Exception):
    """A call that raised while it was timed, by name; the reason is the cause."""


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, Spread]:
    """Medians, least and most of `samples`."""
    found = samples(calls, device, rounds, progress)
    return {name: Spread(statistics.median(taken), min(taken), max(taken)) for name, taken in found.items()}


def samples(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
    patience: float = PATIENCE,
) -> dict[str, list[float]]:
    """Time all calls in turn, round after round, so that a machine that slows down slows down for all of them; who
    goes first alternates.

    On a GPU it is the GPU's time, with a cold level-2 cache and without the time that the host takes to queue the call.

    Args:
        calls: By name. Each runs twice unmeasured before the first round.
        device: Where they run.
        rounds: How often each is timed at most.
        progress: Called after each round.
        patience: Seconds after which no further round begins, once there are `LEAST_ROUNDS`.

    Returns:
        Milliseconds of each round, by name; of the hopeless fewer.

    Raises:
        Failed: A call did.
    """
    clock = _GpuClock(device) if device.type == "cuda" else _CpuClock()
    for name, call in calls.items():
        with _named(name):
            clock.prepare(name, call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begun = time.perf_counter()
    for place in range(rounds):
        if place == LEAST_ROUNDS:
            quickest = min(map(statistics.median, times.values()))
            names = [name for name in names if statistics.median(times[name]) < HOPELESS * quickest]
        if place < LEAST_ROUNDS or time.perf_counter() - begun < patience:
            for name in names[:: -1 if place % 2 else 1]:
                with _named(name):
                    times[name].append(clock.once(name, calls[name]))
        progress()
    return times


def summary(times: list[float]) -> list[float]:
    """The median, and the interval that holds it in 95 of 100 series: milliseconds."""
    found = interval(times)
    return [round(value, 5) for value in (found.median, found.low, found.high)]


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Failed(name) from error


class _CpuClock:
    """Wall time."""

    def prepare(self, name: str, call: Call) -> None:
        """Run it unmeasured."""
        before(call)
        call()

    def once(self, name: str, call: Call) -> float:
        """Milliseconds of one call."""
        before(call)
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)


class _GpuClock:
    """Times one call between two events, on a GPU that sleeps until the host has queued it."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
        self._cycles: dict[str, int] = {}

    def prepare(self, name: str, call: Call) -> None:
        """Run it unmeasured, and find out how long the host takes."""
        before(call)
        call()
        before(call)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host = max(HEAD_START * (time.perf_counter() - start), LEAST_HEAD_START_S)
        torch.cuda.synchronize()
        self._cycles[name] = int(host * CYCLES_A_SECOND)

    def once(self, name: str, call: Call) -> float:
        """Milliseconds of one call."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before(call)
        self._flushed.zero_()
        torch.cuda._sleep(self._cycles[name])
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))


def before(call: Call) -> None:
    """What a call wants run ahead of it."""
    if hasattr(call, "before"):
        call.before()


HOST_CALLS, HOST_SERIES = 5, 7


def host_us(call: Call, device: torch.device) -> float:
    """Microseconds that the host takes to queue a call: the median of series that are short enough for the queue."""
    taken = []
    for _ in range(HOST_SERIES):
        for _ in range(HOST_CALLS):
            before(call)
        _wait(device)
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        taken.append(1e6 * (time.perf_counter() - start) / HOST_CALLS)
    _wait(device)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that tensors of a call took at once, its results included and its inputs not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    for event in sorted(_memory_events(profile), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _memory_events(profile: torch.profiler.profile) -> list[Any]:
    """Allocations, and frees with a negative size."""
    recorded = profile.profiler
    assert recorded is not None and recorded.kineto_results is not None
    return [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
