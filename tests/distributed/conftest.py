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


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run the scenes, or wait for the worker of this run that does, and read what came of it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(ranks.run, (port, folder), nprocs=ranks.RANKS)
            (folder / "done").touch()
    found = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]

    def of_scene(scene: str) -> list[Any]:
        of_ranks = [outcome[scene] for outcome in found if scene in outcome]
        assert of_ranks, "no rank came to this scene: one before it failed"
        for rank, outcome in enumerate(of_ranks):
            assert not isinstance(outcome, ranks.Failed), f"rank {rank}: {outcome}"
        return of_ranks

    return of_scene
