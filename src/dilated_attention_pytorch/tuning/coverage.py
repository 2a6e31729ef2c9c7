"""Which launches of the calls that people make have a measurement on a GPU, and what serves the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import Problem, ProblemKey
from ..database import Database
from ..device import Device, Toolchain
from ..runtime.plan import MEASURED, Choice, plan
from ..runtime.variants import key_of


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
