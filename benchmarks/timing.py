"""The clock and the scale: interleaved times, and the most memory that tensors took."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

# The profiler's own library reports its start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Call = Callable[[], object]

PATIENCE = 10.0
"""Seconds after which no further round begins, once there are `LEAST_ROUNDS`: a slow machine gets fewer."""

LEAST_ROUNDS = 3

FLUSHED_BYTES = 1 << 28
"""Written before each timed call on a GPU: more than any level-2 cache holds."""

HEAD_START_CYCLES = 10_000_000
"""For so long the GPU sleeps before a timed call, 5 ms or so: the host has queued the call by then."""


class Spread(NamedTuple):
    """Times of one call in milliseconds."""

    median: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Call], device: torch.device, rounds: int, progress: Callable[[], None] = lambda: None
) -> dict[str, Spread]:
    """Time all calls in turn, round after round, so that a machine that slows down slows down for all of them; who
    goes first alternates.

    On a GPU it is the GPU's time, with a cold level-2 cache and without the time that the host takes to queue the call.

    Args:
        calls: By name. Each runs once unmeasured before the first round.
        device: Where they run.
        rounds: How often each is timed at most.
        progress: Called after each round.
    """
    once = _GpuClock(device) if device.type == "cuda" else _cpu_once
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for place in range(rounds):
        if place < LEAST_ROUNDS or time.perf_counter() - begun < PATIENCE:
            for name in list(calls)[:: -1 if place % 2 else 1]:
                times[name].append(once(calls[name]))
        progress()
    return {name: Spread(statistics.median(taken), min(taken), max(taken)) for name, taken in times.items()}


def _cpu_once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


class _GpuClock:
    """Times one call between two events."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop))


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
