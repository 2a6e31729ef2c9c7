"""Calls that ran without a measurement of their own, kept on request: the list of what to tune next.

A file holds a line of JSON a problem, with the fields of `config.Problem`. `options(miss_log=...)` appends to it, and
`dilated-attention tune --from-misses` reads it.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from ..config import Problem, ProblemKey
from ..errors import ArgumentError, ConfigError
from .plan import MEASURED, Plan

LIMIT = 1000
"""Lines that a process lets a file grow to."""

_writing = threading.Lock()


def note(path: Path, plan: Plan, *, backward: bool) -> None:
    """Appends the plan's problem to a file if a launch of it was never measured, and no problem like it is there.

    Args:
        path: The file; made where absent.
        plan: What runs.
        backward: Gradients will be asked for: their launches count too.
    """
    asked = (choice for choice in (*plan.launches, *plan.beaten) if backward or choice.op == "fwd")
    if any(choice.rung not in MEASURED for choice in asked):
        _append(path, plan.problem)


def read(path: Path) -> list[Problem]:
    """The problems of a file, those of equal keys once.

    Raises:
        ArgumentError: The file cannot be read, or a line is no problem; the message names file and line.
    """
    try:
        return _read(path)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be read: {error.strerror}; name a file that options(miss_log=...) or "
            f"`dilated-attention db stale --problems` has written"
        ) from error


def _read(path: Path) -> list[Problem]:
    problems: dict[tuple[ProblemKey, ...], Problem] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            fields = json.loads(text)
            fields["branches"] = tuple((segment, dilation) for segment, dilation in fields["branches"])
            fields["query_range"] = fields.get("query_range") and tuple(fields["query_range"])
            problem = Problem(**fields)
            problems.setdefault(_likeness(problem), problem)
        except (ValueError, TypeError, KeyError, ZeroDivisionError, ConfigError) as error:
            raise ArgumentError(
                f"{path}:{number}: this is no problem ({error}); expected a line as options(miss_log=...) writes it"
            ) from error
    return list(problems.values())


def line(problem: Problem) -> str:
    """A problem as a file holds it."""
    return json.dumps(asdict(problem)) + "\n"


def _likeness(problem: Problem) -> tuple[ProblemKey, ...]:
    """What a tuner would measure for a problem: lengths and batches that share it are one line."""
    return tuple(ProblemKey.of(problem, "fwd", branch) for branch in range(len(problem.branches)))


@lru_cache(maxsize=4096)
def _append(path: Path, problem: Problem) -> None:
    """Memoised, so that a call that comes again costs a look-up."""
    whole = replace(problem, query_range=None)
    with _writing:
        try:
            known = _known(path)
            if _likeness(whole) in known or len(known) >= LIMIT:
                return
            known.add(_likeness(whole))
            # One write of one line: processes that share the file do not cut each other's.
            stream = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(stream, line(whole).encode())
            finally:
                os.close(stream)
        except OSError as error:
            warnings.warn(f"miss_log {path} cannot be written to: {error.strerror}; misses are lost", stacklevel=2)


@lru_cache
def _known(path: Path) -> set[tuple[ProblemKey, ...]]:
    return {_likeness(problem) for problem in _read(path)} if path.exists() else set()
