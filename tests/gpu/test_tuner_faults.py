"""The tuner's measuring process on a GPU, and launches that really spoil its state, or only ask for too much."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.tuning import space
from dilated_attention_pytorch.tuning.measure import Checked, CheckJob, bench
from dilated_attention_pytorch.tuning.problems import of_calls
from dilated_attention_pytorch.tuning.routes import Launch, Launcher, Outputs, Scene
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.tuning.worker import Raised, Worker, wait_for_any

pytestmark = pytest.mark.gpu
triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
PROBLEM = Problem("fp16", batch=1, length=512, heads=2, kv_heads=2, head_dim=32, branches=((256, 2),))


@triton.jit
def _misaligned(p):
    p_odd = (p.to(tl.int64) + 2).to(tl.pointer_type(tl.int64))
    tl.store(p_odd, tl.load(p_odd) + 1)


@triton.jit
def _outside(p):
    tl.store((p.to(tl.int64) + (1 << 45)).to(tl.pointer_type(tl.int64)), 1)


@triton.jit
def _harmless(p):
    tl.store(p, 1)


def _faulty(fault: str) -> None:
    p = torch.zeros(4096, dtype=torch.int32, device="cuda")
    if fault == "memory":
        torch.empty(1 << 44, device="cuda")
    elif fault == "outside":
        _outside[(1,)](p)
    else:
        _harmless[(1,)](p)
        torch.cuda.synchronize()
        _misaligned[(1,)](p)
        time.sleep(0.2)
        _harmless[(1,)](p)  # told of the launch before it


def route(scene: Scene, candidate: Candidate, guilty: str, fault: str, told: Path) -> Launcher:
    """Every candidate is right but one."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            with told.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            if candidate.name == guilty:
                _faulty(fault)
            for name, expected in scene.expected.items():
                outputs[name].copy_(expected)

        return run

    return launcher


@pytest.mark.parametrize(
    ("fault", "ends", "message"),
    [
        ("misaligned", True, "misaligned address"),
        ("outside", True, "illegal memory access"),
        ("memory", False, "out of memory"),
    ],
)
def test_a_process_ends_with_its_gpus_state_and_not_for_want_of_memory(
    tmp_path: Path, fault: str, ends: bool, message: str
) -> None:
    """Each candidate after an illegal access fails for it; or seconds are lost to a new process for tiles too large."""
    gpu = device.current()
    assert gpu is not None
    (task, *_) = of_calls([("faults", PROBLEM)], gpu)
    first, second, third = space.space(task, gpu)[:3]
    routes: dict[str, Any] = {"kernel": partial(route, guilty=second.name, fault=fault, told=tmp_path / "pids")}
    measuring = Worker(bench, "cuda:0", gpu, routes)
    found = []
    for candidate in (first, second, third):
        measuring.submit(CheckJob(task, candidate), 60.0)
        while (answer := measuring.answer()) is None:
            wait_for_any([measuring], 1.0)
        found.append(answer)
    measuring.stop()
    before, failed, after = found
    assert isinstance(before, Checked) and not before.wrong
    assert isinstance(failed, Raised) and message in failed.message and failed.fatal == ends
    assert isinstance(after, Checked) and not after.wrong
    pids = (tmp_path / "pids").read_text().split()
    assert (pids[0] != pids[-1]) == ends
