"""A tuning journal that nobody ran: seeded, with everything in it that a report has to cope with."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

from dilated_attention_pytorch.config import OPS, LaunchConfig, ProblemKey
from dilated_attention_pytorch.tuning.journal import (
    Config,
    End,
    Measurement,
    Pick,
    ProblemRow,
    Row,
    Run,
    to_json,
)

DEFAULT = LaunchConfig(64, 64, 4, 3).to_dict()
BLOCKS = ((32, 32), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64))
LAUNCHES = [
    LaunchConfig(m, n, warps, stages).to_dict()
    for (m, n), warps, stages in itertools.product(BLOCKS, (4, 8), (2, 3, 4))
]
FAULTS = {
    "screened": "shared memory: 294,912 bytes asked for, 232,448 there",
    "compile": "error: 'tt.dot' op failed <to> infer \"layout\" & gave up\n  at general.py:211:32",
    "timeout": "no answer for 10 s: the worker was ended",
    "resources": "OutOfResources: shared memory, Required: 262144, Hardware limit: 232448",
    "runtime": "Triton Error [CUDA]: device-side assert triggered",
    "illegal_access": "CUDA error: an illegal memory access was encountered",
    "correctness": "dq: relative error 0.77 exceeds 0.01; 3 of 4096 rows are NaN",
}

RUN = Run(
    device="nvidia-h100-80gb-hbm3",
    arch="sm_90",
    sms=132,
    shared_bytes=232448,
    bandwidth=3352.0,
    triton="3.6.0",
    torch="2.11.0+cu130",
    driver="580.159.04",
    command="dilated-attention tune --workload longnet --workload core --budget 10m",
    started="2026-11-22T14:20:00+00:00",
)


def keys() -> list[ProblemKey]:
    """Twenty-one problems of two models."""
    shapes = [(2048, 1), (2048, 2), (2048, 4), (3072, 6), (3072, 12)]
    longnet = [ProblemKey(op, "bf16", 64, (pair,), "dilated", "none", False, (), 256) for pair in shapes for op in OPS]
    core = [
        ProblemKey(op, "fp32", 64, ((128, stride),), "all", "snake", False, flags, 512)
        for (stride, flags), op in itertools.product(((1, ("tf32",)), (4, ())), OPS)
    ]
    return longnet + core


def rows(seed: int = 7, candidates: int = 45) -> Iterator[Row]:
    """A run's rows in the order a tuner writes them; its last problem is begun and never decided, and it has no end.

    Args:
        seed: Of every number.
        candidates: Configurations a problem, one external route and the failures among them.
    """
    draw = random.Random(seed)
    yield RUN
    asked = keys()
    for place, key in enumerate(asked):
        yield from _problem(draw, key, candidates, weight=1 / len(asked), decided=place < len(asked) - 1)


def _problem(draw: random.Random, key: ProblemKey, candidates: int, weight: float, decided: bool) -> Iterator[Row]:
    best = draw.uniform(40, 900)
    peak = {("bf16", False): 989.0, ("fp32", True): 494.0, ("fp32", False): 66.0}[key.dtype, "tf32" in key.flags]
    flops = best * draw.uniform(0.15, 0.7) * peak * 1e6
    traffic = best * draw.uniform(0.05, 0.4) * 3352 * 1e3
    incumbent = draw.choice(LAUNCHES) if draw.random() < 0.3 else None
    workload = "longnet" if key.order == "none" else "core"
    yield ProblemRow(key, workload, weight, flops, traffic, DEFAULT, incumbent)
    others = [config for config in draw.sample(LAUNCHES, candidates - 1) if config != DEFAULT][: candidates - 2]
    unlucky = ["screened"] * draw.randrange(2, 9) + [kind for kind in FAULTS if draw.random() < 0.3]
    failing = dict(zip(map(str, others), unlucky, strict=False))
    everyone: list[tuple[Config, str]] = [(config, "kernel") for config in [DEFAULT, *others]]
    everyone.append(({"views": 1}, "cudnn"))

    def timed(config: Config, route: str, stage: str, median: float, flag: str = "") -> Measurement:
        spread = median * (0.3 if flag else draw.uniform(0.002, 0.03))
        variant = "general" if route == "kernel" else None
        return Measurement(
            key, config, route, variant, stage, "ok", median, median - spread, median + spread, flag=flag
        )

    times = {}
    for place, (config, route) in enumerate(everyone):
        if status := failing.get(str(config)) if route == "kernel" else None:
            stage = {"screened": "screen", "compile": "screen", "correctness": "check"}.get(status, "race")
            yield Measurement(key, config, route, "general", stage, status, message=FAULTS[status])
            continue
        times[place] = best * (1 + draw.expovariate(2.5) if place else draw.uniform(1.0, 1.6))
        alone = route == "kernel" or (key.op, key.branches) != ("fwd", ((2048, 4),))
        yield timed(config, route, "race", times[place], "" if alone else "noisy")
    ranked = sorted(times, key=times.__getitem__)
    for place in ranked[3:6]:
        yield timed(*everyone[place], "step", times[place] * draw.uniform(0.99, 1.02))
    finalists = dict.fromkeys([*ranked[:5], 0])
    finals = [timed(*everyone[place], "finals", times[place] * draw.uniform(0.995, 1.005)) for place in finalists]
    if not decided:
        return
    yield from finals
    default = finals[-1] if len(finals) == 6 else next(row for row in finals if row.config == DEFAULT)
    finals.sort(key=lambda row: row.median_us or math.inf)
    first, second = finals[:2]
    assert first.median_us and first.low_us and first.high_us and second.median_us and default.median_us
    tied = second.median_us <= 1.02 * first.median_us
    yield Pick(
        key,
        first.config,
        first.route,
        "tie: less shared memory" if tied else "fastest",
        first.median_us,
        first.low_us,
        first.high_us,
        default.median_us,
        second.median_us,
        len(times),
    )


def write(path: Path, rows: Iterator[Row] | list[Row], torn: bool = False, end: End | None = None) -> Path:
    """A journal file of these rows.

    Args:
        path: The file.
        rows: In order.
        torn: The last line is cut in the middle, as a killed writer leaves it.
        end: A last row.
    """
    lines = [to_json(row) for row in ([*rows, end] if end else rows)]
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text[: -len(lines[-1]) // 2] if torn else text, encoding="utf-8")
    return path
