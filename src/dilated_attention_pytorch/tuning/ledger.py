"""What a tuning database holds, and proof that each entry is good for something: found by its own key, fit to run.

Nothing here needs a GPU: an entry is looked up for a simulated device, and compiled for an architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .. import database
from .. import device as devices
from ..config import Problem, ProblemKey, cdiv
from ..database import FOLD, FRESH, INVALID, KERNEL_STALE, TOOLCHAIN_STALE, Database, Entry
from ..device import CPU, LEAST_SHARED_BYTES, SHARED_BYTES, Device, Toolchain
from ..errors import DatabaseError, DilatedAttentionError
from ..runtime.plan import Choice, launches_of
from ..runtime.variants import key_of
from ..variant import Variant
from ..workloads import near_square
from .screen import Resources, compile_offline

STATUSES = (FRESH, TOOLCHAIN_STALE, KERNEL_STALE, INVALID)


@dataclass(frozen=True)
class Row:
    """One entry, where it lies, and how far it can be trusted today."""

    path: Path
    entry: Entry
    status: str

    @property
    def arch(self) -> str:
        """What it was compiled for."""
        return self.path.parent.parent.name

    @property
    def device(self) -> str:
        """What it was measured on, by name."""
        return self.path.parent.name

    @property
    def title(self) -> str:
        """Device and key in one line."""
        return f"{self.device} {title(self.entry.key)}"


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a database, as a sentence with its remedy."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def title(key: ProblemKey) -> str:
    """A key as a person reads it: `fwd bf16 D64 2048/2 dilated snake causal full g512`, rows/stride by branch."""
    branches = "+".join(f"{rows}/{stride}" for rows, stride in key.branches)
    words = [key.op, key.dtype, f"D{key.head_dim}", branches, key.queries]
    words += [key.order] if key.order != "none" else []
    words += ["causal"] if key.causal else []
    return " ".join([*words, *key.flags, f"g{key.grid}"])


def rows(found: Database, toolchain: Toolchain | None = None) -> list[Row]:
    """Every entry, by file and key.

    Args:
        found: The database.
        toolchain: What would compile the kernels; None asks this process.

    Raises:
        DatabaseError: A file breaks its schema.
    """
    toolchain = Toolchain.current() if toolchain is None else toolchain
    return [
        Row(path, entry, database.status(entry, path.parent.parent.name, toolchain, found.kernels))
        for path in found.files()
        for entry in database.read(path).values()
    ]


def unread(found: Database) -> list[Fault]:
    """Files that cannot be read, or that no lookup would find: until these are mended nothing else can be said."""
    try:
        paths = found.files()
    except DatabaseError as error:
        return [_fault(error)]
    broken = []
    for path in paths:
        try:
            database.read(path)
        except DatabaseError as error:
            broken.append(_fault(error))
    return broken


def faults(rows: Iterable[Row], found: Database) -> list[Fault]:
    """Entries that are of no use: wrong, unreachable by their own key, too large for their GPU, or slower than nothing.

    Args:
        rows: Entries of the database.
        found: The database.
    """
    return [Fault(row.title, problem) for row in rows for problem in _complaints(row, found)]


def asking(key: ProblemKey, variant: Variant | None = None) -> Problem | None:
    """The smallest call whose one launch is looked up under this key, or None where no call ever is.

    Args:
        key: The key.
        variant: A text that the call is to run, given tiles that suit it: it settles the segment length, one of those
            whose rows round to the key's, and whether the last segment is cut short.
    """
    kept, stride = key.branches[0]
    segment = variant.segment if variant is not None and isinstance(variant.segment, int) else kept * stride
    wider = tuple((rows * rate, rate) for rows, rate in key.branches[1:])
    if variant is not None and variant.wider:
        wider = variant.wider
    last_rows, last_rate = key.branches[-1]
    whole = last_rows * last_rate if wider else segment if "full" in key.flags else 2 * segment
    segments = cdiv(whole, segment)
    if key.grid < segments:
        return None
    heads = min(key.grid // segments, 16)
    base = Problem(
        dtype=key.dtype,
        batch=key.grid // segments // heads,
        length=whole,
        heads=heads,
        kv_heads=heads,
        head_dim=key.head_dim,
        branches=((segment, stride), *wider),
        queries=key.queries,
        order=key.order,
        causal=key.causal,
        mask="mask" in key.flags,
        dropout="dropout" in key.flags,
        padding="zeros" if "zeros" in key.flags else "none",
        tf32="tf32" in key.flags,
    )
    lengths = (whole,) if variant is None or variant.even else (whole - 1, whole)
    # A snake may change nothing: one of these widths cuts a row that runs backwards, if any does.
    widths = (near_square(whole), max(segment - 1, 1)) if key.order == "snake" else (0,)
    for length, width in itertools.product(lengths, widths):
        problem = replace(base, length=max(length, 1), row_width=width)
        if key_of(problem, key.op, *range(len(key.branches))) == key:
            return problem
    return None


def recompiled(row: Row, kernels: Mapping[str, tuple[str, ...]]) -> Resources:
    """What the measured kernel takes when it is compiled now, on any machine, for the architecture of its entry.

    Args:
        row: An entry whose kernel is still there.
        kernels: Variants by the hash of their text.

    Raises:
        DatabaseError: No committed kernel has the text that was measured, or no call asks for the entry.
        Exception: Whatever the compiler raises.
    """
    entry = row.entry
    variant = _measured(entry, kernels)
    if variant is None:
        raise DatabaseError(f"{row.title}: no kernel has the text {entry.provenance.kernel}; tune it again")
    problem = asking(entry.key, variant)
    if problem is None:
        raise DatabaseError(f"{row.title}: no call is looked up under this key; remove the entry")
    branches = tuple(range(len(problem.branches)))
    choice = Choice.of(entry.key.op, branches, variant, entry.launch, "exact", "")
    return compile_offline(problem, choice, row.arch)


def recompilation(row: Row, kernels: Mapping[str, tuple[str, ...]], toolchain: Toolchain) -> str | None:
    """What is wrong with the shared memory that an entry claims, as a sentence; None where it is as claimed.

    The compiler that measured allocates what it did then; another may differ, as long as the device has it.

    Args:
        row: As in `recompiled`; so is the rest.
        kernels: As there.
        toolchain: What compiles.
    """
    claimed, limit = row.entry.resources.shared_bytes, device_of(row).shared_bytes
    takes = recompiled(row, kernels).shared_bytes
    if toolchain.triton == row.entry.provenance.triton and takes != claimed:
        return f"takes {takes:,} bytes of shared memory, and claims {claimed:,}; tune it again"
    if takes > limit:
        return f"takes {takes:,} bytes of shared memory with Triton {toolchain.triton}, of {limit:,}; tune it again"
    return None


def device_of(row: Row) -> Device:
    """The device of an entry: as listed, or for one that is not, what its architecture has."""
    listed = devices.known().get(row.device)
    limit = SHARED_BYTES.get(row.arch, LEAST_SHARED_BYTES)
    return listed or Device(row.device, row.arch, sms=1, shared_bytes=limit, silicon=row.device)


def _fault(error: DatabaseError) -> Fault:
    where, _, problem = str(error).partition(": ")
    return Fault(where, problem)


def _complaints(row: Row, found: Database) -> Iterator[str]:
    entry, device = row.entry, device_of(row)
    times = entry.time_us
    if (found.root / "devices.yaml").exists() and row.device not in devices.known():
        yield "its device is not in devices.yaml; add it, tune_db/README.md says how"
    if device.arch != row.arch:
        yield f"lies under {row.arch}, and its device is {device.arch}; move the file"
    if entry.check.error > entry.check.tolerance:
        yield f"its result was wrong by {entry.check.error:g}, {entry.check.tolerance:g} is allowed; tune it again"
    if entry.resources.shared_bytes > device.shared_bytes:
        took = f"{entry.resources.shared_bytes:,} bytes of shared memory"
        yield f"takes {took}, and its device has {device.shared_bytes:,}; tune it again"
    if times.default is not None and times.median > times.default * (1 + FOLD):
        yield f"takes {times.median:g} us, and the untuned default {times.default:g} us; tune it again"
    if row.status in (FRESH, TOOLCHAIN_STALE):
        yield from _unreachable(row, device, found)


def _measured(entry: Entry, kernels: Mapping[str, tuple[str, ...]]) -> Variant | None:
    """The text that was measured; of several with the same code the first."""
    names = kernels.get(entry.provenance.kernel)
    return Variant.from_name(names[0]) if names else None


def _unreachable(row: Row, device: Device, found: Database) -> Iterator[str]:
    on_cpu = row.arch == CPU
    problem = asking(row.entry.key, None if on_cpu else _measured(row.entry, found.kernels))
    if problem is None:
        yield "no call is looked up under this key; remove the entry"
    if problem is None or on_cpu:
        return
    toolchain = Toolchain(row.entry.provenance.triton)
    try:
        launched, beaten = launches_of(problem, device, row.entry.key.op, toolchain=toolchain, committed=found)
    except DilatedAttentionError as error:
        yield f"no call can use it: {error}; remove the entry"
        return
    whole = tuple(range(len(problem.branches)))
    asked = (row.entry.key.op, whole)
    choice = next((choice for choice in (*launched, *beaten) if (choice.op, choice.branches) == asked), None)
    if choice is None:
        yield "no call can use it: no text computes these branches in one pass; remove the entry"
        return
    if (choice.rung, choice.config) != ("exact", row.entry.config):
        passed = dict(choice.passed).get("exact", "")
        yield f"its own key leads to {choice.config.name} from rung {choice.rung!r}: {passed}; tune it again"
