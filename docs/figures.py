"""`python -m docs.figures` draws the figures of these pages; with `--check` it says which ones are out of date.

What a figure shows is computed by the package: token orders, and what the oracle of `reference.py` attends to. Another
matplotlib draws the same data in other bytes, so a figure carries a digest of its data, and the check compares that.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from torch import Tensor

from dilated_attention_pytorch import TokenOrder, reference

PAGES = Path(__file__).resolve().parent
FOLDER = PAGES / "figures"
COSTS = PAGES.parent / "benchmarks" / "results" / "orders_cpu.json"
STYLE = {"svg.hashsalt": "dilated attention", "svg.fonttype": "path", "font.size": 10, "axes.titlesize": 10}
DARK, LIGHT, WARM = "#24519E", "#8CBDEB", "#E8A33D"
BRANCH_COLOURS = (DARK, LIGHT, WARM)
"""Of branches; the squares of later ones lie inside those of earlier ones."""
BRANCH_SIDES = (0.92, 0.64, 0.38)
GROUND, INK = "#F1F1EE", "#222222"

GRID = (64, 64)
ORDERS = (("row-major", None), ("snake", TokenOrder("snake", GRID)), ("hilbert", TokenOrder("hilbert", GRID)))
LENGTHS = (40, 64, 256, 1000, 1024, 4096)


@dataclass(frozen=True)
class Picture:
    """A figure: what it shows, and how that is drawn."""

    data: tuple[Tensor, ...]
    draw: Callable[[], Figure]

    @property
    def digest(self) -> str:
        """Of the data, whatever draws them."""
        found = hashlib.sha256()
        for tensor in self.data:
            found.update(repr(tensor.tolist()).encode())
        return found.hexdigest()[:16]

    def svg(self) -> str:
        """The figure as text, the same for the same matplotlib."""
        with matplotlib.rc_context(STYLE), io.StringIO() as file:
            described = {"Creator": None, "Date": None, "Description": f"python -m docs.figures, data {self.digest}"}
            self.draw().savefig(file, format="svg", metadata=described, bbox_inches="tight", pad_inches=0.05)
            # A hundredth of a point is finer than any screen.
            return re.sub(r"(\.\d\d)\d+", r"\1", file.getvalue())


# What is shown


def cells(grid: Sequence[int]) -> Tensor:
    """int64 (N, axes): all cells of a grid, row-major."""
    return torch.cartesian_prod(*(torch.arange(side) for side in grid))


def visited(order: TokenOrder | None, coords: Tensor) -> Tensor:
    """(N, axes): where the token of each step lies."""
    return coords if order is None else coords[order.indices(len(coords))]


def mean_distance(places: Tensor, segment_length: int) -> float:
    """Between two tokens of a segment, straight, in cells; `places` (N, axes) are in the sequence of steps."""
    segments = places.double().split(segment_length)
    pairs = sum(len(segment) * (len(segment) - 1) // 2 for segment in segments)
    return sum(float(torch.pdist(segment).sum()) for segment in segments) / pairs


def neighbours_together(order: TokenOrder | None, grid: tuple[int, int], segment_length: int) -> float:
    """Which part of the pairs of cells that share an edge shares a segment."""
    steps = torch.arange(grid[0] * grid[1]) if order is None else order.inverse(grid[0] * grid[1])
    segment = (steps // segment_length).view(grid)
    pairs = torch.cat([(segment.diff(dim=axis) == 0).flatten() for axis in (0, 1)])
    return float(pairs.double().mean())


def distance_table() -> str:
    """The table of docs/orders.md: `mean_distance` and `neighbours_together` on the grid of 64 x 64."""
    lines = ["| w | row-major | snake | hilbert |", "| ---: | ---: | ---: | ---: |"]
    for length in LENGTHS:
        row = [
            f"{mean_distance(visited(order, cells(GRID)), length):.2f} · {neighbours_together(order, GRID, length):.1%}"
            for _, order in ORDERS
        ]
        lines.append(f"| {length} | {' | '.join(row)} |")
    return "\n".join(lines)


def cost_table() -> str:
    """The table of times of docs/orders.md, from the committed result of benchmarks/orders.py."""
    rows = json.loads(COSTS.read_text(encoding="utf-8"))["rows"]
    worst = {(row["what"], row["kind"]): f"{row['worst_s']:.2f} s" for row in rows}
    lines = ["| tokens | snake | hilbert |", "| --- | ---: | ---: |"]
    for what in dict.fromkeys(what for what, _ in worst):
        lines.append(f"| {what.replace(' x ', ' × ')} | {worst[what, 'snake']} | {worst[what, 'hilbert']} |")
    return "\n".join(lines)


def seen(
    length: int,
    branches: Iterable[tuple[int, int]],
    *,
    heads: int = 1,
    head_offset: str | Tensor = "zero",
    queries: str = "dilated",
    order: TokenOrder | None = None,
    is_causal: bool = False,
) -> Tensor:
    """int64 (branches, H, N, N): how often a query token (row) sees a key token, by branch, asked of the oracle.

    With q = 0 every key that a query sees weighs exp(0) = 1, and with rows of the identity as v what comes out is, but
    for the denominator exp(lse), the list of these keys.
    """
    q = torch.zeros(1, length, heads, length, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64)[None, :, None].expand_as(q)
    counts = []
    for branch, (segment_length, rate) in enumerate(branches):
        out, lse = reference.dilated_attention(
            *(q, q, v, [segment_length], [rate]),
            queries=queries,
            head_offset=head_offset if isinstance(head_offset, str) else head_offset[branch : branch + 1],
            order=None if order is None else order.indices(length),
            is_causal=is_causal,
        )
        counts.append((out[0].transpose(0, 1) * lse[0, :, :, None].exp()).round().long())
    return torch.stack(counts)


def slide() -> Tensor:
    """int64 (N, 2): the patches of a tissue section with a hole, as a file lists them: row by row."""
    row, column = cells((56, 88)).double().unbind(1)
    y, x = (row - 28) / 26, (column - 43) / 42
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    outline = 0.86 + 0.10 * torch.sin(3 * angle + 0.5) + 0.06 * torch.sin(7 * angle)
    hole = torch.hypot(x - 0.28, 1.3 * (y + 0.15)) < 0.17
    return torch.stack((row, column), dim=1)[(radius < outline) & ~hole].long()


# How it is drawn


def panels(
    titles: Sequence[str], width: float, height: float, rows: int = 1, projection: str | None = None
) -> tuple[Figure, list[Axes]]:
    """Axes in rows, each with its title, the size of one in inches."""
    columns = len(titles) // rows
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": projection}).flat)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    figure.draw_without_rendering()  # lays them out: the width of a curve goes by their size
    return figure, axes


def squares(ax: Axes, places: Tensor, colour: str, side: float) -> None:
    """A square at each (row, column), as one outline."""
    corners = torch.tensor([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * side / 2
    outlines = [Outline(corner, closed=False) for corner in (places.flip(1)[:, None] + corners).numpy()]
    if outlines:
        ax.add_patch(PathPatch(Outline.make_compound_path(*outlines), color=colour, linewidth=0))


def board(ax: Axes, rows: int, columns: int) -> None:
    """Empty cells, rows downwards."""
    right, bottom = columns - 0.5, rows - 0.5
    ax.set(xlim=(-0.5, right), ylim=(bottom, -0.5), aspect="equal", facecolor=GROUND, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.hlines([row - 0.5 for row in range(1, rows)], -0.5, right, color="white", linewidth=0.8, zorder=0)
    ax.vlines([column - 0.5 for column in range(1, columns)], -0.5, bottom, color="white", linewidth=0.8, zorder=0)


def marks(ax: Axes, by_branch: Tensor, colours: Sequence[str] = BRANCH_COLOURS) -> None:
    """Squares on a board where (branches, rows, columns) is not 0, those of later branches inside of earlier ones."""
    for shown, colour, side in zip(by_branch, colours, BRANCH_SIDES, strict=False):
        squares(ax, shown.nonzero(), colour, side)


def legend(figure: Figure, labels: Sequence[str], colours: Sequence[str] = BRANCH_COLOURS) -> None:
    """What the colours mean, below."""
    handles = [PathPatch(Outline([(0, 0)]), color=colour, linewidth=0) for colour in colours[: len(labels)]]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def names(branches: Sequence[tuple[int, int]]) -> list[str]:
    """Of branches, for a legend."""
    return [f"w = {segment_length}, r = {rate}" for segment_length, rate in branches]


def matrices(
    titles: Sequence[str], shown: Sequence[Tensor], rows: int = 1, colours: Sequence[str] = BRANCH_COLOURS
) -> Figure:
    """Boards of queries (rows) against keys (columns), each (branches, queries, keys)."""
    figure, axes = panels(titles, 3.3, 3.5, rows)
    for ax, by_branch in zip(axes, shown, strict=True):
        board(ax, *by_branch.shape[1:])
        marks(ax, by_branch, colours)
    name_axes(axes, rows, "key token", "query token")
    return figure


def name_axes(axes: Sequence[Axes], rows: int, across: str, down: str) -> None:
    """Only at the left and below."""
    columns = len(axes) // rows
    for ax in axes[-columns:]:
        ax.set_xlabel(across)
    for ax in axes[::columns]:
        ax.set_ylabel(down)


# The figures


def orders() -> Picture:
    """Segments of three orders over a grid of 64 x 64."""
    segment_length = 256
    walks = [visited(order, cells(GRID)) for _, order in ORDERS]

    def draw() -> Figure:
        titles = [
            f"{name}: mean distance {mean_distance(walk, segment_length):.2f}"
            for (name, _), walk in zip(ORDERS, walks, strict=True)
        ]
        figure, axes = panels(titles, 4.0, 4.2)
        for ax, (_, order) in zip(axes, ORDERS, strict=True):
            drawn = order or TokenOrder.from_permutation(range(len(walks[0])))
            drawn.plot(len(walks[0]), segment_length=segment_length, coords=cells(GRID), ax=ax)
        return figure

    return Picture(tuple(walks), draw)


def volume() -> Picture:
    """Snake and Hilbert curve through a box."""
    grid, segment_length = (8, 8, 8), 64
    chosen = [TokenOrder(kind, grid) for kind in ("snake", "hilbert")]
    walks = [visited(order, cells(grid)) for order in chosen]

    def draw() -> Figure:
        titles = [
            f"{order.kind}: mean distance {mean_distance(walk, segment_length):.2f}"
            for order, walk in zip(chosen, walks, strict=True)
        ]
        figure, axes = panels(titles, 5.5, 5.2, projection="3d")
        for ax, order, walk in zip(axes, chosen, walks, strict=True):
            order.plot(len(walk), segment_length=segment_length, ax=ax)
        return figure

    return Picture(tuple(walks), draw)


def points() -> Picture:
    """Patches of a tissue section: as the file lists them, and along the curve."""
    coords, segment_length = slide(), 128
    chosen = {
        "as listed": TokenOrder.from_permutation(range(len(coords))),
        "from_coordinates": TokenOrder.from_coordinates(coords),
    }
    walks = [visited(order, coords) for order in chosen.values()]

    def draw() -> Figure:
        titles = [
            f"{name}: mean distance {mean_distance(walk, segment_length):.2f}"
            for name, walk in zip(chosen, walks, strict=True)
        ]
        figure, axes = panels(titles, 6.0, 4.2)
        for ax, order in zip(axes, chosen.values(), strict=True):
            order.plot(len(coords), segment_length=segment_length, coords=coords, ax=ax)
        return figure

    return Picture((coords, *walks), draw)


def queries() -> Picture:
    """Who asks."""
    length, branches = 22, [(8, 2)]
    shown = [
        seen(length, branches)[:, 0],
        seen(length, branches, queries="all")[:, 0],
        seen(length, branches, queries="all", is_causal=True)[:, 0],
    ]
    titles = ['queries="dilated"', 'queries="all"', 'queries="all", is_causal=True']
    return Picture(tuple(shown), lambda: matrices(titles, shown))


def offsets() -> Picture:
    """Which steps each head keeps."""
    length, heads, branches = 24, 6, [(10, 4), (24, 2)]
    groups = torch.tensor([[0, 1, 2, 3, -1, -1], [-1, -1, -1, -1, 0, 1]])
    rules: dict[str, str | Tensor] = {'"cyclic"': "cyclic", '"blocked"': "blocked", '"zero"': "zero", "a table": groups}
    shown = []
    for rule in rules.values():
        used = branches if isinstance(rule, Tensor) else branches[:1]
        shown.append(seen(length, used, heads=heads, head_offset=rule).amax(2))  # a key that some query sees

    def draw() -> Figure:
        figure, axes = panels([f"head_offset: {name}" for name in rules], 5.5, 1.7, rows=2)
        for ax, kept in zip(axes, shown, strict=True):
            board(ax, heads, length)
            marks(ax, kept)
        name_axes(axes, 2, "token", "head")
        legend(figure, names(branches))
        return figure

    return Picture(tuple(shown), draw)


def multiset() -> Picture:
    """Three branches as one softmax."""
    length, heads, branches = 24, 4, [(6, 1), (12, 2), (24, 4)]
    by_head = seen(length, branches, heads=heads, head_offset="cyclic").unbind(1)

    def draw() -> Figure:
        figure = matrices([f"head {head}" for head in range(heads)], by_head, rows=2)
        legend(figure, names(branches))
        return figure

    return Picture(tuple(by_head), draw)


def causal() -> Picture:
    """Orders under is_causal, in token order."""
    grid, branches = (6, 6), [(9, 1)]
    chosen = {"no order": None, "snake": TokenOrder("snake", grid), "hilbert": TokenOrder("hilbert", grid)}
    shown = [
        torch.cat([seen(36, branches, order=order, is_causal=how)[:, 0] for how in (False, True)])
        for order in chosen.values()
    ]

    def draw() -> Figure:
        figure = matrices(list(chosen), shown, colours=(LIGHT, DARK))
        legend(figure, ["dropped by is_causal=True", "kept"], colours=(LIGHT, DARK))
        return figure

    return Picture(tuple(shown), draw)


def on_the_grid() -> Picture:
    """The keys of one query token, where they lie."""
    grid, branches, query = (16, 16), [(16, 1), (64, 2), (256, 4)], 16 * 6 + 9
    chosen = {
        "row-major": (None, False),
        "snake": (TokenOrder("snake", grid), False),
        "hilbert": (TokenOrder("hilbert", grid), False),
        "hilbert, is_causal=True": (TokenOrder("hilbert", grid), True),
    }
    shown = [
        seen(256, branches, queries="all", order=order, is_causal=is_causal)[:, 0, query].view(-1, *grid)
        for order, is_causal in chosen.values()
    ]

    def draw() -> Figure:
        figure, axes = panels(list(chosen), 3.0, 3.6)
        for ax, keys in zip(axes, shown, strict=True):
            board(ax, *grid)
            marks(ax, keys)
            row, column = divmod(query, grid[1])
            ax.plot([column], [row], marker="*", markersize=13, color="white", markeredgecolor=INK)
        legend(figure, names(branches))
        return figure

    return Picture(tuple(shown), draw)


FIGURES = (orders, volume, points, queries, offsets, multiset, causal, on_the_grid)


def path(figure: Callable[[], Picture]) -> Path:
    """Where a figure is committed."""
    return FOLDER / f"{figure.__name__}.svg"


def stale() -> list[str]:
    """Committed figures that are missing or show other data than the package computes now."""
    return [
        path(figure).name
        for figure in FIGURES
        if not path(figure).is_file() or f"data {figure().digest}" not in path(figure).read_text(encoding="utf-8")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, or check."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say which figures are out of date")
    if parser.parse_args(arguments).check:
        for name in (found := stale()):
            print(f"{FOLDER.name}/{name} is out of date: python -m docs.figures", file=sys.stderr)
        return bool(found)
    FOLDER.mkdir(exist_ok=True)
    for figure in FIGURES:
        path(figure).write_text(figure().svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
