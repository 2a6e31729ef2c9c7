"""The figures of docs/performance.md, from a result file."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cases import GRADIENT_FLOPS, SCALED
from benchmarks.contenders import DENSE, OURS, TORCHSCALE
from benchmarks.goals import MEASURED
from benchmarks.results import Document, best_peer, median

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 9, "axes.titlesize": 9}
INK, MINE, PEER, LIMIT = "#222222", "#24519E", "#E8A33D", "#B5B5B0"

Points = Mapping[str, Sequence[tuple[float, float]]]
"""(x, y) of each line, by its label."""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Of its file, without the GPU.
        data: What it shows: what JSON holds.
        draw: Draws the data.
    """

    name: str
    data: Any
    draw: Callable[[Any], Figure]

    @property
    def mark(self) -> str:
        """In the file: tells whether it shows this data. Another matplotlib draws the same in other bytes."""
        digest = hashlib.sha256(json.dumps(self.data).encode()).hexdigest()[:16]
        return f"python -m benchmarks report, data {digest}"

    def svg(self) -> str:
        """The figure as text, the same for the same matplotlib."""
        import matplotlib

        with matplotlib.rc_context(STYLE), io.StringIO() as file:
            described = {"Creator": None, "Date": None, "Description": self.mark}
            self.draw(self.data).savefig(file, format="svg", metadata=described, bbox_inches="tight", pad_inches=0.05)
            return re.sub(r"(\.\d\d)\d+", r"\1", file.getvalue())


def pictures(document: Document) -> Iterator[Picture]:
    """Those that a result file has data for."""
    if kernels := _kernels(document):
        yield Picture("kernels", kernels, _draw_kernels)
    if operations := _operations(document):
        yield Picture("operations", operations, _draw_operations)
    if scale := _scale(document):
        yield Picture("scale", scale, _draw_scale)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _kernels(document: Document) -> dict[str, dict[str, list[list[float]]]]:
    """Useful TFLOP/s against kept rows, not causal, by panel and line."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for case in document["cases"].values():
        problem = case["problem"]
        if case["level"] != "kernels" or problem["causal"] or problem["order"] != "none":
            continue
        (width, rate), *_ = problem["branches"]
        if rate not in (1, 4) or problem["head_dim"] not in (64, 128):
            continue
        for measurement, work in (("forward", 1.0), ("backward", GRADIENT_FLOPS)):
            panel = panels.setdefault(f"D {problem['head_dim']:>3}, {measurement}", {})
            mine, peer = median(case["rows"].get(OURS, {}), measurement), best_peer(case, measurement)
            lines = {f"this package, dilation {rate}": mine, "best peer, gathered rows": peer and peer[1]}
            for line, time in (lines | {f"limit, dilation {rate}": case["limit_ms"][measurement]}).items():
                if time is not None:
                    panel.setdefault(line, []).append([width // rate, round(work * case["gflop"] / time, 1)])
    return {
        panel: {line: sorted(_once(points)) for line, points in sorted(lines.items(), reverse=True)}
        for panel, lines in sorted(panels.items(), key=lambda item: (item[0][:5], "backward" in item[0]))
    }


def _once(points: list[list[float]]) -> list[list[float]]:
    """Of several points at one place the highest."""
    return [[x, max(y for at, y in points if at == x)] for x in sorted({x for x, _ in points})]


def _draw_kernels(panels: Mapping[str, Points]) -> Figure:
    figure, axes = _panels(len(panels), 2)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for line, points in lines.items():
            colour = LIMIT if line.startswith("limit") else MINE if line.startswith("this") else PEER
            style = "--" if line.endswith("4") else "-"
            ax.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=line)
        ax.set(title=title, xscale="log", xlabel="kept rows a segment", ylabel="TFLOP/s", ylim=(0, None))
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xticks(ticks, [f"{int(tick)}" for tick in ticks], fontsize=7)
        ax.minorticks_off()
    _legend(figure, axes[0])
    return figure


# ---- Whole operations ------------------------------------------------------------------------------------------------


def _operations(document: Document) -> list[list[Any]]:
    """[operation, ours, best peer, torchscale's way] in milliseconds, forward and backward together."""
    rows = []
    for name, case in document["cases"].items():
        mine, peer = median(case["rows"].get(OURS, {}), "both"), best_peer(case, "both")
        if case["level"] == "operations" and mine is not None and peer is not None:
            rows.append([name.removeprefix("op-"), mine, peer[1], median(case["rows"].get(TORCHSCALE, {}), "both")])
    return rows


def _draw_operations(rows: Sequence[Sequence[Any]]) -> Figure:
    figure, (ax,) = _panels(1, 1, height=0.32 * len(rows) + 0.8)
    for place, (colour, label) in enumerate(((MINE, "this package"), (PEER, "best peer"), (LIMIT, TORCHSCALE))):
        found = [(row, values[place + 1] / values[1]) for row, values in enumerate(rows) if values[place + 1]]
        if found:
            at, times = zip(*found, strict=True)
            ax.barh([row + 0.27 * (place - 1) for row in at], times, height=0.25, color=colour, label=label)
    ax.set_yticks(range(len(rows)), [f"{name} ({ours:.3g} ms)" for name, ours, *_ in rows])
    ax.set(title="forward + backward, time beside ours", xlabel="times as long as this package")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.axvline(1.0, color=INK, linewidth=0.6)
    _legend(figure, ax)
    return figure


# ---- Scale -----------------------------------------------------------------------------------------------------------


def _scale(document: Document) -> dict[str, dict[str, list[list[float]]]]:
    """Milliseconds, and bytes above the inputs, against N."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for case in document["cases"].values():
        if case["level"] != "scale" or case["workload"] not in SCALED:
            continue
        length = case["problem"]["length"]
        for who in (OURS, DENSE):
            row = case["rows"].get(who, {})
            for measurement in ("forward", "both"):
                if (time := median(row, measurement)) is None:
                    continue
                line = f"{who}, {MEASURED[measurement]}"
                panels.setdefault(f"{case['workload']}: ms", {}).setdefault(line, []).append([length, time])
                memory = row["peak_bytes"][measurement] / 2**20
                panels.setdefault(f"{case['workload']}: MiB", {}).setdefault(line, []).append([length, memory])
    return {panel: {line: sorted(points) for line, points in lines.items()} for panel, lines in sorted(panels.items())}


def _draw_scale(panels: Mapping[str, Points]) -> Figure:
    figure, axes = _panels(len(panels), 2)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for line, points in lines.items():
            colour, style = (MINE if line.startswith(OURS) else PEER), ("-" if line.endswith("backward") else "--")
            ax.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=3, label=line)
        ax.set(title=title, xscale="log", yscale="log", xlabel="tokens")
    _legend(figure, axes[0])
    return figure


def _legend(figure: Figure, ax: Any) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7, frameon=False)


def _panels(count: int, columns: int, height: float = 2.4) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(7.2, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes
