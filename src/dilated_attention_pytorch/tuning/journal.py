"""What a tuning run saw, one JSON object a line, written as it happens and never changed afterwards.

Killed at any moment, a run has lost at most the line it was writing: a torn last line is no line. The database is
folded from journals; the report is drawn from them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import _layout
from ..config import ProblemKey
from ..database import Resources
from ..errors import DatabaseError

SCHEMA = 1
BLOCK = 1 << 16
"""Bytes that are read at once in search of the last whole line."""

GONE_S = 3.0
"""Seconds that a run which was killed may take to be gone with its processes: whoever goes on with it waits so long."""

SYNC_S = 1.0
"""Seconds between two waits for the disk: one takes milliseconds, as long as a measurement."""

STAGES = ("screen", "check", "race", "step", "finals")
STATUSES = ("ok", "compile", "timeout", "resources", "runtime", "illegal_access", "correctness", "screened")

Config = Mapping[str, int | str]
"""A candidate's choices by name: those of a `LaunchConfig`, or of an external route."""


@dataclass(frozen=True)
class Run:
    """Where and how a run began. A resumed run has one such line for each start.

    Attributes:
        device: Name of the GPU, as in the database; "cpu" for a CPU.
        arch: "sm_90", …, or "cpu".
        sms: Streaming multiprocessors; cores of a CPU.
        shared_bytes: Shared memory that one block may use.
        bandwidth: Memory bandwidth in GB/s; None where unknown.
        triton: Its version; None where it takes no part.
        torch: Its version.
        driver: The GPU's driver; None for a CPU.
        command: The command line.
        started: When, ISO 8601 with the zone.
        kernels: Digest of all kernels' texts: a run goes on with those it began with.
    """

    device: str
    arch: str
    sms: int
    shared_bytes: int
    bandwidth: float | None
    triton: str | None
    torch: str
    driver: str | None
    command: str
    started: str
    kernels: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class ProblemRow:
    """A problem whose search began.

    Attributes:
        key: What its winner is stored under.
        workload: Name of the workload it comes from.
        weight: Its share of the run's estimated work, 0..1.
        flops: Multiplications and additions of one launch.
        bytes: What one launch must read and write at least.
        default: The untuned configuration.
        incumbent: What the database has for this very key; None where it has nothing.
    """

    key: ProblemKey
    workload: str
    weight: float
    flops: float
    bytes: float
    default: Config | None
    incumbent: Config | None


@dataclass(frozen=True)
class Measurement:
    """One candidate at one stage: losers and failures are rows like any other.

    Attributes:
        key: The problem.
        config: The candidate's choices.
        route: "kernel", "apart", "torch", "cudnn", …
        variant: Name of the text that ran; None for several, and for an external route.
        stage: "screen", "check", "race", "step" or "finals".
        status: "ok", or the kind of failure; "screened" was compiled and left out.
        median_us: Microseconds of a launch, and the interval that holds the median.
        low_us: See there.
        high_us: See there.
        resources: What the compiled kernel takes.
        error: Relative error against the float64 reference.
        tolerance: The most that was allowed.
        flag: "noisy" where even a second measurement spread too wide, else "".
        message: Of a failure, or why it was left out.
    """

    key: ProblemKey
    config: Config
    route: str
    variant: str | None
    stage: str
    status: str
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    resources: Resources | None = None
    error: float | None = None
    tolerance: float | None = None
    flag: str = ""
    message: str = ""


@dataclass(frozen=True)
class Pick:
    """A problem's winner, and why it is.

    Attributes:
        key: The problem.
        config: The winner's choices.
        route: Its route.
        why: "fastest", "tie: incumbent", "tie: default", "tie: less shared memory", "tie: fewer warps" or
            "incumbent kept".
        median_us: Of the finals, with its interval.
        low_us: See there.
        high_us: See there.
        default_us: The untuned default's median; None where it did not run, or its times spread too wide.
        second_us: The runner-up's; None where there was none, or its times spread too wide.
        candidates: Candidates that were timed.
        apart_us: Of the launches that a joint one stands in for, timed in turn with it; None where there are none, or
            they failed, or their times spread too wide.
    """

    key: ProblemKey
    config: Config
    route: str
    why: str
    median_us: float
    low_us: float
    high_us: float
    default_us: float | None
    second_us: float | None
    candidates: int
    apart_us: float | None = None

    @property
    def is_beaten(self) -> bool:
        """The launches that it stands in for are faster: calls make them in its place."""
        return self.apart_us is not None and self.median_us > self.apart_us


@dataclass(frozen=True)
class End:
    """The run is over: after so many seconds, with all its problems or out of budget."""

    seconds: float
    finished: bool


