"""`dilated-attention tune`: measure which configurations are fastest on this machine, and keep them."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DTYPE_BYTES
from ..device import CPU
from ..errors import ArgumentError, UnsupportedError
from ..tuning.problems import PRESETS
from ..workloads import WORKLOADS

if TYPE_CHECKING:
    from ..device import Device
    from ..tuning.problems import Task
    from . import Commands

TUNE = """\
examples:
  dilated-attention tune                                   the standard preset: every model that is known here, and a
                                                           grid around them; ten minutes on 16 cores
  dilated-attention tune --preset quick                    longnet and core in bf16: a minute or two
  dilated-attention tune --workload gigapath core --budget 10m
                                                           the weightiest problems first, and stop in time
  dilated-attention tune --from-misses misses.jsonl        what options(miss_log="misses.jsonl") collected
  dilated-attention tune --resume                          go on where a run that was stopped or killed left off
  dilated-attention tune --gpus all --shard 0/4            all GPUs of this host, the first of four hosts
  dilated-attention tune --gpus cpu --workload readme      the torch backend on this processor

Candidates are compiled in parallel, checked against the float64 reference, raced, and the best few timed again in turn.
Every measurement goes to a journal at once; winners go to the database: of a checkout to its tune_db/, of an installed
package to a folder of yours, which goes before the one that it came with. A winner differs from the untuned default or
from what the database holds only where it is faster by more than noise. Branches that can share a pass are tuned one by
one as well, and the pass is timed in turn with them: calls make what was faster.

On a CPU, or with --gpus cpu, the torch backend is tuned: how it cuts a branch into calls of torch's kernels, whether
they read rows in place or copies, how many pairs and how large a part of q a call takes. Name the problems there, which
are taken in fp32 unless --dtype says otherwise. Winners go to a folder of yours, never to a checkout's tune_db/; a
checkout reads them inside options(database=...).

Exit codes: 0 every problem was tuned; 1 some were not, for want of time, of a candidate that works or of quiet;
2 a refusal in a sentence.
"""


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "tune",
        help="measure the fastest configurations on this machine and keep them",
        description="Measure which configurations are fastest on this machine's GPU or CPU, and keep them.",
        epilog=TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_problems(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--gpus",
        metavar="WHICH",
        help="all, cpu, or indices such as 0,2 of equal GPUs (default 0, or cpu without a GPU)",
    )
    how.add_argument("--shard", type=_shard, metavar="i/n", default=(0, 1), help="the i-th of n hosts' part, from 0")
    how.add_argument("--budget", type=_seconds, metavar="TIME", default=math.inf, help="such as 90s, 10m or 2h")
    how.add_argument("--resume", action="store_true", help="go on with this device's last run")
    how.add_argument("--dry-run", action="store_true", help="say what would be tuned and how long it takes, and stop")
    how.add_argument(
        "--candidates",
        type=count,
        metavar="N",
        help="at most, a problem, the most promising (default: "
        + ", ".join(f"{name} {preset.candidates}" for name, preset in PRESETS.items())
        + ", others all)",
    )
    how.add_argument("--from-screen", type=Path, metavar="FILE", help="candidates, as `screen --output` ranked them")
    how.add_argument("--processes", type=count, metavar="N", help="that compile (default: as many as free cores)")
    where = parser.add_argument_group("where")
    where.add_argument("--db", type=Path, metavar="DIR", help="the database's folder")
    where.add_argument("--runs", type=Path, metavar="DIR", help="the journals' folder (default: of your user data)")
    where.add_argument("--json", action="store_true", help="print what came of it as JSON")
    parser.set_defaults(run=run)


def add_problems(parser: argparse.ArgumentParser) -> None:
    """What `tune` and `screen` take to say which problems."""
    what = parser.add_argument_group("what")
    one = what.add_mutually_exclusive_group()
    add_workloads(one)
    one.add_argument("--preset", choices=tuple(PRESETS), default="standard", help="default standard")
    one.add_argument("--from-misses", type=Path, metavar="FILE", help="problems of a miss log")
    what.add_argument("--dtype", action="append", choices=tuple(DTYPE_BYTES)[:3], help="these alone; may be repeated")


def add_workloads(group: argparse._MutuallyExclusiveGroup) -> None:
    """`--workload`, of several names and several times."""
    group.add_argument("--workload", nargs="+", action="extend", metavar="NAME", help="some of " + ", ".join(WORKLOADS))


def chosen_tasks(chosen: argparse.Namespace, device: Device) -> list[Task]:
    """The tasks that the command line names, by weight; those of the grid behind the models' own."""
    from ..runtime import misses
    from ..tuning import problems

    if chosen.from_misses is not None:
        calls = [("misses", problem) for problem in misses.read(chosen.from_misses)]
        if not calls:
            raise ArgumentError(
                f"there is nothing to tune: {chosen.from_misses} is empty: no call ran unmeasured, or nothing was stale"
            )
    elif chosen.workload:
        calls = problems.calls_of(chosen.workload)
    else:
        calls = problems.preset(chosen.preset)
    if device.arch == CPU and chosen.from_misses is None:
        if not chosen.workload:
            raise ArgumentError("a preset would take hours on a CPU: name problems with --workload or --from-misses")
        dtypes = chosen.dtype or ["fp32"]
        calls = [(name, replace(problem, dtype=dtype)) for name, problem in calls for dtype in dtypes]
    calls = [(name, problem) for name, problem in calls if not chosen.dtype or problem.dtype in chosen.dtype]
    tasks = problems.of_calls(calls, device)
    if not tasks:
        raise ArgumentError("there is nothing to tune: no call has these dtypes")
    # A run that is stopped early has the models themselves.
    return sorted(tasks, key=lambda task: task.workload == problems.GRID)


