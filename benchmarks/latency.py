"""What the first call of a process costs, compilers included: cold, and with what an earlier process left on the disk.

python -m benchmarks.latency CASE CONTENDER    # one process's part, JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Case, selected
from benchmarks.compare import both_call, forward_call
from benchmarks.contenders import contenders
from benchmarks.measure import Inputs

LONGEST_S = 300.0
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


def measure(case: Case, where: torch.device, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows by contender: milliseconds of the first forward, and of the first forward with its backward."""
    rows: dict[str, Any] = {}
    for name in contenders(case, where):
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = {}
            for state in ("cold", "warm"):
                note(f"{state} {name}")
                try:
                    rows[name][state] = _in_fresh_process(case.name, name, str(where), folder)
                except (subprocess.SubprocessError, ValueError) as error:
                    rows[name] = {"failed": _reason(error)}
                    break
    return rows


def _in_fresh_process(case: str, contender: str, where: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.latency", case, contender, where]
    caches = {name: os.path.join(folder, name) for name in CACHES}  # noqa: PTH118
    done = subprocess.run(
        command, env={**os.environ, **caches}, capture_output=True, text=True, timeout=LONGEST_S, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {str(name): float(value) for name, value in found.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr.strip().splitlines() or [str(error)])[-1][:300]
    return str(error)[:300]


def first_calls(case: Case, contender: str, where: torch.device) -> dict[str, float]:
    """Of this process, once the GPU has been woken up."""
    who = contenders(case, where)[contender]
    tensors = Inputs(case.problem, where).of(who)

    def taken(call: Callable[[], object]) -> float:
        _wait(where)
        start = time.perf_counter()
        call()
        _wait(where)
        return round(1e3 * (time.perf_counter() - start), 2)

    attend = who.make()
    return {
        "forward_ms": taken(forward_call(attend, *tensors[:3])),
        "both_ms": taken(both_call(attend, *tensors)),
        "second_both_ms": taken(both_call(attend, *tensors)),
    }


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


if __name__ == "__main__":
    (asked,) = selected(pattern=sys.argv[1])
    print(json.dumps(first_calls(asked, sys.argv[2], torch.device(sys.argv[3]))))
