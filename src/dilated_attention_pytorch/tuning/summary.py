"""What a run came to, in a few lines or as values for a script; `dilated-attention report` tells the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folding import is_noisy
from .journal import Journal
from .problems import Task
from .search import candidate_of


def values(journal: Journal, tasks: Sequence[Task], path: Path, root: Path | None) -> dict[str, Any]:
    """The run in plain values.

    Args:
        journal: Its rows, those of earlier starts included.
        tasks: What was to be tuned.
        path: The journal's file.
        root: The database that it was folded into.
    """
    wanted = {task.key for task in tasks}
    picks = [pick for pick in journal.picks if pick.key in wanted]
    gains = [pick.default_us / pick.median_us for pick in picks if pick.default_us]
    failures = Counter(row.status for row in journal.measurements if row.status not in ("ok", "screened"))
    return {
        "journal": str(path),
        "database": None if root is None else str(root),
        "problems": len(tasks),
        "tuned": len(picks),
        "seconds": round(sum(end.seconds for end in journal.ends), 1),
        "finished": bool(journal.ends and journal.ends[-1].finished),
        "gain": {"mean": math.exp(sum(map(math.log, gains)) / len(gains)), "worst": min(gains)} if gains else None,
        "failures": dict(sorted(failures.items())),
        "noisy": [candidate_of(pick).name for pick in picks if is_noisy(pick, journal)],
        "beaten_by_rivals": _beaten(journal, wanted),
    }


def _beaten(journal: Journal, wanted: set[Any]) -> list[dict[str, Any]]:
    """External routes that were faster than the pick."""
    medians = {pick.key: (pick.route, pick.median_us) for pick in journal.picks}
    return [
        {
            "op": row.key.op,
            "branches": row.key.branches,
            "route": row.route,
            "median_us": row.median_us,
            "pick_us": ours,
        }
        for row in journal.measurements
        if row.stage == "finals" and row.key in wanted and row.key in medians and row.median_us is not None
        for route, ours in [medians[row.key]]
        if row.route != route and row.median_us < ours
    ]


def text(found: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [f"{found['tuned']} of {found['problems']} problems tuned in {found['seconds']:g} s"]
    if found["gain"]:
        gain = found["gain"]
        lines.append(f"gain over the untuned default: {gain['mean']:.3f} (geometric mean), {gain['worst']:.3f} (worst)")
    if found["failures"]:
        lines.append("candidates that failed: " + ", ".join(f"{n} {kind}" for kind, n in found["failures"].items()))
    if found["noisy"]:
        lines.append(
            f"{len(found['noisy'])} not recorded, their times spread too wide: is another process loading the GPU? "
            "Tune again"
        )
    lines += [
        f"{row['route']} is faster for {row['op']} {list(map(list, row['branches']))}: {row['median_us']:.1f} us, "
        f"ours {row['pick_us']:.1f} us"
        for row in found["beaten_by_rivals"]
    ]
    lines.append(f"database {found['database']}" if found["database"] else "no database was written")
    lines.append(f"journal  {found['journal']}")
    return "\n".join(lines + ([] if found["finished"] else ["not finished: the same command with --resume goes on"]))