def run(chosen: argparse.Namespace) -> int:
    """Tune, and tell what came of it."""
    from .. import _layout
    from ..tuning import machine, problems, progress, summary
    from ..tuning.journal import runs_dir
    from ..tuning.tune import Settings, tune
    from .screen import read_ranking

    device, measuring = _machine(chosen.gpus)
    tasks = problems.shard(chosen_tasks(chosen, device), chosen.shard)
    root = chosen.db or (_layout.user_db_dir() if device.arch == CPU else _layout.own_db_dir())
    limit, steps = thoroughness(chosen)
    if chosen.dry_run:
        _dry_run(tasks, device, root, chosen, len(measuring))
        return 0
    settings = Settings(
        journal=_journal(chosen.runs or runs_dir(), device.name, chosen),
        root=root,
        gpus=measuring,
        budget_s=chosen.budget,
        limit=limit,
        steps=steps,
        processes=chosen.processes,
    )
    if device.arch == CPU:
        settings = replace(settings, compiler=None, race_us=CPU_RACE_US, finals_us=CPU_FINALS_US)
    command = shlex.join(["dilated-attention", *sys.argv[1:]])
    ranked = read_ranking(chosen.from_screen, device) if chosen.from_screen else None
    bar = progress.shown(chosen.budget)
    journal = tune(tasks, device, machine.run_row(device, command), settings, ranked=ranked, progress=bar)
    found = summary.values(journal, tasks, settings.journal, root)
    print(json.dumps(found, indent=2) if chosen.json else summary.text(found))
    return 0 if found["tuned"] == found["problems"] and not found["noisy"] else 1


CPU_RACE_US = 5e5
CPU_FINALS_US = 4e6
"""On a CPU, where a launch takes a hundred times as long and its clock is no better."""


def thoroughness(chosen: argparse.Namespace) -> tuple[int | None, int]:
    """Candidates a problem at most, None for all, and those that the step adds: few in a preset of many problems."""
    from ..tuning.search import STEPS

    if chosen.workload or chosen.from_misses is not None:
        return chosen.candidates, STEPS
    preset = PRESETS[chosen.preset]
    return chosen.candidates or preset.candidates, preset.steps


