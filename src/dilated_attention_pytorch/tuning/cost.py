"""How long a run will take, before it begins: after runs on an H100 with 16 cores, compilers included."""

from __future__ import annotations

from collections.abc import Sequence

BEGIN_S = 10.0
"""Processes start, torch is imported, the GPU is found."""
COMPILE_S = 1.7
"""Of a core, a kernel."""
MEASURE_S = 0.15
"""Of a GPU, a candidate that is raced: its checks, the race, and its share of the finals."""
RACED = 0.75
"""Of what is compiled; the rest spills, or does not fit."""


def seconds(candidates: Sequence[int], steps: int, *, processes: int, gpus: int) -> float:
    """What a run takes at most. Problems that share a kernel compile it once, which is not counted here.

    Args:
        candidates: Of each problem, how many are tried.
        steps: Candidates that the step around the best adds.
        processes: That compile.
        gpus: That measure.
    """
    compiled = sum(candidates) + (steps + 1) * len(candidates)  # the winner once more, with tails
    raced = RACED * sum(candidates) + steps * len(candidates)
    return BEGIN_S + max(COMPILE_S * compiled / processes, MEASURE_S * raced / gpus)
