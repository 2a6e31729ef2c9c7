"""The models that really run dilated attention, as data: for the console command, the benchmarks and the tuner."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from .config import Problem
from .errors import ArgumentError


@dataclass(frozen=True)
class Workload:
    """One model's attention, and the choices under which people run it; the first of each is the usual one.

    Attributes:
        name: How the command line calls it.
        model: Whose it is.
        batch: B.
        lengths: N.
        heads: H, with as many key/value heads.
        head_dim: D.
        patterns: Branch lists, each of (segment length, dilation rate) pairs.
        dtypes: "bf16", "fp16", "fp32".
        causal: Whether later tokens are hidden.
        queries: As in `dilated_attention`, like all below.
        head_offset: The rule its weights were trained under.
        order: "none", "snake" or "hilbert".
        prefix: Tokens before the grid.
        padding: "none" or "zeros".
    """

    name: str
    model: str
    batch: int
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    patterns: tuple[tuple[tuple[int, int], ...], ...]
    dtypes: tuple[str, ...]
    causal: tuple[bool, ...] = (False,)
    queries: str = "dilated"
    head_offset: str = "cyclic"
    order: str = "none"
    prefix: int = 0
    padding: str = "none"

    def problem(
        self,
        length: int | None = None,
        pattern: int = 0,
        dtype: str | None = None,
        causal: bool | None = None,
    ) -> Problem:
        """One call of the model; what is not given is the usual choice.

        Args:
            length: N.
            pattern: Index into `patterns`.
            dtype: As in `Problem`.
            causal: Keys of later tokens are dropped.
        """
        length = self.lengths[0] if length is None else length
        return Problem(
            dtype=self.dtypes[0] if dtype is None else dtype,
            batch=self.batch,
            length=length,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            branches=self.patterns[pattern],
            queries=self.queries,
            head_offset=self.head_offset,
            order=self.order,
            row_width=near_square(length - self.prefix) if self.order == "snake" else 0,
            prefix=self.prefix if self.order == "snake" else 0,
            causal=self.causal[0] if causal is None else causal,
            padding=self.padding,
        )

    def problems(self) -> list[Problem]:
        """Every call: each length, pattern, dtype and causality."""
        every = itertools.product(self.lengths, range(len(self.patterns)), self.dtypes, self.causal)
        return [self.problem(*choice) for choice in every]


def near_square(cells: int) -> int:
    """Row width ⌈√cells⌉ of the smallest near-square grid, as `TokenOrder` has it without a grid."""
    return math.isqrt(max(cells, 1) - 1) + 1


def named(name: str) -> Workload:
    """The workload of this name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in WORKLOADS:
        raise ArgumentError(f"{name!r} is no workload; known are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


_ALL = (
    Workload(
        name="longnet",
        model="LongNet base language model",
        batch=1,
        lengths=(32768,),
        heads=12,
        head_dim=64,
        patterns=(((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12)),),
        dtypes=("bf16",),
        causal=(False, True),
    ),
    Workload(
        name="gigapath",
        model="Prov-GigaPath slide encoder",
        batch=1,
        lengths=(10213,),
        heads=16,
        head_dim=48,
        patterns=(((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16)),),
        dtypes=("fp16",),
        head_offset="blocked",
        padding="zeros",
    ),
    Workload(
        name="longvit",
        model="LongViT-S at 4096 px",
        batch=1,
        lengths=(16384,),
        heads=16,
        head_dim=24,
        patterns=(((1024, 1), (2048, 2), (4096, 4), (8192, 8), (16384, 16)),),
        dtypes=("fp16",),
        head_offset="blocked",
    ),
    Workload(
        name="readme",
        model="README example of fkodom/dilated-attention-pytorch",
        batch=1,
        lengths=(8192,),
        heads=8,
        head_dim=64,
        patterns=(((2048, 1), (4096, 2), (8192, 4)),),
        dtypes=("fp16",),
        causal=(False, True),
    ),
    Workload(
        name="core",
        model="HilbertAttentionCore",
        batch=4,
        lengths=(1024, 4096),
        heads=12,
        head_dim=64,
        patterns=(((128, 1),), ((128, 2),), ((128, 4),)),
        dtypes=("fp32", "bf16"),
        queries="all",
        head_offset="zero",
        order="snake",
    ),
    Workload(
        name="wide",
        model="large language model",
        batch=1,
        lengths=(65536,),
        heads=16,
        head_dim=128,
        patterns=(((2048, 1), (4096, 2), (8192, 4), (16384, 8), (32768, 16)),),
        dtypes=("bf16",),
        causal=(False, True),
    ),
    Workload(
        name="image",
        model="diffusion transformer, 64x64 patches in Hilbert order behind 512 text tokens",
        batch=1,
        lengths=(4608,),
        heads=24,
        head_dim=128,
        patterns=(((1024, 1),), ((1024, 2),)),
        dtypes=("bf16",),
        order="hilbert",
        prefix=512,
    ),
)

WORKLOADS = {workload.name: workload for workload in _ALL}
"""Workloads by name."""
