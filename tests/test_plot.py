"""`TokenOrder.plot`: the line drawn is the order, its colours are the segments."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from dilated_attention_pytorch._plot import BETWEEN, COLOURS
from dilated_attention_pytorch.errors import ArgumentError, ArgumentTypeError, MissingPackageError, OrderError
from dilated_attention_pytorch.order import TokenOrder

POINTS = torch.tensor([[5, 1], [0, 0], [3, 3], [-2, 7], [4, 4], [1, 0]])


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    """A figure on a screen that is not there, or one left open for the next test."""
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


def drawn(ax: Axes) -> list[tuple[str, list[tuple[float, ...]]]]:
    """(colour, points) of every line but the grey ones between and the dots at the ends; points as row, column."""
    lines = []
    for line in list(ax.lines)[:-2]:
        if not same_color(line.get_color(), BETWEEN):
            along = line.get_data_3d() if ax.name == "3d" else line.get_data()
            lines.append((line.get_color(), [point[::-1] for point in zip(*map(list, along), strict=True)]))
    return lines


@pytest.mark.parametrize("kind", ["snake", "hilbert"])
@pytest.mark.parametrize(
    ("grid", "length"), [((5, 7), 35), ((7,), 7), ((2, 3, 4), 24), (None, 23), (None, 1), ((1, 1), 1), ((1, 3, 1), 3)]
)
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_line_is_the_order(kind: str, grid: tuple[int, ...] | None, length: int, prefix: int) -> None:
    """Rows for columns, the inverse permutation, a cut-off row that is drawn, prefix tokens on the grid."""
    order = TokenOrder(kind, grid, prefix)
    ax = order.plot(length + prefix, segment_length=4)
    sides = grid or (math.ceil(math.sqrt(length)),) * 2
    sides = (1, *sides) if len(sides) == 1 else sides
    places = list(itertools.product(*map(range, sides)))
    expected = [places[token - prefix] for token in order.indices(length + prefix).tolist()[prefix:]]
    assert [point for _, points in drawn(ax) for point in points] == expected
    assert ax.yaxis.get_inverted()


@pytest.mark.parametrize(("prefix", "lengths"), [(0, [5, 5, 5, 1]), (3, [2, 5, 5, 4]), (7, [3, 5, 5, 3])])
def test_colours_are_segments(prefix: int, lengths: list[int]) -> None:
    """Segments counted from the first token drawn and not from step 0, or two that touch in one colour."""
    lines = drawn(TokenOrder("snake", (4, 4), prefix).plot(16 + prefix, segment_length=5))
    assert [len(points) for _, points in lines] == lengths
    assert [colour for colour, _ in lines] == list(COLOURS[prefix // 5 : prefix // 5 + 4])
    one = drawn(TokenOrder("hilbert", (4, 4), prefix).plot(16 + prefix))
    assert [len(points) for _, points in one] == [16]


def test_more_segments_than_colours() -> None:
    """An index out of range at the ninth segment; a segment of one token, which a line without dots leaves out."""
    ax = TokenOrder("hilbert", (3, 5)).plot(15, segment_length=1)
    assert [colour for colour, _ in drawn(ax)] == [COLOURS[step % len(COLOURS)] for step in range(15)]
    assert all(line.get_marker() == "o" for line in ax.lines if not same_color(line.get_color(), BETWEEN))


def test_coordinates_place_any_order() -> None:
    """An explicit order drawn in the sequence of its coordinates."""
    order = TokenOrder.from_coordinates(POINTS)
    expected = [tuple(point) for point in POINTS[order.indices(6)].tolist()]
    for coords in (POINTS, POINTS.double(), POINTS.float().requires_grad_()):
        assert [point for _, points in drawn(order.plot(6, coords=coords)) for point in points] == expected
    in_space = torch.cat((POINTS, POINTS[:, :1] ** 2), dim=1)
    assert TokenOrder.from_coordinates(in_space).plot(6, coords=in_space).name == "3d"


def test_leaps_are_grey() -> None:
    """Row-major drawn as a zigzag of colour that hides the rows."""
    rows = TokenOrder.from_permutation(list(range(12)))
    ax = rows.plot(12, coords=torch.cartesian_prod(torch.arange(3), torch.arange(4)))
    assert [[row for row, _ in points] for _, points in drawn(ax)] == [[0] * 4, [1] * 4, [2] * 4]


@pytest.mark.parametrize("order", [TokenOrder("hilbert"), TokenOrder("snake", prefix=4)])
def test_nothing_to_draw(order: TokenOrder) -> None:
    """The extent of no points, the first of none."""
    assert list(order.plot(order.prefix).lines) == []


def test_given_axes_are_drawn_on() -> None:
    """A second figure beside the caller's, or flat axes that take the layer for a style."""
    flat, deep = Figure().add_subplot(), Figure().add_subplot(projection="3d")
    assert TokenOrder("snake", (2, 3)).plot(6, ax=flat) is flat
    assert TokenOrder("snake", (2, 3, 2)).plot(12, ax=deep) is deep
    assert pyplot.get_fignums() == []
    with pytest.raises(ArgumentError, match="lie in 3 dimensions: ax must be made with projection='3d'"):
        TokenOrder("snake", (2, 3, 2)).plot(12, ax=flat)
    with pytest.raises(ArgumentError, match="lie in 2 dimensions: ax must be made without projection='3d'"):
        TokenOrder("snake", (2, 3)).plot(6, ax=deep)


@pytest.mark.parametrize(
    ("order", "arguments", "error", "sentence"),
    [
        (TokenOrder("snake", (2, 3)), {}, OrderError, r"grid \(2, 3\) with prefix 0 holds 6"),
        (TokenOrder("snake"), {"segment_length": 0}, OrderError, "segment_length must be at least 1, got 0"),
        (TokenOrder("snake"), {"segment_length": 1.5}, ArgumentTypeError, "segment_length must be an integer, got 1.5"),
        (TokenOrder.from_permutation(range(7)), {}, OrderError, r"pass coords, .* torch.cartesian_prod\("),
        (TokenOrder("snake", prefix=2), {"coords": torch.ones(7, 2)}, OrderError, r"shape \(5, 2\) .* got \(7, 2\)"),
        (TokenOrder("snake"), {"coords": torch.ones(7, 4)}, OrderError, r"got \(7, 4\)"),
        (TokenOrder("snake"), {"coords": [[0, 0]] * 7}, ArgumentTypeError, "coords must be a tensor .* got list"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    order: TokenOrder, arguments: dict[str, object], error: type[Exception], sentence: str
) -> None:
    """An IndexError of matplotlib's, or points drawn for other tokens."""
    with pytest.raises(error, match=sentence):
        order.plot(7, **arguments)


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback about a module that the user never asked for."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dilated-attention-kernels\[plot\]'"):
        TokenOrder("snake").plot(4)
