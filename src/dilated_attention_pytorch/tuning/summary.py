"""What a run came to, in a few lines or as values for a script; `dilated-attention report` tells the rest."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ..config import EVERY_OP, RESULTS, ProblemKey
from .folding import is_noisy
from .journal import Journal, Measurement, Pick
from .ledger import title
from .problems import Task
from .search import candidate_of
from .space import APART, KERNEL


def values(journal: Journal, tasks: Sequence[Task], path: Path, root: Path | None) -> dict[str, Any]:
    """The run in plain values.

    Args:
        journal: Its rows, those of earlier starts included.
        tasks: What was to be tuned.
        path: The journal's file.
        root: The database that it was folded into.
    """
    wanted = {task.key for task in tasks}
    picks = {pick.key: pick for pick in journal.picks if pick.key in wanted}
    gains = [pick.default_us / pick.median_us for pick in picks.values() if pick.default_us]
    failed = [row for row in journal.measurements if row.status not in ("ok", "screened")]
    failures = Counter(row.status for row in failed if not _is_rival(row, picks))
    return {
        "journal": str(path),
        "database": None if root is None else str(root),
        "problems": len(tasks),
        "tuned": len(picks),
        "seconds": round(sum(end.seconds for end in journal.ends), 1),
        "finished": journal.end is not None and journal.end.finished,
        "gain": {"mean": geometric_mean(gains), "worst": min(gains)} if gains else None,
        "failures": dict(sorted(failures.items())),
        "joint": [
            {"problem": title(pick.key), "median_us": pick.median_us, "apart_us": pick.apart_us}
            for pick in picks.values()
            if pick.apart_us is not None
        ],
        "noisy": [candidate_of(pick).name for pick in picks.values() if is_noisy(pick, journal)],
        "rivals": _rivals(journal, picks),
        "rivals_failed": dict(Counter(f"{row.route} {row.status}" for row in failed if _is_rival(row, picks))),
    }


BACKWARDS = [
    ops
    for count in range(1, len(EVERY_OP) + 1)
    for ops in itertools.combinations(EVERY_OP, count)
    if sorted(name for op in ops for name in RESULTS[op]) == ["dk", "dq", "dv"]
]
"""Launches that together write every gradient once."""


def _rivals(journal: Journal, picks: Mapping[ProblemKey, Pick]) -> list[dict[str, Any]]:
    """Each external route beside the launches that do its work: one forward, or a whole backward without its delta."""
    found = []
    for row in journal.measurements:
        if row.stage == "finals" and row.median_us is not None and _is_rival(row, picks):
            ways = [(row.key.op,)] if row.key.op == "fwd" else BACKWARDS
            times = {"+".join(ops): _together(row.key, ops, picks) for ops in ways}
            ops, ours = min(times.items(), key=lambda way: way[1])
            if ours < math.inf:
                words = {"problem": title(replace(row.key, op=ops)), "route": row.route}
                found.append({**words, "median_us": row.median_us, "ours_us": ours})
    return found


def _is_rival(row: Measurement, picks: Mapping[ProblemKey, Pick]) -> bool:
    """It is of another route than what could be picked, and not ours."""
    return row.route not in (picks[row.key].route if row.key in picks else KERNEL, APART)


def _together(key: ProblemKey, ops: Iterable[str], picks: Mapping[ProblemKey, Pick]) -> float:
    """Microseconds of the picks of some launches of a problem; infinite where one has none."""
    keys = [replace(key, op=op) for op in ops]
    return math.fsum(picks[key].median_us if key in picks else math.inf for key in keys)


def text(found: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{found['tuned']} of {found['problems']} problems tuned in {found['seconds']:g} s"]
    if found["gain"]:
        gain = found["gain"]
        lines.append(f"gain over the untuned default: {gain['mean']:.3f} (geometric mean), {gain['worst']:.3f} (worst)")
    if found["joint"]:
        beaten = [row["problem"] for row in found["joint"] if row["median_us"] > row["apart_us"]]
        rest = f": {', '.join(beaten)}; calls make those" if beaten else ""
        lines.append(f"{len(found['joint'])} timed beside what they stand in for, {len(beaten)} of them slower{rest}")
    if found["failures"]:
        lines.append("candidates that failed: " + ", ".join(f"{n} {kind}" for kind, n in found["failures"].items()))
    if found["noisy"]:
        lines.append(
            f"{len(found['noisy'])} not recorded, their times spread too wide: is another process loading the GPU? "
            "Tune again"
        )
    for route in sorted({row["route"] for row in found["rivals"]}):
        rows = [row for row in found["rivals"] if row["route"] == route]
        slower = geometric_mean(row["median_us"] / row["ours_us"] for row in rows)
        lines.append(f"{route} takes {slower:.2f} times as long as the picks (geometric mean of {len(rows)})")
        lines += [
            f"{route} is faster for {row['problem']}: {row['median_us']:.1f} us, ours {row['ours_us']:.1f} us"
            for row in rows
            if row["median_us"] < row["ours_us"]
        ]
    if found["rivals_failed"]:
        told = ", ".join(f"{n} {kind}" for kind, n in found["rivals_failed"].items())
        lines.append(f"external routes that failed, and were not timed: {told}")
    lines.append(f"database {found['database']}" if found["database"] else "no database was written")
    lines.append(f"journal  {found['journal']}")
    return "\n".join(lines + ([] if found["finished"] else ["not finished: the same command with --resume goes on"]))
