"""From a run's journal to the database: picks become entries with their evidence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .. import database
from ..call_config import CallConfig
from ..config import LaunchConfig
from ..database import Check, Entry, Provenance, Times
from ..device import Device
from .journal import Journal, Measurement, Pick, Run
from .space import CUDNN, KERNEL


def fold(journal: Journal, picks: Iterable[Pick], device: Device, root: Path) -> list[Path]:
    """Save the picks of a journal that may be recorded.

    Returns:
        The files that changed.

    Raises:
        DatabaseError: A file breaks its schema, or the disk takes none.
    """
    run = journal.runs[0]
    entries = [entry for pick in picks if (entry := entry_of(pick, journal, run)) is not None]
    return database.save(device, entries, root) if entries else []


def entry_of(pick: Pick, journal: Journal, run: Run) -> Entry | None:
    """The entry of a pick; None where it is not to be recorded: `is_noisy`, or no Triton on record."""
    rows = [row for row in journal.measurements if row.key == pick.key and _is_of(row, pick)]
    finals = [row for row in rows if row.stage == "finals" and row.status == "ok"][-1]
    if is_noisy(pick, journal) or (pick.route == KERNEL and run.triton is None):
        return None
    checks = [row for row in rows if row.stage == "check" and row.error is not None and row.tolerance]
    worst = max(checks, key=lambda row: (row.error or 0.0) / (row.tolerance or 1.0))
    assert (
        finals.resources is not None
        and finals.variant is not None
        and worst.error is not None
        and worst.tolerance is not None
    )
    return Entry(
        key=pick.key,
        config=LaunchConfig(**pick.config) if pick.route == KERNEL else CallConfig(**pick.config),  # type: ignore[arg-type]
        resources=finals.resources,
        time_us=Times(
            pick.median_us,
            pick.low_us,
            pick.high_us,
            pick.default_us,
            pick.second_us,
            pick.apart_us,
            _cudnn_us(pick, journal),
        ),
        check=Check(worst.error, worst.tolerance),
        provenance=Provenance(
            kernel=_hash_of(finals.variant),
            triton=run.triton or "none",
            torch=run.torch,
            driver=run.driver or "none",
            date=run.started[:10],
            candidates=pick.candidates,
        ),
    )


def _cudnn_us(pick: Pick, journal: Journal) -> float | None:
    """What cuDNN took of the same problem; None where it was not timed, was wrong, or spread too wide."""
    rows = (row for row in journal.measurements if (row.key, row.route, row.stage) == (pick.key, CUDNN, "finals"))
    return next((row.median_us for row in rows if row.status == "ok" and not row.flag), None)


def is_noisy(pick: Pick, journal: Journal) -> bool:
    """Its times spread too wide even when measured again, or those of the untuned default.

    An entry without the default's time would say that the default does not run.
    """
    default = next((row.default for row in journal.problems if row.key == pick.key), None)
    return any(
        row.flag and row.stage == "finals" and (row.key, row.route) == (pick.key, pick.route)
        for row in journal.measurements
        if row.config in (pick.config, default)
    )


def _is_of(row: Measurement, pick: Pick) -> bool:
    return row.route == pick.route and row.config == pick.config


def _hash_of(variant: str) -> str:
    """The hash of a variant's text."""
    return next(digest for digest, names in database.rendered_kernels().items() if variant in names)