Row = Run | ProblemRow | Measurement | Pick | End
_KINDS: dict[str, type[Row]] = {
    "run": Run,
    "problem": ProblemRow,
    "measurement": Measurement,
    "pick": Pick,
    "end": End,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}


@dataclass
class Journal:
    """The rows of a journal by kind, each in the order of writing.

    Attributes:
        end: How the last start ended; None where it was killed or still runs.
    """

    runs: list[Run] = field(default_factory=list)
    problems: list[ProblemRow] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    end: End | None = field(default=None, init=False)

    def add(self, row: Row) -> None:
        """Put a row with its kind."""
        shelves: dict[type[Row], list[Any]] = {
            Run: self.runs,
            ProblemRow: self.problems,
            Measurement: self.measurements,
            Pick: self.picks,
            End: self.ends,
        }
        shelves[type(row)].append(row)
        if isinstance(row, End):
            self.end = row
        elif isinstance(row, ProblemRow) or (isinstance(row, Run) and self.end and not self.end.finished):
            self.end = None  # who resumes what was finished, and begins nothing, leaves it finished


def runs_dir() -> Path:
    """Where journals lie: a folder of the user's data, the same for a wheel and a checkout."""
    return _layout.data_dir() / "runs"


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Journal:
    """The rows of a journal; a torn last line is ignored.

    Raises:
        DatabaseError: A line is no row, or is of a newer schema; the message names file, line and remedy.
    """
    journal = Journal()
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
    for number, line in enumerate(lines, start=1):
        try:
            journal.add(row_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatabaseError(
                f"{path}:{number}: is no row of a tuning journal ({error}); remove the line, or tune without --resume"
            ) from error
    return journal


def row_of(values: Mapping[str, Any]) -> Row:
    """A row from its JSON object."""
    given = dict(values)
    cls = _KINDS[given.pop("kind")]
    if given.get("schema", SCHEMA) > SCHEMA:
        raise ValueError(f"schema {given['schema']} is newer than the {SCHEMA} read here: upgrade this package")
    if unknown := sorted(given.keys() - {f.name for f in fields(cls)}):
        raise ValueError(f"{unknown[0]!r} is no field of a {_NAMES[cls]}")
    if "key" in given:
        given["key"] = key_of(given["key"])
    if given.get("resources") is not None:
        given["resources"] = Resources(**given["resources"])
    return cls(**given)


def key_of(values: Mapping[str, Any]) -> ProblemKey:
    """A problem's key from its JSON object."""
    branches = tuple((int(rows), int(stride)) for rows, stride in values["branches"])
    return ProblemKey(**{**values, "branches": branches, "flags": tuple(values["flags"])})


def to_json(row: Row) -> str:
    """A row as its line, without the newline."""
    return json.dumps({"kind": _NAMES[type(row)], **asdict(row)})


# ---- Writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """Appends rows to a journal, and keeps other writers out while it lives. Use it in a `with` statement.

    Rows are in the file when a call returns, whoever is killed then; a power cut may cost those of the last second.

    Args:
        path: The file, made where absent with its folder. A torn last line of a writer that was killed is cut off.

    Raises:
        DatabaseError: The file cannot be written to, or another run writes it.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=GONE_S)
            self._file = path.open("ab+", buffering=0)
            self._synced = 0.0
        except Timeout as error:
            raise DatabaseError(
                f"{path} is being written by another run, and two would measure the same; wait until that one has "
                f"ended, or begin a new one without --resume"
            ) from error
        except OSError as error:
            self._lock.release()
            raise DatabaseError(f"{path} cannot be written to: {error.strerror}; name another folder") from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk: told by who wrote
            os.fsync(self._file.fileno())
        self._file.close()
        self._lock.release()

    def add(self, *rows: Row) -> None:
        """Append rows together.

        Raises:
            DatabaseError: The disk is full or read-only; what was written of these rows is taken back.
        """
        text = "".join(f"{to_json(row)}\n" for row in rows).encode()
        size = self._cut_torn_line()
        try:
            while text:
                text = text[self._file.write(text) or 0 :]
            if time.monotonic() > self._synced + SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            raise DatabaseError(
                f"{self.path} cannot be written to: {error.strerror}; mend that, and go on with --resume"
            ) from error

    def _cut_torn_line(self) -> int:
        """The file's size, after a line that a killed writer left without an end has been cut off."""
        size = whole = self._file.seek(0, os.SEEK_END)
        while whole:
            start = max(whole - BLOCK, 0)
            self._file.seek(start)
            newline = self._file.read(whole - start).rfind(b"\n")
            whole = start + newline + 1
            if newline >= 0:
                break
        if whole < size:
            self._file.truncate(whole)
        return whole
