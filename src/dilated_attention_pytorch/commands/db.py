"""`dilated-attention db`: what the tuning database holds, whether it holds true, and how two of them join."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import _layout, database
from .. import device as devices
from ..config import DTYPE_BYTES, EVERY_OP, Problem
from ..database import FRESH, INVALID, KERNEL_STALE, Database, Entry
from ..device import CPU, Device, Toolchain
from ..errors import ArgumentError
from ..runtime.digest import db_digest
from ..runtime.misses import line
from ..runtime.options import DEFAULTS
from ..runtime.plan import overlay_of
from ..tuning import changes as sides
from ..tuning import ledger
from ..tuning.changes import Change
from ..tuning.coverage import Covered, coverage, missing
from ..tuning.ledger import STATUSES, Fault, Row, title
from ..tuning.problems import PRESETS, calls_of, of_calls, preset
from . import tune, write

DB = """\
examples:
  dilated-attention db check                          every entry: read, found by its own key, fits its GPU
  dilated-attention db show --gpu h100 --op fwd       what was measured, with its evidence
  dilated-attention db coverage --gpu l4              what the known models would run with there, and from where
  dilated-attention db diff main --markdown           this checkout against a branch, as a table for a pull request
  dilated-attention db stale --problems again.jsonl   what to measure again, as a list that `tune` takes

None of these needs a GPU. A database is a folder of <arch>/<device>/<op>.yaml; without --db it is the one that came
with the package. Beside it show, stale, digest and coverage take your own, which `tune` writes for an installed package
and which goes before it. tune_db/README.md describes an entry.
"""

CHECK = """\
Reads every file strictly, looks every entry up by its own key through the plan that a call would make, and holds it
against the limits of its GPU. With --compile it also compiles the kernel that was measured for its architecture, which
needs no GPU, and compares the shared memory.

Exit code 0: all is well, though entries may be stale, which is counted. 1: something is wrong, or with --fresh
something is stale. Each complaint comes with its remedy.
"""

MERGE = """\
  dilated-attention db merge OURS THEIRS              two folders or two files; the result is written to OURS
  dilated-attention db merge BASE OURS THEIRS         the same, with what both started from

What one side alone changed or removed since BASE is as that side has it. Where both measured one problem, the entry
stays whose result was right, else whose kernel text is still there, else whose launch, or what it stands in for, is
faster, else the later one: whichever side is called OURS.

As git's merge driver (.gitattributes names it for tune_db already):
  git config merge.tune_db.driver "dilated-attention db merge %O %A %B"
"""

STALE = """\
fresh             measured on the kernel text and with the Triton that are here
toolchain-stale   measured with another Triton than this machine's: used, and worth measuring again some day
kernel-stale      the kernel text has changed since: a fallback alone; measure again
invalid           its result was wrong, or it does not fit its GPU: never used; measure again

