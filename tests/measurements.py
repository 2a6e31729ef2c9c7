"""Hand-made entries of a tuning database: the evidence is invented, the shape is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dilated_attention_pytorch import database, device
from dilated_attention_pytorch.config import LaunchConfig, Problem, ProblemKey
from dilated_attention_pytorch.database import Check, Entry, Provenance, Resources, Times

KERNEL = "0123456789ab"
KERNELS = {KERNEL: ("general", "general_even")}
"""An entry of these was measured on ragged tiles and on whole ones: it speaks for either."""
TRITON = "3.6.0"
TOOLCHAIN = device.Toolchain(TRITON)

PROBLEM = Problem("fp16", batch=2, length=8765, heads=8, kv_heads=8, head_dim=64, branches=((512, 2),))
"""What most tests ask about: 256 rows of stride 2."""
CONFIG = LaunchConfig(64, 32)


def entry(
    op: str = "fwd",
    problem: Problem = PROBLEM,
    *,
    branch: int | tuple[int, ...] = 0,
    config: LaunchConfig = CONFIG,
    shared_bytes: int = 40_000,
    median: float = 100.0,
    apart: float | None = None,
    error: float = 1e-4,
    kernel: str = KERNEL,
    triton: str = TRITON,
    branches: tuple[tuple[int, int], ...] | None = None,
    grid: int | None = None,
) -> Entry:
    """A winner for a branch of a problem, or for several in one pass; `branches` and `grid` move its key."""
    key = ProblemKey.of(problem, op, *([branch] if isinstance(branch, int) else branch))
    key = replace(key, branches=branches or key.branches, grid=grid or key.grid)
    return Entry(
        key,
        config,
        Resources(shared_bytes, registers=128, spills=0),
        Times(median, median * 0.99, median * 1.01, default=median * 1.25, second=None, apart=apart),
        Check(error, tolerance=5e-4),
        Provenance(kernel, triton, torch="2.11.0+cu130", driver="580.159.04", date="2026-11-22", candidates=55),
    )


def database_at(root: Path, entries: dict[str, list[Entry]]) -> database.Database:
    """A database of entries by device; its kernels are those of `KERNELS`."""
    root.mkdir(exist_ok=True)
    for name, measured in entries.items():
        database.save(device.simulated(name), measured, root)
    return database.Database(root, lambda: KERNELS)
