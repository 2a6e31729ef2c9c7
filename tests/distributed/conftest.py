"""Processes that are started once a run of the tests, however many workers share it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from filelock import FileLock

from . import ranks

Outcomes = Callable[[str], list[Any]]
"""The name of a scene -> what it returned on each of its ranks; a rank's error fails the test."""


def perform(program: str, processes: int, factory: pytest.TempPathFactory) -> Outcomes:
    """Run a program, or wait for the worker of this run that does, and read what came of it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ranks-{program}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(ranks.run, (port, folder, program, processes), nprocs=processes)
            (folder / "done").touch()
    found = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]

    def outcomes(scene: str) -> list[Any]:
        of_ranks = [outcome[scene] for outcome in found if scene in outcome]
        for rank, outcome in enumerate(of_ranks):
            assert not isinstance(outcome, ranks.Failed), f"rank {rank}: {outcome}"
        return of_ranks

    return outcomes


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of the scenes on the torch backend, in four processes."""
    return perform("torch", ranks.RANKS, tmp_path_factory)


@pytest.fixture(scope="session")
def kernel_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of the scenes with generated kernels in Triton's interpreter, in two processes."""
    return perform("kernels", 2, tmp_path_factory)
