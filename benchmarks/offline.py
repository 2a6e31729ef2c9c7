"""The launches of a workload, compiled for a GPU that need not be here, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.runtime.plan import Choice, plan
from dilated_attention_pytorch.tuning.screen import Resources, compile_offline

PROCESSES = 2


@dataclass(frozen=True)
class Launch:
    """One launch of a plan."""

    problem: Problem
    choice: Choice


def launches(problem: Problem, device: Device) -> list[Launch]:
    """What a forward and a backward launch on this device, but for the delta kernel."""
    toolchain = Toolchain(Toolchain.current().triton)
    return [Launch(problem, choice) for choice in plan(problem, device, "triton", toolchain=toolchain).launches]


def compiled(wanted: Sequence[Launch], arch: str) -> Iterator[tuple[Launch, Resources | str]]:
    """Each launch with what it takes, or with the sentence that the compiler refused it with, as they get ready."""
    # A forked child of a process that has run torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(PROCESSES, context, initializer=_quiet)
    try:
        with _ctrl_c_ignored():
            results = pool.map(_compile, wanted, [arch] * len(wanted))
        yield from zip(wanted, results, strict=True)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes that start meanwhile ignore Ctrl-C for good: their parent ends them, and they print no traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quiet() -> None:
    """A worker keeps to itself the IR that a compiler which fails prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _compile(launch: Launch, arch: str) -> Resources | str:
    try:
        return compile_offline(launch.problem, launch.choice, arch)
    except Exception as error:  # a compiler raises anything, and the other launches still have their rows
        return f"{type(error).__name__}: {error}".partition("\n")[0]
