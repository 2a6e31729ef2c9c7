"""`dilated-attention screen`: all of the tuner's work for a GPU that needs no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import device as devices
from ..errors import ArgumentError
from . import try_to_write, tune, write

if TYPE_CHECKING:
    from ..config import ProblemKey
    from ..device import Device
    from ..tuning.problems import Task
    from ..tuning.screening import Compiled
    from ..tuning.space import Candidate
    from . import Commands

SCREEN = """\
examples:
  dilated-attention screen --arch sm_120 --workload longnet             which candidates fit, spill or fail there
  dilated-attention screen --gpu l40s --output l40s.json                and a list that the tuner can start from
  dilated-attention tune --from-screen l40s.json                        later, on that GPU

Every candidate is compiled for the architecture in a process of its own; no GPU is needed. The ranked list leaves out
what does not compile or does not fit, and has what spills last.
"""

SCHEMA = 1


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "screen",
        help="compile candidates for a GPU that need not be here",
        description="Compile the tuner's candidates for a GPU that need not be here: which fit, spill or fail.",
        epilog=SCREEN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("where").add_mutually_exclusive_group(required=True)
    where.add_argument("--arch", metavar="ARCH", help="such as sm_120 or gfx942")
    where.add_argument("--gpu", metavar="NAME", help="a GPU of tune_db/devices.yaml, e.g. l4")
    tune.add_problems(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--candidates", type=tune.count, metavar="N", help="at most, a problem (default: as `tune` has it)"
    )
    how.add_argument("--processes", type=tune.count, metavar="N", help="that compile (default: one a core)")
    how.add_argument("--output", type=Path, metavar="FILE", help="write the ranked list for `tune --from-screen`")
    how.add_argument("--json", action="store_true", help="print the ranked list instead of the table")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Screen, and print what came of it."""
    from ..tuning import space

    device = devices.simulated(chosen.gpu) if chosen.gpu else _of_arch(chosen.arch)
    tasks = tune.chosen_tasks(chosen, device)
    if chosen.output:
        try_to_write(chosen.output, "--output")  # better told now than after an hour
    limit, _ = tune.thoroughness(chosen)
    wanted = {task.key: space.space(task, device)[:limit] for task in tasks}
    found: list[tuple[Task, list[tuple[Candidate, Compiled]]]] = []
    for task, compiled in screened(tasks, wanted, device, chosen.processes):
        found.append((task, compiled))
        if not chosen.json:
            print("\n".join(_table(task, compiled, device)), flush=True)
    ranking = _ranking(device, found)
    if chosen.output:
        write(chosen.output, json.dumps(ranking, indent=1) + "\n", "--output")
        print(f"ranked list in {chosen.output}", file=sys.stderr)
    if chosen.json:
        print(json.dumps(ranking, indent=2))
    return 0


def screened(
    tasks: list[Task], wanted: dict[ProblemKey, list[Candidate]], device: Device, processes: int | None
) -> Iterator[tuple[Task, list[tuple[Candidate, Compiled]]]]:
    """Each task with its candidates and what became of them, in order, as they get ready."""
    from ..tuning.screening import Compilation, Pool
    from ..tuning.worker import wait_for_any

    pool = Pool(device, processes)
    results: dict[tuple[int, int], Compiled] = {}
    try:
        for number, task in enumerate(tasks):
            for place, candidate in enumerate(wanted[task.key]):
                pool.submit((number, place), Compilation(task.problem, task.op, task.merge, candidate))
        for number, task in enumerate(tasks):
            candidates = wanted[task.key]
            while any((number, place) not in results for place in range(len(candidates))):
                results.update(pool.answers())
                wait_for_any(pool.workers, 0.2)
            yield task, [(candidate, results.pop((number, place))) for place, candidate in enumerate(candidates)]
    finally:
        pool.stop()


def read_ranking(path: Path, device: Device) -> dict[ProblemKey, list[Candidate]]:
    """The candidates of a ranked list by problem.

    Raises:
        ArgumentError: It is no such list, or another architecture's.
    """
    from ..tuning.journal import key_of
    from ..tuning.space import KERNEL, Candidate

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA or values["arch"] != device.arch:
            raise ArgumentError(f"{path} ranks candidates for {values['arch']}; {device.name} is {device.arch}")
        return {
            key_of(problem["key"]): [Candidate(KERNEL, tuple(row["config"].items())) for row in problem["candidates"]]
            for problem in values["problems"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{path} is no list of `dilated-attention screen --output` ({error})") from error


def _of_arch(arch: str) -> Device:
    """A device of an architecture with the shared memory of its kind."""
    if arch not in devices.SHARED_BYTES:
        raise ArgumentError(f"--arch must be one of {', '.join(devices.SHARED_BYTES)}, got {arch!r}")
    warp = 64 if arch.startswith("gfx") else 32
    return devices.Device(name=arch, arch=arch, sms=1, shared_bytes=devices.SHARED_BYTES[arch], warp_size=warp)


def _table(task: Task, compiled: list[tuple[Candidate, Compiled]], device: Device) -> Iterator[str]:
    from ..tuning.progress import title

    counts = Counter(_verdict(result) for _, result in compiled)
    yield f"{title(task)}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    for candidate, result in _ranked(compiled):
        took = result.resources
        text = "" if took is None else f"{took.shared_bytes:8,} bytes {took.registers:4} registers"
        yield f"  {candidate.name:22} {_verdict(result):8} {text}  {result.message}".rstrip()
    yield ""


def _verdict(result: Compiled) -> str:
    if result.status == "ok":
        return "spills" if result.resources and result.resources.spills else "fits"
    return {"resources": "too big", "timeout": "timeout"}.get(result.status, "fails")


def _ranked(compiled: list[tuple[Candidate, Compiled]]) -> list[tuple[Candidate, Compiled]]:
    """Clean ones as they came, then the ones that spill by how much, then the rest."""
    order = ("fits", "spills", "too big", "timeout", "fails")

    def rank(pair: tuple[Candidate, Compiled]) -> tuple[int, int]:
        spills = pair[1].resources.spills if pair[1].resources else 0
        return order.index(_verdict(pair[1])), spills

    return sorted(compiled, key=rank)


def _ranking(device: Device, found: list[tuple[Task, list[tuple[Candidate, Compiled]]]]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "arch": device.arch,
        "problems": [
            {
                "key": asdict(task.key),
                "candidates": [
                    {"config": dict(candidate.choices), "resources": result.resources and asdict(result.resources)}
                    for candidate, result in _ranked(compiled)
                    if _verdict(result) in ("fits", "spills")
                ],
                "failed": [
                    {"config": dict(candidate.choices), "status": result.status, "message": result.message}
                    for candidate, result in compiled
                    if result.status != "ok"
                ],
            }
            for task, compiled in found
        ],
    }
