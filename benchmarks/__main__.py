"""`python -m benchmarks` (`make bench`): this package beside everything else that computes the same, on one GPU.

    python -m benchmarks --tier 1               # what the goals are about, some ten minutes: `make bench`
    python -m benchmarks --budget 360           # as far as six minutes go, the most telling cases first
    python -m benchmarks --list                 # what there is; --level, --workload, --case and --tier choose
    python -m benchmarks --resume               # what the result file lacks
    python -m benchmarks report [--check]       # docs/performance.md and its figures from the result files
    python -m benchmarks regress OLD NEW        # fails where a ratio to the best peer fell by more than 5 %

Without a GPU the whole workloads run on the CPU (`benchmarks.cpu`).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import prepare, report, results
from benchmarks.cases import LEVELS, selected
from benchmarks.measure import Settings, Sticky
from benchmarks.run import again, run
from dilated_attention_pytorch import device
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.workloads import WORKLOADS


def main(given: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = _parser().parse_args(given)
    if arguments.command == "report":
        return report.main(check=arguments.check)
    if arguments.command == "regress":
        try:
            fallen = results.regressions(results.load(arguments.old), results.load(arguments.new))
        except ArgumentError as refusal:
            print(refusal, file=sys.stderr)
            return 2
        print("\n".join(fallen) or "no ratio fell by more than 5 %")
        return int(bool(fallen))
    cases = selected(arguments.level, arguments.workload, arguments.case, arguments.tier)
    if arguments.list:
        print("\n".join(f"{case.tier}  {case.level:<10}  {case.name}" for case in cases))
        return 0
    gpu = device.current()
    if gpu is None:
        return subprocess.call([sys.executable, "-m", "benchmarks.cpu"])
    where = torch.device("cuda", torch.cuda.current_device())
    path = arguments.output or results.FOLDER / f"bench_{gpu.name}.json"
    command = " ".join(["python -m benchmarks", *(sys.argv[1:] if given is None else given)])
    try:
        run(
            cases,
            where,
            path,
            Settings(rounds=arguments.rounds),
            budget=arguments.budget,
            resume=arguments.resume,
            processes=arguments.processes,
            command=command,
        )
    except Sticky as spoiled:
        print(f"{spoiled} spoiled the GPU: {spoiled.__cause__}; going on without it", file=sys.stderr, flush=True)
        again()
    except KeyboardInterrupt:
        print(f"stopped; {path} has what was measured, --resume goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command="run")
    parser.add_argument("--level", action="append", default=[], choices=LEVELS, help="may be given several times")
    parser.add_argument("--workload", action="append", default=[], choices=(*WORKLOADS, "branch", "kernels"))
    parser.add_argument("--case", default="*", metavar="PATTERN", help="names of cases, such as 'kernel-n2048-*'")
    parser.add_argument("--tier", type=int, help="1: the goals; 2: every workload; 3: the whole grid of kernels")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="how often each is timed at most")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after these")
    parser.add_argument("--processes", type=int, default=prepare.PROCESSES, help="that compile at a time")
    parser.add_argument("--resume", action="store_true", help="only cases that the result file lacks")
    parser.add_argument("--output", type=Path, help="the result file; named after the GPU unless given")
    parser.add_argument("--list", action="store_true", help="print the cases, the most important first")
    commands = parser.add_subparsers()
    drawn = commands.add_parser("report", help="draw docs/performance.md anew")
    drawn.set_defaults(command="report")
    drawn.add_argument("--check", action="store_true", help="only say what is out of date")
    compared = commands.add_parser("regress", help="compare two result files")
    compared.set_defaults(command="regress")
    compared.add_argument("old", type=Path)
    compared.add_argument("new", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
