"""The speed that must not be lost: one branch's forward on a GPU against cuDNN on packed segments, dilated or not.

    python -m benchmarks.floor RESULT.json

A peer gets its best case: rows that somebody has already gathered into contiguous (segments, heads, rows, head_dim).
Ours reads the rows where they lie, and at dilation 4 writes the zero rows of the steps that no branch keeps as well.
Both do the same useful work, so their ratio is a ratio of times. Exit status 1 if a floor is broken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference

from .environment import environment
from .timing import interleaved

ROWS = 2048
HEADS = 16
SEGMENTS = 16
RATES = (1, 4)
HEAD_DIMS = (64, 128)
ROUNDS = 41
FLOOR_OF_CUDNN = 0.6
FLOOR_OF_DILATION = 0.9
TOLERANCE = 4e-3
COLUMNS = ("head_dim", "dilation", "ms", "tflops", "cudnn_tflops", "of_cudnn", "of_dilation_1", "error", "kernel")


def main() -> int:
    """Measure, write the result file that the command line names, print the table."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    if not torch.cuda.is_available():
        print("this measurement needs a GPU; `make demo` runs without one")
        return 2
    rows = [row for head_dim in HEAD_DIMS for row in measure(head_dim)]
    document = {
        "what": f"forward of one branch, {ROWS} kept rows a segment, bf16, {SEGMENTS} segments, {HEADS} heads",
        "command": "python -m benchmarks.floor RESULT.json",
        "environment": environment(),
        "rounds": ROUNDS,
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(rows)
    return int(any(row["broken"] for row in rows))


def measure(head_dim: int) -> list[dict[str, object]]:
    """Times and rates of both dilations and the peer, interleaved."""
    generator = torch.Generator("cuda").manual_seed(head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    packed = [normal(SEGMENTS, HEADS, ROWS, head_dim) for _ in range(3)]

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*packed)

    spread = {rate: [normal(1, SEGMENTS * ROWS * rate, HEADS, head_dim) for _ in range(3)] for rate in RATES}
    errors = {rate: check(rate, *tensors) for rate, tensors in spread.items()}
    calls = {f"dilation {rate}": _call(rate, *tensors) for rate, tensors in spread.items()}
    with torch.no_grad():
        times = interleaved({"cuDNN": cudnn, **calls}, torch.device("cuda"), ROUNDS)
    flops = 4 * SEGMENTS * HEADS * ROWS**2 * head_dim
    rates = {name: flops / spread.median / 1e9 for name, spread in times.items()}
    found: list[dict[str, object]] = []
    for rate in RATES:
        name = f"dilation {rate}"
        of_cudnn, of_undilated = rates[name] / rates["cuDNN"], rates[name] / rates["dilation 1"]
        found.append(
            {
                "head_dim": head_dim,
                "dilation": rate,
                "ms": round(times[name].median, 4),
                "ms_low_high": [round(times[name].low, 4), round(times[name].high, 4)],
                "tflops": round(rates[name], 1),
                "cudnn_ms": round(times["cuDNN"].median, 4),
                "cudnn_tflops": round(rates["cuDNN"], 1),
                "of_cudnn": round(of_cudnn, 3),
                "of_dilation_1": round(of_undilated, 3),
                "error": float(f"{errors[rate]:.2e}"),
                "kernel": kernel(rate, *spread[rate]),
                "broken": of_cudnn < FLOOR_OF_CUDNN or of_undilated < FLOOR_OF_DILATION or errors[rate] > TOLERANCE,
            }
        )
    return found


def _call(rate: int, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: dap.dilated_attention(q, k, v, ROWS * rate, rate, backend="triton")


def check(rate: int, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error of the last segment against the float64 oracle."""
    out = dap.dilated_attention(q, k, v, ROWS * rate, rate, backend="triton")
    last = slice(-ROWS * rate, None)
    wanted, _ = reference.dilated_attention(q[:, last], k[:, last], v[:, last], [ROWS * rate], [rate])
    return float((out[:, last].double() - wanted).norm() / wanted.norm())


def kernel(rate: int, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The text and configuration that ran."""
    choice = dap.explain(q, k, v, ROWS * rate, rate, backend="triton").branches[0].fwd
    return f"{choice.variant.name} {choice.config.name} ({choice.rung})"


def show(rows: list[dict[str, object]]) -> None:
    """The table that a person reads."""
    table = Table(title=f"Forward of one branch, {ROWS} rows a segment, bf16")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column == "kernel" else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
