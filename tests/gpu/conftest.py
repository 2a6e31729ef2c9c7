"""What the GPU suite ran on and found, as one file that can be committed: errors of every case, with versions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPORT = "GPU_TEST_REPORT"
"""Environment variable: how the report's path begins; the GPU's name ends it."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write the report once all workers are done."""
    beginning = os.environ.get(REPORT)
    if not beginning or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    from benchmarks.environment import environment
    from dilated_attention_pytorch import device

    gpu = device.current()
    target = f"{beginning}_{gpu.name if gpu else 'none'}.json"

    tests = {
        report.nodeid: {"outcome": report.outcome, **dict(report.user_properties)}
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" or outcome == "skipped"
    }
    counts = {
        outcome: sum(t["outcome"] == outcome for t in tests.values()) for outcome in ("passed", "failed", "skipped")
    }
    document = {
        "what": "generated kernels against the float64 oracle on a GPU, outputs poisoned and guarded",
        "command": "make gpu-test",
        "environment": environment(),
        "counts": counts,
        "tests": dict(sorted(tests.items())),
    }
    Path(target).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.fail("make gpu-test needs a GPU that torch sees; `dilated-attention doctor` says what is there")


@pytest.fixture(autouse=True)
def _memory_for_the_others() -> Iterator[None]:
    """A process a core shares the GPU, and the oracle takes gigabytes that torch would keep."""
    yield
    import torch

    torch.cuda.empty_cache()
