"""A GPU's place, taken on a CPU: tasks of a few microseconds, and candidates that go wrong as real ones do."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.device import INTERPRETER, Device
from dilated_attention_pytorch.tuning import machine, space
from dilated_attention_pytorch.tuning.journal import Journal
from dilated_attention_pytorch.tuning.measure import GUARD, Answer, Checked, CheckJob, Job, Timed, bench
from dilated_attention_pytorch.tuning.problems import Task, of_calls
from dilated_attention_pytorch.tuning.routes import Launch, Launcher, Outputs, Route, Scene
from dilated_attention_pytorch.tuning.space import Candidate as Candidate
from dilated_attention_pytorch.tuning.tune import Progress, Settings, tune

DEVICE = INTERPRETER
PROBLEM = Problem("fp32", batch=1, length=410, heads=2, kv_heads=2, head_dim=16, branches=((260, 2),))
"""No tile holds a segment, so every launch stands for itself."""
NESTED = Problem("fp16", batch=1, length=2048, heads=2, kv_heads=2, head_dim=16, branches=((1024, 1), (2048, 2)))
"""Branches that a rendered text computes in one pass; too much for a test to compute."""


def tasks(*problems: Problem) -> list[Task]:
    """The launches of calls."""
    return of_calls([("standin", problem) for problem in problems or (PROBLEM,)], DEVICE)


def candidates(task: Task) -> list[Candidate]:
    """Of a task, the default first."""
    return space.space(task, DEVICE)


def microseconds(name: str) -> float:
    """What a candidate takes: some hundreds, by its name alone."""
    return 100.0 + sum(map(ord, name)) % 97 * 3.0


def right(scene: Scene, candidate: Candidate, faults: Mapping[str, str] = {}, pace: float = 1.0) -> Launcher:
    """Writes what is expected, in the candidate's time, unless it has a fault."""

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            end = time.perf_counter() + pace * 1e-6 * microseconds(candidate.name)
            if fault := faults.get(candidate.name):
                return FAULTS[fault](scene, outputs)
            for name, expected in scene.expected.items():
                outputs[name].copy_(expected)
            while time.perf_counter() < end:
                pass
            return None

        return run

    return launcher


def _hang(scene: Scene, outputs: Outputs) -> None:
    time.sleep(3600)


def _crash(scene: Scene, outputs: Outputs) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _out_of_bounds(scene: Scene, outputs: Outputs) -> None:
    for name, expected in scene.expected.items():
        outputs[name].copy_(expected)
    last = outputs[next(iter(outputs))]
    last.as_strided((1,), (1,), GUARD + last.numel() + 3).fill_(1.0)


def _nan(scene: Scene, outputs: Outputs) -> None:
    for name, expected in scene.expected.items():
        outputs[name].copy_(expected)
        outputs[name].view(-1)[7] = torch.nan


def _wrong(scene: Scene, outputs: Outputs) -> None:
    for name, expected in scene.expected.items():
        outputs[name].copy_(1.01 * expected)


def _partial(scene: Scene, outputs: Outputs) -> None:
    for name, expected in scene.expected.items():
        outputs[name][:, : expected.shape[1] // 2].copy_(expected[:, : expected.shape[1] // 2])


def _out_of_memory(scene: Scene, outputs: Outputs) -> None:
    torch.empty(1 << 60)


def _raise(scene: Scene, outputs: Outputs) -> None:
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


FAULTS = {
    "hang": _hang,
    "crash": _crash,
    "out of bounds": _out_of_bounds,
    "nan": _nan,
    "wrong": _wrong,
    "partial": _partial,
    "out of memory": _out_of_memory,
    "illegal access": _raise,
}


def settings(folder: Path, faults: Mapping[str, str] = {}, **changes: object) -> Settings:
    """A run on the CPU that compiles nothing and folds into `folder`/db."""
    given: dict[str, object] = {
        "journal": folder / "run.jsonl",
        "root": folder / "db",
        "gpus": ("cpu",),
        "limit": 6,
        "processes": 1,
        "routes": {"kernel": partial(right, faults=dict(faults)), "apart": right, "torch": right, "cudnn": right},
        "compiler": None,
    }
    return Settings(**(given | changes))  # type: ignore[arg-type]


def run(what: Sequence[Task], how: Settings, device: Device = DEVICE, progress: Progress | None = None) -> Journal:
    """Tune."""
    return tune(what, device, machine.run_row(device, "test"), how, progress=progress)


def with_torch(where: str, device: Device, routes: Mapping[str, Route]) -> Callable[[Job], Answer]:
    """The measuring process's own, which may be forked: threads of torch do not survive that."""
    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's would tell of crashes that are meant to happen
    return bench(where, device, routes)


def without_torch(where: str, device: Device, routes: Mapping[str, object]) -> Callable[[Job], Answer]:
    """In the measuring process's place: every candidate is right, and takes its time without a launch.

    It notes what it was asked in the file that `where` names, so that a test can count.
    """

    def answer(job: Job) -> Answer:
        told = [c.name for c in ([job.candidate] if isinstance(job, CheckJob) else job.candidates)]
        with Path(where).open("a") as stream:
            stream.write(f"{job.task.key} {type(job).__name__} {told}\n")
        time.sleep(0.002)
        if isinstance(job, CheckJob):
            return Checked(1e-7, 1e-5)
        return tuple(Timed(us, 0.999 * us, 1.001 * us) for us in map(microseconds, told))

    return answer