def _dry_run(tasks: list[Task], device: Device, root: Path, chosen: argparse.Namespace, gpus: int) -> None:
    from ..tuning import cost, space
    from ..tuning.progress import title
    from ..tuning.screening import cores

    limit, steps = thoroughness(chosen)
    rows = [(task, space.space(task, device)[:limit]) for task in tasks]
    processes = chosen.processes or max(cores() - gpus, 1)
    seconds = None  # of a CPU nobody knows
    if device.arch != CPU:
        seconds = cost.seconds([len(found) for _, found in rows], steps, processes=processes, gpus=gpus)
    if chosen.json:
        found: list[dict[str, Any]] = [
            {"problem": title(task), "weight": task.weight, "candidates": [c.name for c in candidates]}
            for task, candidates in rows
        ]
        told = {"device": device.name, "database": str(root), "seconds": seconds, "problems": found}
        print(json.dumps(told, indent=2))
        return
    print(f"{device}, into {root}")
    for task, candidates in rows:
        apart = " and its parts" if task.key.is_joint else ""
        print(f"{task.weight:6.1%}  {title(task)}: {len(candidates)} candidates{apart}, default {candidates[0].name}")
    compiling = f"{processes} compiling process{'es' * (processes > 1)}"
    takes = f"; about {seconds / 60:.0f} min with {compiling} and {gpus} GPU{'s' * (gpus > 1)}" if seconds else ""
    print(f"{len(rows)} problems{takes}")


def _journal(folder: Path, name: str, chosen: argparse.Namespace) -> Path:
    """The file of a new run, or of this device's last one."""
    index, count = chosen.shard
    stem = f"{name}-{index}of{count}" if count > 1 else name
    if not chosen.resume:
        return folder / f"{stem}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%fZ}.jsonl"
    # A shard's stem begins as that of a run of all, and ends otherwise.
    of_stem = re.compile(rf"{re.escape(stem)}-\d{{8}}T\d+Z\.jsonl")
    earlier = sorted(path for path in folder.glob("*.jsonl") if of_stem.fullmatch(path.name))
    if not earlier:
        raise ArgumentError(f"--resume found no run of {stem} in {folder}; begin one without it")
    return earlier[-1]


def _machine(text: str | None) -> tuple[Device, tuple[str, ...]]:
    """What is tuned for, and the torch devices that measure."""
    from .. import device as devices

    if text == "cpu" or (text is None and devices.current() is None):
        return devices.cpu(), ("cpu",)
    gpus = _gpus(text or "0")
    device = devices.current(gpus[0])
    if device is None:
        raise UnsupportedError(
            "torch sees no GPU to measure on; --gpus cpu tunes the torch backend for this processor, and "
            "`dilated-attention screen --arch sm_90` compiles candidates for a GPU without it"
        )
    kinds: dict[Device | None, list[int]] = {}
    for index in gpus:
        kinds.setdefault(devices.current(index), []).append(index)
    if len(kinds) > 1:
        named = "; ".join(f"{', '.join(map(str, same))}: {kind}" for kind, same in kinds.items())
        runs = " and ".join(f"--gpus {','.join(map(str, same))}" for same in kinds.values())
        raise ArgumentError(
            f"--gpus {text} names GPUs that differ ({named}), and a run measures for one kind; tune each in a run of "
            f"its own: {runs}"
        )
    return device, tuple(f"cuda:{index}" for index in gpus)


def _gpus(text: str) -> list[int]:
    import torch

    if text == "all":
        return list(range(torch.cuda.device_count())) or [0]
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ArgumentError(f"--gpus must be all, cpu or indices such as 0,2, got {text!r}")
    found = [int(index) for index in text.split(",")]
    if torch.cuda.is_available() and max(found) >= torch.cuda.device_count():
        raise ArgumentError(f"--gpus names {max(found)}; this machine has 0 to {torch.cuda.device_count() - 1}")
    return found


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"expected i/n with i from 0 to n-1, got {text!r}")
    return int(match[1]), int(match[2])


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10m or 2h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