Exit code 1 where something is to be measured again.
"""

COVERAGE = """\
For each launch of the known models' calls, forward and backward: the rung of the ladder that its configuration comes
from on that GPU. exact and silicon are measurements of this very problem; nearest and arch are borrowed; heuristic is
the untuned default. The GPU need not be here. Then, by model, how many of the entries that `tune` would measure are
there for this very GPU and still hold; with --json those that are missing by name.
"""


def add(subparsers: Any) -> None:
    """Adds the command to those of `dilated-attention`."""
    parser = subparsers.add_parser(
        "db",
        help="the tuning database: check, show, diff, merge, stale, digest, coverage",
        description="The tuning database: what it holds, whether it holds true, and how two of them join.",
        epilog=DB,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    check = _verb(verbs, "check", _check, "is every entry read, reachable and fit", CHECK)
    check.add_argument("--compile", action="store_true", help="compile what was measured and compare shared memory")
    check.add_argument("--fresh", action="store_true", help="a stale entry is a fault too")

    show = _verb(verbs, "show", _show, "entries as a table", "Entries with their evidence, by device and key.")
    show.add_argument("--op", choices=EVERY_OP, help="of one kernel alone")
    show.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="of one dtype alone")
    show.add_argument("--head-dim", type=int, metavar="D", help="of one head dimension alone")
    show.add_argument("--status", choices=STATUSES, help="of one status alone, see `db stale --help`")

    stale = _verb(verbs, "stale", _stale, "what to measure again", STALE)
    stale.add_argument("--problems", type=Path, metavar="FILE", help="write it as a list for `tune --from-misses FILE`")

    cover = _verb(verbs, "coverage", _coverage, "what the known models would run with on a GPU", COVERAGE)
    what = cover.add_mutually_exclusive_group()
    tune.add_workloads(what)
    what.add_argument(
        "--preset", choices=tuple(PRESETS), default="standard", help="as `tune` has them (default standard)"
    )
    cover.add_argument("--fail-under", type=float, metavar="PERCENT", help="exit code 1 where less is measured")

    digest = _verb(verbs, "digest", _digest, "twelve digits of all that a lookup depends on", gpu=False, as_json=False)
    digest.description = "Twelve digits of all that a lookup depends on: equal on machines that will agree."

    diff = verbs.add_parser(
        "diff", help="what changed between two databases", description="New time over old, by entry."
    )
    diff.add_argument("old", nargs="?", default="HEAD", help="a folder or a git revision (default HEAD)")
    diff.add_argument("new", nargs="?", help="the same (default: the database that came with the package)")
    diff.add_argument("--markdown", action="store_true", help="a table for a pull request")
    diff.add_argument("--json", action="store_true", help="print the changes as JSON")
    diff.set_defaults(run=_diff)

    merge = verbs.add_parser(
        "merge",
        help="join two databases, also as git's merge driver",
        description=MERGE,
        usage="dilated-attention db merge [BASE] OURS THEIRS",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("sides", nargs="+", type=Path, metavar="SIDE", help="folders, or files of one device and kernel")
    merge.set_defaults(run=_merge)


def _verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str = "",
    *,
    gpu: bool = True,
    as_json: bool = True,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--db", type=Path, metavar="DIR", help="a database's folder")
    if gpu:
        parser.add_argument("--gpu", metavar="NAME", help="of one device alone, e.g. h100")
    if as_json:
        parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)
    return parser


# ---- One database ----------------------------------------------------------------------------------------------------


def _check(chosen: argparse.Namespace) -> int:
    found = database.load(chosen.db)
    faults = ledger.unread(found)
    rows = [] if faults else _rows(chosen, found)
    faults += ledger.faults(rows, found)
    if chosen.compile:
        faults += _compiled(rows, found)
    if chosen.fresh:
        faults += [Fault(row.title, f"is {row.status}; `db stale` tells what to run") for row in rows if _again(row)]
    counts = Counter(row.status for row in rows)
    if chosen.json:
        report = {"database": str(found.root), "entries": counts, "faults": [asdict(fault) for fault in faults]}
        print(json.dumps(report, indent=2))
    else:
        for fault in faults:
            print(fault)
        print(f"{found.root}: {_counted(counts)}; {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}")
    return 1 if faults else 0


def _compiled(rows: Iterable[Row], found: Database) -> list[Fault]:
    """Entries whose kernel takes other shared memory than they say, or does not compile any more."""
    toolchain = Toolchain.current()
    faults = []
    for row in rows:
        if row.status == KERNEL_STALE or row.arch == CPU:
            continue
        try:
            problem = ledger.recompilation(row, found.kernels, toolchain)
        except Exception as error:  # a compiler raises anything
            problem = f"does not compile: {type(error).__name__}: {error}".partition("\n")[0] + "; tune it again"
        if problem:
            faults.append(Fault(row.title, problem))
    return faults


def _show(chosen: argparse.Namespace) -> int:
    wanted = {"op": chosen.op, "dtype": chosen.dtype, "head_dim": chosen.head_dim}
    shown = {
        found.root: [
            row
            for row in _rows(chosen, found)
            if all(value in (None, getattr(row.entry.key, name)) for name, value in wanted.items())
            and chosen.status in (None, row.status)
        ]
        for found in _databases(chosen)
    }
    if chosen.json:
        told = [{"database": str(root), **_as_json(row)} for root, rows in shown.items() for row in rows]
        print(json.dumps(told, indent=2))
        return 0
    header = ("device", "problem", "config", "us", "interval", "gain", "apart", "error", "date", "status")
    for root, rows in shown.items():
        heading = f"{root}:\n" if len(shown) > 1 else ""
        print(heading + (_table(header, [_evidence(row) for row in rows]) or "no entries\n"), end="")
    return 0


def _evidence(row: Row) -> tuple[str, ...]:
    entry, times = row.entry, row.entry.time_us
    gain = "" if times.default is None else f"{times.default / times.median:.2f}x"
    apart = "" if times.apart is None else f"{times.apart:.2f}"
    measured = f"{times.median:.2f}", f"{times.low:.2f}..{times.high:.2f}", gain, apart, f"{entry.check.error:.1e}"
    return row.device, title(entry.key), entry.config.name, *measured, entry.provenance.date, row.status


def _stale(chosen: argparse.Namespace) -> int:
    rows = [row for found in _databases(chosen) for row in _rows(chosen, found)]
    again = [row for row in rows if _again(row)]
    if chosen.problems is not None:
        write(chosen.problems, "".join(line(problem) for problem in _measured_in(again)), "--problems")
    counts = Counter(row.status for row in rows)
    if chosen.json:
        print(
            json.dumps({"entries": counts, "stale": [_as_json(row) for row in rows if row.status != FRESH]}, indent=2)
        )
        return 1 if again else 0
    print(_counted(counts))
    stale = [row for row in rows if row.status != FRESH]
    print(_table(("status", "device", "problem", "measured on"), [_measured_on(row) for row in stale]), end="")
    if again:
        names = ", ".join(sorted({row.device for row in again}))
        target = chosen.problems or "again.jsonl"
        written = "" if chosen.problems else f"dilated-attention db stale --problems {target}, then "
        print(f"to measure again, on {names}: {written}dilated-attention tune --from-misses {target}")
    return 1 if again else 0


def _measured_in(rows: list[Row]) -> list[Problem]:
    """Calls that ask for entries: those of the standard preset where it has them, so that times compare."""
    known = {
        device: {task.key: task.problem for task in of_calls(preset("standard"), device)}
        for device in dict.fromkeys(map(ledger.device_of, rows))
    }
    asked = (known[ledger.device_of(row)].get(row.entry.key) or ledger.asking(row.entry.key) for row in rows)
    return [*dict.fromkeys(problem for problem in asked if problem is not None)]


def _measured_on(row: Row) -> tuple[str, ...]:
    source = row.entry.provenance
    return (
        row.status,
        row.device,
        title(row.entry.key),
        f"kernel {source.kernel}, Triton {source.triton}, {source.date}",
    )


def _digest(chosen: argparse.Namespace) -> int:
    print(db_digest() if chosen.db is None else database.load(chosen.db).digest())
    return 0


def _coverage(chosen: argparse.Namespace) -> int:
    device, found = _device(chosen.gpu), database.load(chosen.db)
    toolchain = Toolchain(Toolchain.current().triton or "unknown")
    calls = preset(chosen.preset) if chosen.workload is None else calls_of(chosen.workload)
    covered = {
        workload: coverage([problem for name, problem in calls if name == workload], device, toolchain, found)
        for workload in dict(calls)
    }
    every = [launch for launches in covered.values() for launch in launches]
    share = 100 * sum(launch.measured for launch in every) / len(every)
    tasks = of_calls(calls, device)
    absent = missing(tasks, device, toolchain, _databases(chosen))
    if chosen.json:
        workloads = {name: [_launch(launch) for launch in launches] for name, launches in covered.items()}
        entries = {"asked": len(tasks), "missing": [title(task.key) for task in absent]}
        told = {"device": device.name, "measured_percent": share, "entries": entries, "workloads": workloads}
        print(json.dumps(told, indent=2))
    else:
        print(device)
        table = [
            (name, title(launch.key), launch.choice.rung, launch.choice.config.name, launch.choice.why)
            for name, launches in covered.items()
            for launch in launches
        ]
        print(_table(("workload", "problem", "rung", "config", "why"), table), end="")
        asked, lacking = (Counter(task.workload for task in some) for some in (tasks, absent))
        for workload in covered:
            there = asked[workload] - lacking[workload]
            print(f"{workload}: {there} of {asked[workload]} entries of {device.name} are there")
        rungs = Counter(launch.choice.rung for launch in every)
        print(f"{share:.0f} % of {len(every)} launches measured: {_counted(rungs)}")
    return 1 if chosen.fail_under is not None and share < chosen.fail_under else 0


def _launch(launch: Covered) -> dict[str, Any]:
    choice = launch.choice
    return {"key": asdict(launch.key), "rung": choice.rung, "config": choice.config.to_dict(), "why": choice.why}


# ---- Two databases ---------------------------------------------------------------------------------------------------


def _diff(chosen: argparse.Namespace) -> int:
    with ExitStack() as laid_out:
        new = laid_out.enter_context(sides.revision(chosen.new)) if chosen.new else _layout.tune_db_dir()
        old = laid_out.enter_context(sides.revision(chosen.old))
        before, after = (sides.contents(database.load(root)) for root in (old, new))
    found = sides.changes(before, after)
    same, mean = len({*before} & {*after}) - sum(None not in (c.old, c.new) for c in found), sides.geometric_mean(found)
    if chosen.json:
        print(
            json.dumps(
                {"changes": [_change_json(c) for c in found], "unchanged": same, "geometric_mean": mean}, indent=2
            )
        )
        return 0
    header = ("device", "problem", "old", "us", "new", "us", "ratio")
    table = [_change(change) for change in found]
    print(_markdown(header, table) if chosen.markdown else _table(header, table), end="")
    summary = f"{len(found)} changed, {same} unchanged"
    print(
        ("\n" if chosen.markdown and found else "")
        + summary
        + (f"; new / old, geometric mean: {mean:.3f}" if mean else "")
    )
    return 0


def _change(change: Change) -> tuple[str, ...]:
    _, device, key = change.place
    cells = [cell for entry in (change.old, change.new) for cell in _runs(entry)]
    return device, title(key), *cells, "-" if change.ratio is None else f"{change.ratio:.3f}"


def _runs(entry: Entry | None) -> tuple[str, str]:
    """What a call runs by an entry, and how long: its configuration, or the launches that it stands in for."""
    if entry is None:
        return "-", "-"
    return "apart" if entry.time_us.is_beaten else entry.config.name, f"{entry.time_us.dispatched:.2f}"


def _change_json(change: Change) -> dict[str, Any]:
    arch, device, key = change.place
    old, new = (None if entry is None else asdict(entry) for entry in (change.old, change.new))
    return {"arch": arch, "device": device, "key": asdict(key), "old": old, "new": new, "ratio": change.ratio}


def _merge(chosen: argparse.Namespace) -> int:
    if not 2 <= len(chosen.sides) <= 3:
        raise ArgumentError(f"merge takes OURS THEIRS or BASE OURS THEIRS, got {len(chosen.sides)} paths")
    *base, ours, theirs = chosen.sides
    if ours.is_dir():
        written = sides.merge_folders(base[0] if base else None, ours, theirs)
        print(f"{len(written)} file{'s' * (len(written) != 1)} changed in {ours}")
    else:
        sides.merge_files(base[0] if base else None, ours, theirs)
    return 0


# ---- What they share -------------------------------------------------------------------------------------------------


def _rows(chosen: argparse.Namespace, found: Database) -> list[Row]:
    name = getattr(chosen, "gpu", None)
    of = None if name is None else _device(name).name
    return [row for row in ledger.rows(found) if of in (None, row.device)]


def _databases(chosen: argparse.Namespace) -> list[Database]:
    """The one that is named; else those in force, the user's own first, which goes before the other."""
    own = None if chosen.db is not None else overlay_of(DEFAULTS)
    return [*([] if own is None else [own]), database.load(chosen.db)]


def _device(name: str | None) -> Device:
    """A GPU by name, or this machine's."""
    device = devices.current() if name is None else devices.simulated(name)
    if device is None:
        raise ArgumentError("this machine has no GPU; name one with --gpu, e.g. --gpu h100")
    return device


def _again(row: Row) -> bool:
    return row.status in (KERNEL_STALE, INVALID)


def _as_json(row: Row) -> dict[str, Any]:
    return {"arch": row.arch, "device": row.device, "status": row.status, **asdict(row.entry)}


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no entries"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, each as wide as its widest cell; nothing where there are no rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )
    return "\n".join(lines) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
