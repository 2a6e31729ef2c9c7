"""Result files: written after every case, taken up again, compared with one another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, limits_ms, useful_flops
from benchmarks.contenders import NOT_PEERS, OURS, launches
from dilated_attention_pytorch.errors import ArgumentError

FOLDER = Path(__file__).resolve().parent / "results"
MEASUREMENTS = ("forward", "backward", "both")
LARGEST_FALL = 0.05
"""By which share a ratio may fall before `regress` fails."""

ZERO_ROWS = "in the time of all contenders"
ZERO_ROWS_ONCE = "in our time alone"
"""Where the zero rows of a dilated branch's kernels are counted: now, and in files that do not say."""

Document = dict[str, Any]


def load(path: Path) -> Document:
    """A result file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def save(document: Document, path: Path) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def record(case: Case, rows: Mapping[str, Any], ceilings: Mapping[str, float], seconds: float) -> Document:
    """A case as the file has it."""
    found: Document = {
        "level": case.level,
        "workload": case.workload,
        "problem": {name: value for name, value in asdict(case.problem).items() if name in _TOLD},
        "gflop": round(useful_flops(case.problem) / 1e9, 3),
        "launches": launches(case.problem),
    }
    if case.level in ("kernels", "operations"):
        limits = limits_ms(case.problem, ceilings["matmul_tflops"], ceilings["copy_tb_s"])
        found["limit_ms"] = {name: round(value, 5) for name, value in limits.items()}
    return {**found, "seconds": round(seconds, 1), "rows": dict(rows)}


_TOLD = ("dtype", "batch", "length", "heads", "head_dim", "branches", "queries", "head_offset", "order", "causal")
_TOLD += ("padding",)


LEFT_OUT = "left out"
"""How the reason begins where a contender was not tried for want of time."""


def left_out(case: Mapping[str, Any]) -> list[str]:
    """Peers that a case's run had no time for: its best peer is the best of the others."""
    return [name for name, row in case["rows"].items() if row.get("failed", "").startswith(LEFT_OUT)]


def zero_rows(run: Mapping[str, Any]) -> str:
    """Whose time has the zero rows that a dilated branch leaves in its results."""
    return str(run.get("zero_rows", ZERO_ROWS_ONCE))


def median(row: Mapping[str, Any], measurement: str) -> float | None:
    """Milliseconds, where that was measured."""
    found = row.get(f"{measurement}_ms")
    return None if found is None or "failed" in row else float(found[0])


def best_peer(case: Mapping[str, Any], measurement: str) -> tuple[str, float] | None:
    """The fastest of those who compute the same, and its milliseconds."""
    times = {
        name: time
        for name, row in case["rows"].items()
        if name not in NOT_PEERS and (time := median(row, measurement)) is not None
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def ratio(case: Mapping[str, Any], measurement: str) -> float | None:
    """The best peer's time over ours: above 1 we are faster."""
    peer, mine = best_peer(case, measurement), median(case["rows"].get(OURS, {}), measurement)
    return None if peer is None or mine is None else peer[1] / mine


def ratios(document: Document) -> Iterator[tuple[str, str, float]]:
    """Case, measurement and ratio of everything that has one."""
    for name, case in document["cases"].items():
        for measurement in MEASUREMENTS:
            if (found := ratio(case, measurement)) is not None:
                yield name, measurement, found


def regressions(old: Document, new: Document, largest_fall: float = LARGEST_FALL) -> list[str]:
    """What fell, in sentences: ratios of cases that both files have, and what we no longer can do.

    Raises:
        ArgumentError: The files count zero rows in different ways.
    """
    ways = [sorted({zero_rows(run) for run in document["runs"]}) for document in (old, new)]
    if ways[0] != ways[1]:
        told = (" and ".join(way) for way in ways)
        raise ArgumentError(
            "the zero rows of dilated branches are {} in the one file and {} in the other, so that ratios do not "
            "compare; measure both with the same benchmarks".format(*told)
        )
    after = {(case, measurement): found for case, measurement, found in ratios(new)}
    fallen = []
    for case, measurement, before in ratios(old):
        if case not in new["cases"]:
            continue
        now = after.get((case, measurement))
        if now is None:
            reason = new["cases"][case]["rows"].get(OURS, {}).get("failed", "not measured")
            fallen.append(f"{case} {measurement}: {before:.3f} before, now none: {reason}")
        elif now < (1 - largest_fall) * before:
            fallen.append(f"{case} {measurement}: {before:.3f} before, now {now:.3f} ({now / before - 1:+.1%})")
    return fallen
