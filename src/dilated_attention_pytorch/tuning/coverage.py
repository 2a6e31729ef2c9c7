"""Which launches of the calls that people make have a measurement on a GPU, and what serves the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import Problem, ProblemKey
from ..database import FRESH, TOOLCHAIN_STALE, Database, status
from ..device import Device, Toolchain
from ..runtime.plan import MEASURED, Choice, plan
from ..runtime.variants import key_of
from .problems import Task


@dataclass(frozen=True)
class Covered:
    """One launch.

    Attributes:
        problem: The call.
        key: What its measurement is stored under.
        choice: What it runs with, from which rung of the ladder, and why.
    """

    problem: Problem
    key: ProblemKey
    choice: Choice

    @property
    def measured(self) -> bool:
        """Somebody measured this very problem on this chip."""
        return self.choice.rung in MEASURED


def coverage(problems: Iterable[Problem], device: Device, toolchain: Toolchain, found: Database) -> list[Covered]:
    """The launches of forward and backward of each call, in the order of the calls; equal keys once.

    Raises:
        UnsupportedError: A call has no launch of ours on this device.
        DatabaseError: A file of the database is broken.
    """
    rows: dict[ProblemKey, Covered] = {}
    for problem in problems:
        for choice in plan(problem, device, "triton", toolchain=toolchain, committed=found).launches:
            key = key_of(problem, choice.op, *choice.branches)
            rows.setdefault(key, Covered(problem, key, choice))
    return list(rows.values())


def missing(tasks: Iterable[Task], device: Device, toolchain: Toolchain, databases: Sequence[Database]) -> list[Task]:
    """What a run would tune and no database has an entry for: none of this very device, or a stale or wrong one.

    More than the launches of a call: of branches that could share a pass it also measures each alone.
    """

    def is_there(key: ProblemKey, found: Database) -> bool:
        entry = found.entries(device.arch, device.name, key.op).get(key)
        good = (FRESH, TOOLCHAIN_STALE)
        return entry is not None and status(entry, device.arch, toolchain, found.kernels) in good

    return [task for task in tasks if not any(is_there(task.key, found) for found in databases)]
