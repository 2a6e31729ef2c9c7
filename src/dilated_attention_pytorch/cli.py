"""The console command `dilated-attention`: what would run, what is wrong with this machine, and the tuner's commands.

Exit codes: 0 all is well; 1 something needs mending; 2 a wrong command line, or a refusal in a sentence; 130 stopped by
Ctrl-C; 141 whoever read the output has gone, as `head` does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from . import device as devices
from . import doctor
from .commands import add_all
from .config import DTYPE_BYTES, HEAD_OFFSETS, Problem
from .device import Device, Toolchain
from .errors import ArgumentError, DilatedAttentionError
from .runtime import story
from .runtime.options import options
from .runtime.plan import BACKENDS, plan
from .variant import ORDERS, QUERIES
from .workloads import WORKLOADS, named, near_square

EXPLAIN = """\
examples:
  dilated-attention explain --gpu l4 --workload gigapath
  dilated-attention explain --gpu h100 --workload longnet --causal --length 100000 --backward
  dilated-attention explain --gpu a100 --length 8765 --heads 8 --head-dim 64 --segments 512,2048 --dilations 1,4
  dilated-attention explain --workload core              (this machine's GPU)

A GPU that this machine does not have is simulated from tune_db/devices.yaml: what is printed is what it would run.
Nothing is launched. workloads: """

DOCTOR = """\
Reads versions, the GPU, the generated kernels and the tuning database; launches nothing.
Exit code 1 where something needs mending; every complaint comes with what to do.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as if SIGPIPE had ended it
    except KeyboardInterrupt:
        print(f"dilated-attention {chosen.command}: stopped", file=sys.stderr)
        return 128 + 2  # as if SIGINT had ended it
    except DilatedAttentionError as error:
        print(f"dilated-attention {chosen.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dilated-attention", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _explain_arguments(
        commands.add_parser(
            "explain",
            help="which kernels and configurations would run, and why these",
            description="Which kernels and configurations would run on a GPU, from which rung of the ladder, and why.",
            epilog=EXPLAIN + ", ".join(WORKLOADS),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    doctor_parser = commands.add_parser(
        "doctor",
        help="versions, GPU, what works, what to do",
        description=DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor_parser.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor_parser.set_defaults(run=_doctor)
    add_all(commands)
    return parser


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_explain)
    where = parser.add_argument_group("where")
    where.add_argument("--gpu", metavar="NAME", help="a GPU of tune_db/devices.yaml, e.g. l4; default: this machine's")
    where.add_argument("--backend", choices=BACKENDS, help="ask for one; its refusal is then an error")
    where.add_argument(
        "--database", metavar="DIR", help="your own tuning database, which goes before the committed one"
    )
    where.add_argument("--backward", action="store_true", help="tell of the gradients' kernels too")
    where.add_argument("--json", action="store_true", help="print the plan as JSON")
    what = parser.add_argument_group("what: a workload and what differs from it, or at least --length to --dilations")
    what.add_argument("--workload", metavar="NAME", help="one of " + ", ".join(WORKLOADS))
    what.add_argument("--length", type=_positive, metavar="N", help="tokens of the sequence")
    what.add_argument("--heads", type=_positive, metavar="H", help="query heads")
    what.add_argument("--head-dim", type=_positive, metavar="D", help="head dimension")
    what.add_argument("--segments", type=_positives, metavar="W,W,…", help="segment lengths, one a branch")
    what.add_argument("--dilations", type=_positives, metavar="R,R,…", help="dilation rates, one a branch")
    what.add_argument("--batch", type=_positive, metavar="B", help="batch size (default 1)")
    what.add_argument("--kv-heads", type=_positive, metavar="G", help="key/value heads (default: as many as H)")
    what.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="default bf16")
    what.add_argument("--queries", choices=QUERIES, help="who asks: the kept steps, or all")
    what.add_argument("--head-offset", choices=HEAD_OFFSETS, help="rule of the kept steps")
    what.add_argument("--order", choices=ORDERS, help="token order; hilbert stands for any permutation")
    what.add_argument("--padding", choices=("none", "zeros"), help="zeros: torchscale's phantom keys")
    what.add_argument("--causal", action=argparse.BooleanOptionalAction, default=None, help="hide later tokens")
    what.add_argument("--mask", action=argparse.BooleanOptionalAction, default=None, help="a key padding mask is given")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _positives(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


# ---- explain ---------------------------------------------------------------------------------------------------------


def _explain(chosen: argparse.Namespace) -> int:
    problem = _problem(chosen)
    device, toolchain = _where(chosen.gpu)
    with options(database=chosen.database) as choices:
        found = plan(problem, device, chosen.backend, choices, backward=chosen.backward, toolchain=toolchain)
    model = named(chosen.workload).model if chosen.workload else None
    if chosen.json:
        workload = {"name": chosen.workload, "model": model} if model else None
        print(json.dumps({"workload": workload, **story.values(found, backward=chosen.backward)}, indent=2))
    else:
        if model:
            print(f"workload {chosen.workload}: {model}")
        print(found.explain(backward=chosen.backward))
    return 0


def _where(gpu: str | None) -> tuple[Device | None, Toolchain]:
    """A simulated GPU with this machine's Triton, or any if it has none; else what this machine has."""
    toolchain = Toolchain.current()
    if gpu is not None:
        return devices.simulated(gpu), Toolchain(toolchain.triton or "unknown")
    return devices.current(), toolchain


def _problem(chosen: argparse.Namespace) -> Problem:
    """The workload with what the command line changes, or a problem from the command line alone."""
    if chosen.workload is not None:
        base = named(chosen.workload).problem(length=chosen.length)
    else:
        needed = ("length", "heads", "head_dim", "segments", "dilations")
        if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(chosen, name) is None]:
            raise ArgumentError(f"name a --workload, or give {', '.join(missing)} too")
        base = Problem("bf16", 1, chosen.length, chosen.heads, chosen.heads, chosen.head_dim, branches=((1, 1),))
    simple = ("heads", "head_dim", "batch", "dtype", "queries", "head_offset", "order", "padding", "causal", "mask")
    changes = {name: getattr(chosen, name) for name in simple if getattr(chosen, name) is not None}
    changes["kv_heads"] = chosen.kv_heads or chosen.heads or base.kv_heads
    changes["branches"] = _branches(chosen, base)
    problem = replace(base, **changes)
    if problem.heads % problem.kv_heads:
        raise ArgumentError(f"--heads must be a multiple of --kv-heads, got {problem.heads} and {problem.kv_heads}")
    if problem.order == "snake":
        problem = replace(problem, row_width=near_square(problem.length - problem.prefix))
    return problem


def _branches(chosen: argparse.Namespace, base: Problem) -> tuple[tuple[int, int], ...]:
    segments = chosen.segments or tuple(segment for segment, _ in base.branches)
    dilations = chosen.dilations or tuple(dilation for _, dilation in base.branches)
    if len(segments) != len(dilations):
        raise ArgumentError(f"one dilation rate a segment length, got {len(segments)} --segments and {len(dilations)}")
    return tuple(zip(segments, dilations, strict=True))


# ---- doctor ----------------------------------------------------------------------------------------------------------


def _doctor(chosen: argparse.Namespace) -> int:
    report = doctor.examine()
    print(json.dumps(asdict(report), indent=2) if chosen.json else report.text())
    return 1 if report.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
