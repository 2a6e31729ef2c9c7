"""Which launches of the calls that people make have a measurement on a GPU, and what serves the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..config import OPS, Problem, ProblemKey
from ..database import Database
from ..device import Device, Toolchain
from ..runtime.plan import MEASURED, Choice, plan


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
        for branch in plan(problem, device, "triton", toolchain=toolchain, committed=found).branches:
            for op in OPS:
                key = replace(ProblemKey.of(problem, op, *branch.branches), order=branch.order)
                rows.setdefault(key, Covered(problem, key, getattr(branch, op)))
    return list(rows.values())
