"""How long it takes to order a million tokens on one core: `python -m benchmarks.orders`.

Every call builds its order from nothing; the tables that a process makes once are made before.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from dilated_attention_pytorch import TokenOrder
from dilated_attention_pytorch.order import CURVES

from .environment import environment

RESULT = Path(__file__).resolve().parent / "results" / "orders_cpu.json"
TOKENS = 1_000_000
GRIDS = ((1000, 1000), (997, 1003), (100, 100, 100), (99, 101, 101))
BITS = 21
ROUNDS = 15


def measure(kind: str, where: tuple[int, ...] | int) -> dict[str, object]:
    """Wall time of one order: over a grid, or over random points of so many dimensions."""
    if isinstance(where, int):
        generator = torch.Generator().manual_seed(where)
        coords = torch.randint(0, 1 << BITS, (TOKENS, where), generator=generator)
        what = f"{TOKENS} points, {where} x {BITS} bits"
    else:
        what = " x ".join(map(str, where))
    seconds = []
    for round_ in range(ROUNDS + 1):
        start = time.perf_counter()
        if isinstance(where, int):
            TokenOrder.from_coordinates(coords, kind).indices(TOKENS)
        else:
            # Another prefix is another order, so that no cache knows it.
            TokenOrder(kind, where, prefix=round_).indices(math.prod(where) + round_)
        seconds.append(time.perf_counter() - start)
    warm = seconds[1:]
    return {
        "kind": kind,
        "what": what,
        "median_s": round(statistics.median(warm), 4),
        "worst_s": round(max(warm), 4),
        "first_s": round(seconds[0], 4),
    }


def main() -> int:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = [measure(kind, where) for where in (*GRIDS, 2, 3) for kind in CURVES]
    for row in rows:
        print(f"{row['kind']:8} {row['what']:28} median {row['median_s']:.3f} s, worst {row['worst_s']:.3f} s")
    document = {"environment": environment(), "command": "python -m benchmarks.orders", "rounds": ROUNDS, "rows": rows}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.orders", description=__doc__).parse_args()
    sys.exit(main())
