"""Compilers at work in many processes before anything is timed: what they leave on the disk, the timing process reads.

A contender that ends its process or spoils the GPU does so here, and never comes to be timed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.cases import Case
from benchmarks.compare import both_call, forget_compiled, forward_call
from benchmarks.contenders import FLASH_4, contenders, set_up_compilers
from benchmarks.measure import Inputs, is_sticky, told
from dilated_attention_pytorch.tuning.worker import Fatal, Lost, NoStart, Raised, Worker, wait_for_any

Job = tuple[Case, str]

JOB_S = 240.0
"""Seconds that a contender may take to compile."""

PROCESSES = min(12, max((os.cpu_count() or 2) - 2, 1))


@dataclass
class Prepared:
    """What came of it.

    Attributes:
        failed: Who must not be timed, with the reason: it ended its process.
        left: Who is not ready, as there was no time or no process.
    """

    failed: dict[Job, str] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)


def jobs(cases: Sequence[Case], where: torch.device) -> list[Job]:
    """All that compile: of each case its contenders, whole operations first, as they take longest.

    FlashAttention-4 compiles one kernel for all lengths; the cases of a scale share theirs, and need the whole GPU.
    """
    found: dict[tuple[object, ...], Job] = {}
    compiling = [case for case in cases if case.level in ("operations", "kernels")]
    for case in sorted(compiling, key=lambda case: case.level != "operations"):
        for name, contender in contenders(case, where).items():
            if contender.compiles:
                one_for_all = name == FLASH_4
                key = (case.problem.head_dim, case.problem.causal) if one_for_all else (case.name,)
                found.setdefault((name, *key), (case, name))
    return list(found.values())


def prepare(
    wanted: Sequence[Job],
    where: str,
    seconds: float,
    note: Callable[[str], None] = lambda text: None,
    processes: int = PROCESSES,
) -> Prepared:
    """Run each job once in a process of its own.

    Args:
        wanted: Who is to be compiled, the most important first.
        where: The torch device.
        seconds: After these no job begins, and none goes on.
        note: Told how far it is.
        processes: At a time.
    """
    found, waiting, done = Prepared(), deque(wanted), 0
    running: dict[Worker, Job] = {}
    workers = [Worker(_setup, where) for _ in range(min(processes, len(wanted)))]
    stop = time.monotonic() + seconds
    try:
        while (waiting or running) and time.monotonic() < stop:
            for worker in workers:
                if not worker.busy and waiting:
                    running[worker] = waiting.popleft()
                    worker.submit(running[worker], JOB_S)
            wait_for_any(workers, min(1.0, max(stop - time.monotonic(), 0.0)))
            for worker in list(running):
                if (answer := worker.answer()) is None:
                    continue
                job = running.pop(worker)
                done += 1
                note(f"prepared {done} of {len(wanted)}: {job[0].name}, {job[1]}")
                if isinstance(answer, Lost) or (isinstance(answer, Raised) and answer.fatal):
                    found.failed[job] = answer.message
                elif isinstance(answer, NoStart):
                    found.left.append(job)
        found.left += [*running.values(), *waiting]
    finally:
        for worker in workers:
            worker.stop()
    return found


def _setup(where: str) -> Callable[[Job], str]:
    set_up_compilers()
    device = torch.device(where)

    def do(job: Job) -> str:
        case, name = job
        try:
            forget_compiled()
            contender = contenders(case, device)[name]
            attend = contender.make()
            tensors = Inputs(case.problem, device).of(contender)
            forward_call(attend, *tensors[:3])()
            both_call(attend, *tensors)()
            if device.type == "cuda":
                torch.cuda.synchronize()
                del tensors
                torch.cuda.empty_cache()
        except Exception as error:  # the timing process meets it again, and writes it down
            if is_sticky(error):
                raise Fatal from error
            return told(error)
        return ""

    return do
