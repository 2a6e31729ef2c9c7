"""What this package wants to reach on a GPU, and what it must not fall below, held against a result file."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import OURS, TORCHSCALE, UNORDERED
from benchmarks.results import Document, best_peer, median, ratio
from dilated_attention_pytorch.config import DTYPE_BYTES

MEASURED = {"forward": "forward", "backward": "backward", "both": "forward + backward"}

LINEAR_FROM = 65536
"""Tokens from which on time goes with the tokens."""


@dataclass(frozen=True)
class Found:
    """One case's share in a goal.

    Attributes:
        case: Its name.
        value: What was measured.
        floor: What it must not miss.
        goal: What it should reach.
    """

    case: str
    value: float
    floor: float
    goal: float


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Attributes:
        name: What it is about.
        find: The cases of a result file that take part.
        lower: Less is better.
        unit: Behind the numbers.
    """

    name: str
    find: Callable[[Document], Iterable[Found]]
    lower: bool = False
    unit: str = ""

    def holds(self, value: float, bound: float) -> bool:
        """Whether a value keeps to a floor or reaches a goal."""
        return value <= bound if self.lower else value >= bound

    def margin(self, found: Found) -> float:
        """By which factor its floor holds: the least of them is the worst case."""
        return found.floor / found.value if self.lower else found.value / found.floor


def _cases(document: Document, pattern: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, case in document["cases"].items():
        if fnmatch.fnmatchcase(name, pattern):
            yield name, case


def _beside_best(
    pattern: str, measurement: str, floor: float, goal: float, *, rows: int = 0
) -> Callable[[Document], Iterator[Found]]:
    """Of cases without an order, of so many kept rows a segment at least."""

    def find(document: Document) -> Iterator[Found]:
        for name, case in _cases(document, pattern):
            (width, rate), *_ = case["problem"]["branches"]
            if width // rate < rows or case["problem"]["order"] != "none":
                continue
            if (value := ratio(case, measurement)) is not None:
                yield Found(name, value, floor, goal)

    return find


def _beside(
    pattern: str, measurement: str, other: str, floor: float, goal: float
) -> Callable[[Document], Iterator[Found]]:
    def find(document: Document) -> Iterator[Found]:
        for name, case in _cases(document, pattern):
            mine, theirs = (median(case["rows"].get(who, {}), measurement) for who in (OURS, other))
            if mine and theirs:
                yield Found(name, theirs / mine, floor, goal)

    return find


def extra_bytes(case: Mapping[str, Any], who: str) -> float | None:
    """The peak of forward and backward above q, k, v, out and their gradients."""
    peaks = case["rows"].get(who, {}).get("peak_bytes", {})
    return peaks["both"] - 4 * _tensor_bytes(case) if "both" in peaks else None


def _tensor_bytes(case: Mapping[str, Any]) -> int:
    problem = case["problem"]
    elements = problem["batch"] * problem["length"] * problem["heads"] * problem["head_dim"]
    return int(elements * DTYPE_BYTES[problem["dtype"]])


def _memory(document: Document) -> Iterator[Found]:
    for name, case in _cases(document, "op-*"):
        peer = best_peer(case, "both")
        mine, theirs = extra_bytes(case, OURS), None if peer is None else extra_bytes(case, peer[0])
        if mine is not None and theirs:
            problem = case["problem"]
            # lse and delta, and one gradient in float32.
            rows = problem["batch"] * problem["length"] * problem["heads"]
            yield Found(name, mine / theirs, 0.25, (8 + 4 * problem["head_dim"]) * rows / theirs)


def _host(measurement: str, floor: float, goal: float) -> Callable[[Document], Iterator[Found]]:
    def find(document: Document) -> Iterator[Found]:
        for name, case in _cases(document, "op-*"):
            if (taken := case["rows"].get(OURS, {}).get("host_us")) is not None:
                yield Found(name, taken[measurement], floor, goal)

    return find


def _linear(document: Document) -> Iterator[Found]:
    """Time a token, beside that at `LINEAR_FROM`."""
    each = {
        (case["workload"], case["problem"]["length"], measurement): time / case["problem"]["length"]
        for _, case in _cases(document, "scale-*")
        for measurement in ("forward", "both")
        if (time := median(case["rows"].get(OURS, {}), measurement)) is not None
    }
    for (workload, length, measurement), time in each.items():
        first = each.get((workload, LINEAR_FROM, measurement))
        if first is not None and length > LINEAR_FROM:
            yield Found(f"scale-{workload}-{length}", time / first, 1.05, 1.05)


def _goals() -> Iterator[Goal]:
    for rows, floor, goal in ((128, 1.15, 1.5), (256, 1.15, 1.3), (512, 0.95, 1.15), (1024, 0.95, 1.08)):
        for measurement in ("forward", "backward"):
            find = _beside_best(f"kernel-n{rows}-*", measurement, floor, goal)
            yield Goal(f"one branch, n = {rows}, {measurement}", find)
    for head_dim, measurement, floor in (
        (64, "forward", 0.88),
        (64, "backward", 0.70),
        (128, "forward", 0.75),
        (128, "backward", 0.68),
    ):
        find = _beside_best(f"kernel-*-d{head_dim}-*", measurement, floor, 1.0, rows=2048)
        yield Goal(f"one branch, n ≥ 2048, D {head_dim}, {measurement}", find)
    for measurement, floor, goal in (("forward", 1.4, 2.0), ("both", 1.2, 1.6)):
        yield Goal(
            f"LongNet, {MEASURED[measurement]}, beside the best peer",
            _beside_best("op-longnet*", measurement, floor, goal),
        )
    for measurement in ("forward", "both"):
        find = _beside("op-*", measurement, TORCHSCALE, 3.0, 5.0)
        yield Goal(f"whole operations, {MEASURED[measurement]}, beside torchscale's way", find)
    yield Goal("memory above tensors and gradients, of the best peer's", _memory, lower=True)
    for measurement, floor, goal in (
        ("forward", 20.0, 8.0),
        ("autograd forward", 35.0, 15.0),
        ("backward", 40.0, 15.0),
    ):
        yield Goal(f"host time a call, {measurement}", _host(measurement, floor, goal), lower=True, unit=" µs")
    for measurement in ("forward", "backward"):
        yield Goal(f"an order beside none, {measurement}", _beside("kernel-*", measurement, UNORDERED, 0.85, 0.95))
    yield Goal(f"time a token beyond {LINEAR_FROM} tokens, beside that at {LINEAR_FROM}", _linear, lower=True)


GOALS = tuple(_goals())
