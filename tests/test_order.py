"""Token orders: permutations, curves that leap nowhere, coordinates, and values that behave like values."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import order as order_module
from dilated_attention_pytorch.errors import ArgumentTypeError, OrderError
from dilated_attention_pytorch.order import TokenOrder, as_order, create_hilbert_mapping

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tables of some hundred cells are not worth a second thread, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cells(order: TokenOrder, grid: tuple[int, ...]) -> Tensor:
    """(N, axes): the coordinates of the cell visited at each step of a full grid."""
    rest = order.indices(math.prod(grid))
    columns = []
    for side in reversed(grid):
        columns.append(rest % side)
        rest = rest // side
    return torch.stack(columns[::-1], dim=1)


def grid_cells(grid: tuple[int, ...]) -> Tensor:
    """(N, axes): all cells of a grid, row-major."""
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid))


def leaps(grid: tuple[int, ...]) -> tuple[int, int]:
    """Steps that lead to no face neighbour, and the longest step along any axis, of a walk through every cell once."""
    order, number = TokenOrder("hilbert", grid), math.prod(grid)
    assert (order.indices(number).bincount(minlength=number) == 1).all()
    moved = cells(order, grid).diff(dim=0).abs()
    return int((moved.sum(1) != 1).sum()), int(moved.max()) if len(moved) else 0


def mean_diameter(grid: tuple[int, ...], run: int) -> float:
    """The mean distance of the two furthest cells in runs of consecutive cells."""
    visited = cells(TokenOrder("hilbert", grid), grid).float()
    # Every seventh run: a stride of 2, 4 or 8 would meet the curve's own blocks, whole or halved.
    starts = torch.arange(0, len(visited) - run + 1, 7)
    windows = visited[starts[:, None] + torch.arange(run)]
    return float(torch.cdist(windows, windows).amax((1, 2)).mean())


def textbook_hilbert(x: int, y: int, bits: int) -> int:
    """The place of a point on Hilbert's curve of a square of side 2^bits, as textbooks compute it."""
    place = 0
    for bit in reversed(range(bits)):
        right, up = x >> bit & 1, y >> bit & 1
        place = 4 * place + (3 * right ^ up)
        if up == 0:
            if right == 1:
                x, y = ~x, ~y
            x, y = y, x
    return place


def textbook_orders(points: list[tuple[int, int]], bits: int) -> list[list[int]]:
    """The points along that curve, for each of the square's eight symmetries."""
    top = (1 << bits) - 1
    orders = []
    for flip_x, flip_y, swap in itertools.product((False, True), repeat=3):
        places = []
        for x, y in points:
            x, y = (top - x if flip_x else x), (top - y if flip_y else y)
            places.append(textbook_hilbert(y, x, bits) if swap else textbook_hilbert(x, y, bits))
        orders.append(sorted(range(len(points)), key=places.__getitem__))
    return orders


ORDERS = st.builds(
    TokenOrder,
    st.sampled_from(["snake", "hilbert"]),
    st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    st.integers(0, 5),
)


# Permutations


@given(ORDERS, st.integers(0, 200))
@settings(deadline=None, max_examples=150)
def test_every_token_is_visited_once_and_the_prefix_first(order: TokenOrder, cells: int) -> None:
    """A token visited twice or never; a class token lost in the curve; an inverse that is the forward map."""
    length = order.prefix + (cells if order.grid is None else math.prod(order.grid))
    tokens = order.indices(length)
    assert tokens.dtype == torch.int64 and tokens.shape == (length,)
    assert torch.equal(tokens.sort().values, torch.arange(length))
    assert torch.equal(tokens[: order.prefix], torch.arange(order.prefix))
    assert torch.equal(order.inverse(length)[tokens], torch.arange(length))
    assert torch.equal(order.index(length, CPU), tokens.to(torch.int32))


def test_a_permutation_maps_steps_to_tokens() -> None:
    """The two directions swapped: invisible on a snake, which is its own inverse."""
    order = TokenOrder.from_permutation([2, 0, 1, 3])
    assert order.indices(4).tolist() == [2, 0, 1, 3]
    assert order.inverse(4).tolist() == [1, 2, 0, 3]


# Snakes


@given(st.integers(0, 150), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_snake_without_a_grid_is_the_formula_in_loops(cells: int, prefix: int) -> None:
    """A row width rounded down, or a cut-off last row that runs backwards through cells that do not exist."""
    width = math.ceil(math.sqrt(cells))
    expected = list(range(prefix))
    for number, start in enumerate(range(0, cells, max(width, 1))):
        row = list(range(start, min(start + width, cells)))
        expected += [prefix + cell for cell in (row if number % 2 == 0 else reversed(row))]
    order = TokenOrder("snake", prefix=prefix)
    assert order.indices(prefix + cells).tolist() == expected
    assert order.row_width(prefix + cells) == max(width, 1)


def test_snake_turns_rows_and_layers() -> None:
    """A layer that is not walked backwards leaps from its far end to its start."""
    assert TokenOrder("snake", (3, 4), prefix=1).indices(13).tolist() == [0, 1, 2, 3, 4, 8, 7, 6, 5, 9, 10, 11, 12]
    assert TokenOrder("snake", (2, 3, 2)).indices(12).tolist() == [0, 1, 3, 2, 4, 5, 11, 10, 8, 9, 7, 6]
    for grid in itertools.product(range(1, 6), repeat=3):
        moved = cells(TokenOrder("snake", grid), grid).diff(dim=0).abs()
        assert (moved.sum(1) == 1).all(), grid


@pytest.mark.parametrize("kind", ["snake", "hilbert"])
def test_one_row_is_the_identity(kind: str) -> None:
    """A one-dimensional grid has nothing to turn."""
    assert torch.equal(TokenOrder(kind, (7,), prefix=2).indices(9), torch.arange(9))


def snake_token(step: int, width: int, prefix: int, length: int) -> int:
    """What a kernel computes from `row_width`."""
    if step < prefix:
        return step
    row, column = divmod(step - prefix, width)
    start = prefix + row * width
    return start + column if row % 2 == 0 else min(start + width, length) - 1 - column


@pytest.mark.parametrize("grid", [None, (7,), (5, 3), (3, 5), (1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1)])
@pytest.mark.parametrize("prefix", [0, 3])
def test_row_width_is_all_a_kernel_needs(grid: tuple[int, ...] | None, prefix: int) -> None:
    """A kernel that computes the snake while the oracle reads another one."""
    order = TokenOrder("snake", grid, prefix)
    length = prefix + (math.prod(grid) if grid else 23)
    width = order.row_width(length)
    assert width is not None
    assert [snake_token(step, width, prefix, length) for step in range(length)] == order.indices(length).tolist()


def test_row_width_is_none_where_no_formula_holds() -> None:
    """A plan would compute a snake where another order was asked for."""
    assert TokenOrder("snake", (2, 3, 2)).row_width(12) is None
    assert TokenOrder("hilbert").row_width(12) is None
    assert TokenOrder.from_permutation([1, 0]).row_width(2) is None


# Hilbert curves


def assert_rectangle_breaks_no_step(grid: tuple[int, int]) -> None:
    broken, longest = leaps(grid)
    # Only an odd side much longer than an even one needs a diagonal step.
    long, short = max(grid), min(grid)
    needs_one = long % 2 == 1 and short % 2 == 0 and 2 * long > 3 * short
    assert broken <= int(needs_one) and longest <= 1, grid


def test_rectangles_have_at_most_one_diagonal_step() -> None:
    """Cuts at odd sizes make a curve leap, and a leap in a small part is copied into every larger one."""
    for grid in itertools.product(range(1, 22), repeat=2):
        assert_rectangle_breaks_no_step(grid)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_larger_rectangles_have_at_most_one_diagonal_step(rows: int, columns: int) -> None:
    """A cut that only larger rectangles meet."""
    assert_rectangle_breaks_no_step((rows, columns))


def test_boxes_have_at_most_one_diagonal_step_and_even_ones_none() -> None:
    """As for rectangles; the published curve leaps in boxes with odd sides."""
    for grid in itertools.product(range(1, 8), repeat=3):
        broken, longest = leaps(grid)
        assert broken <= (0 if all(side % 2 == 0 for side in grid) else 1) and longest <= 1, grid


def test_larger_even_boxes_break_no_step() -> None:
    """A cut with an odd side, one level down."""
    for grid in itertools.combinations_with_replacement(range(8, 21, 2), 3):
        assert leaps(grid) == (0, 1), grid


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3).map(tuple))
@settings(deadline=None, max_examples=25)
def test_larger_boxes_leap_nowhere(grid: tuple[int, ...]) -> None:
    """A cut that only larger boxes meet."""
    broken, longest = leaps(grid)
    longest_side = max(grid)
    avoidable = longest_side % 2 == 0 or all(side % 2 for side in grid)
    assert broken <= (0 if avoidable else 1) and longest <= 1


@pytest.mark.parametrize(
    "grid", [(17, 15, 19), (17, 11, 13), (31, 8, 9), (9, 5, 5), (5, 21, 9), (33, 47), (21, 13), (14, 25), (5, 52)]
)
def test_odd_boxes_stay_as_compact_as_even_ones(grid: tuple[int, ...]) -> None:
    """Rows walked up and down would pass every neighbour test and keep nothing together."""
    even = [[side] if side % 2 == 0 else [side - 1, side + 1] for side in grid]
    for run in (8, 16, 64):
        nearest = min(mean_diameter(box, run) for box in itertools.product(*even))
        assert mean_diameter(grid, run) <= 1.2 * nearest


def test_even_boxes_are_compact() -> None:
    """The test above compares the curve with itself: 64 cells of a square span about 8 x 8, of a cube 4 x 4 x 4."""
    assert mean_diameter((64, 64), 64) < 1.45 * 8 * math.sqrt(2)
    assert mean_diameter((32, 32, 32), 64) < 1.6 * 4 * math.sqrt(3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_curve_of_a_square_is_hilberts(bits: int) -> None:
    """A curve of unit steps that is not Hilbert's."""
    points = [(x, y) for y in range(1 << bits) for x in range(1 << bits)]
    order = TokenOrder("hilbert", (1 << bits, 1 << bits))
    assert order.indices(len(points)).tolist() in textbook_orders(points, bits)


@pytest.mark.parametrize("length", [2, 3, 5, 7, 12, 31, 57, 1021])
def test_a_cut_off_grid_leaves_cells_out_of_the_full_curve(length: int) -> None:
    """Tokens renumbered after the cut, or a curve of a smaller grid."""
    width = math.ceil(math.sqrt(length))
    grid = (math.ceil(length / width), width)
    full = TokenOrder("hilbert", grid).indices(math.prod(grid))
    assert TokenOrder("hilbert").indices(length).tolist() == [token for token in full.tolist() if token < length]


# Coordinates


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (64, 64), (128, 128), (2, 2, 2), (8, 8, 8), (32, 32, 32)])
@pytest.mark.parametrize("shift", [0, -1000])
def test_coordinates_of_a_whole_square_or_cube_follow_the_grids_curve(grid: tuple[int, ...], shift: int) -> None:
    """Two curves in one package, axes swapped, or leading zero bits that turn the curve."""
    order = TokenOrder.from_coordinates(grid_cells(grid) + shift)
    assert torch.equal(order.indices(math.prod(grid)), TokenOrder("hilbert", grid).indices(math.prod(grid)))


@pytest.mark.parametrize("grid", [(5, 7), (7, 4), (3, 4, 5), (1, 3, 2), (6, 1)])
def test_snake_coordinates_follow_the_grids_snake(grid: tuple[int, ...]) -> None:
    """Rows and layers turned in the wrong sequence."""
    order = TokenOrder.from_coordinates(grid_cells(grid) - 3, kind="snake")
    assert torch.equal(order.indices(math.prod(grid)), TokenOrder("snake", grid).indices(math.prod(grid)))


def test_fine_coordinates_follow_the_textbooks_curve() -> None:
    """A look-up table that joins its digits wrongly: whole small squares fit one digit."""
    top = (1 << 21) - 1
    points = [(0, 0), (top, top), *(tuple(point) for point in torch.randint(0, top, (300, 2)).tolist())]
    order = TokenOrder.from_coordinates(torch.tensor(points))
    assert order.indices(len(points)).tolist() in textbook_orders(points, bits=21)


@pytest.mark.parametrize("corner", [(0, 0, 0), (5 << 17, 3 << 9, 9 << 15), (2**21 - 8, 8, 2**20 - 8)])
def test_fine_blocks_of_space_are_walked_without_a_leap(corner: tuple[int, int, int]) -> None:
    """As above in three dimensions: an aligned block of 8 x 8 x 8 is one piece of the curve, digits or not."""
    block = grid_cells((8, 8, 8)) + torch.tensor(corner)
    extremes = torch.tensor([[0, 0, 0], [2**21 - 1] * 3])
    points = torch.cat((extremes, block))
    tokens = TokenOrder.from_coordinates(points).indices(len(points))
    walked = points[tokens[tokens >= 2]]
    assert (walked.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("kind", ["snake", "hilbert"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_points_of_one_cell_keep_their_sequence(kind: str, dtype: torch.dtype) -> None:
    """An unstable sort gives another order on every machine."""
    points = torch.randint(-4, 4, (2000, 2)).to(dtype)
    visited = TokenOrder.from_coordinates(points, kind).indices(2000)
    same_cell = (points[visited].diff(dim=0) == 0).all(1)
    assert (visited.diff()[same_cell] > 0).all()
    assert int(same_cell.sum()) == 2000 - len(points.unique(dim=0))


def test_the_sequence_of_points_does_not_move_the_curve() -> None:
    """An order that depends on how a file lists its patches."""
    points = torch.randperm(10_000)[:700]
    points = torch.stack((points // 100, points % 100), dim=1)
    shuffled = points[torch.randperm(700)]
    first, second = (p[TokenOrder.from_coordinates(p).indices(700)] for p in (points, shuffled))
    assert torch.equal(first, second)


def test_widest_coordinates_and_none() -> None:
    """Codes that overflow 63 bits, and the minimum of nothing."""
    top = 2**21 - 1
    points = torch.tensor([[top, top, top], [0, 0, 0], [top, 0, 0]]) - 2**62
    assert TokenOrder.from_coordinates(points, "snake").indices(3).tolist() == [1, 0, 2]
    assert TokenOrder.from_coordinates(points).indices(3)[0] == 1
    assert TokenOrder.from_coordinates(torch.empty(0, 3, dtype=torch.int32)).indices(0).tolist() == []


# Refusals


@pytest.mark.parametrize(
    ("permutation", "sentence"),
    [
        ([0, 1, 3], "position 2 holds 3"),
        ([0, -1, 2], "position 1 holds -1"),
        ([2, 0, 0, 2], "position 2 holds 0 again"),
        ([0.0, 1.0], "must hold integers, got torch.float32"),
        ([True, False], "must hold integers, got torch.bool"),
        ([[0, 1]], r"must have shape \(N,\), got \(1, 2\)"),
        (torch.tensor(0), r"must have shape \(N,\), got \(\)"),
        (torch.tensor([0, 2**32 + 1]), "position 1 holds 4294967297"),
    ],
)
def test_no_permutation_is_refused(permutation: object, sentence: str) -> None:
    """A kernel would read outside its tensors. The sentence names the first fault."""
    with pytest.raises(OrderError, match=sentence):
        TokenOrder.from_permutation(permutation)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("zigzag",), OrderError, "kind must be one of snake, hilbert, got 'zigzag'"),
        (("explicit",), OrderError, "TokenOrder.from_permutation"),
        (("snake", (3, 0)), OrderError, "sides of at least 1"),
        (("snake", (-2, 4)), OrderError, "sides of at least 1"),
        (("snake", ()), OrderError, "1 to 3 sides"),
        (("snake", (2, 2, 2, 2)), OrderError, "1 to 3 sides"),
        (("snake", 16), ArgumentTypeError, "grid must be a tuple"),
        (("snake", "44"), ArgumentTypeError, "grid must be a tuple"),
        (("snake", (2.0, 3)), ArgumentTypeError, "a side of grid must be an integer, got 2.0"),
        (("snake", (True, 3)), ArgumentTypeError, "got True"),
        (("snake", None, -1), OrderError, "prefix must be at least 0, got -1"),
        (("snake", None, 1.5), ArgumentTypeError, "prefix must be an integer, got 1.5"),
    ],
)
def test_nonsense_grids_are_refused(arguments: tuple[object, ...], error: type[Exception], sentence: str) -> None:
    """A grid of no cells would divide by zero in a kernel."""
    with pytest.raises(error, match=sentence):
        TokenOrder(*arguments)


@pytest.mark.parametrize(
    ("order", "length", "sentence"),
    [
        (TokenOrder("snake", (3, 4), prefix=1), 12, r"grid \(3, 4\) with prefix 1 holds 12 \+ 1 = 13 tokens"),
        (TokenOrder("hilbert", prefix=5), 4, "prefix 5 exceeds the sequence length 4"),
        (TokenOrder.from_permutation([1, 0]), 3, "permutes 2 tokens, but there are 3"),
        (TokenOrder("snake"), -1, r"must lie in 0..2\^31-1, got -1"),
        (TokenOrder("snake"), 2**31, r"must lie in 0..2\^31-1"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(order: TokenOrder, length: int, sentence: str) -> None:
    """An order of another image size would silently read other tokens."""
    for ask in (order.check, order.indices, order.inverse, order.row_width, lambda n: order.index(n, CPU)):
        with pytest.raises(OrderError, match=sentence):
            ask(length)


@pytest.mark.parametrize(
    ("coords", "error", "sentence"),
    [
        (torch.rand(5, 2), OrderError, "must hold integers, got torch.float32"),
        (torch.ones(5, 2, dtype=torch.bool), OrderError, "must hold integers, got torch.bool"),
        (torch.zeros(5, 4, dtype=torch.int64), OrderError, r"\(N, 2\) or \(N, 3\), got \(5, 4\)"),
        (torch.zeros(5, dtype=torch.int64), OrderError, r"\(N, 2\) or \(N, 3\), got \(5,\)"),
        (torch.tensor([[0, 0], [2**21, 0]]), OrderError, "divide them by a cell size"),
        (torch.tensor([[-(2**63), 0], [2**63 - 1, 0]]), OrderError, "got 18446744073709551615"),
        ([[0, 0]], ArgumentTypeError, "got list"),
    ],
)
def test_nonsense_coordinates_are_refused(coords: object, error: type[Exception], sentence: str) -> None:
    """Coordinates in micrometres, or fractions, that would be cut to wrong cells."""
    with pytest.raises(error, match=sentence):
        TokenOrder.from_coordinates(coords)


# Values


SOME_ORDERS = [
    TokenOrder("snake"),
    TokenOrder("hilbert"),
    TokenOrder("hilbert", (4, 3)),
    TokenOrder("hilbert", (3, 4)),
    TokenOrder("hilbert", (12,), prefix=0),
    TokenOrder("hilbert", (11,), prefix=1),
    TokenOrder.from_permutation(list(range(12))),
    TokenOrder.from_permutation(list(reversed(range(12)))),
]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda order: pickle.loads(pickle.dumps(order))])
def test_orders_are_values(duplicate: object) -> None:
    """A copied module would get other plans, and a data loader's worker could not send an order."""
    copies = [duplicate(order) for order in SOME_ORDERS]
    for (i, order), (j, other) in itertools.product(enumerate(SOME_ORDERS), enumerate(copies)):
        assert (order == other) == (i == j)
    assert len({*SOME_ORDERS, *copies}) == len(SOME_ORDERS)
    assert all(torch.equal(a.indices(12), b.indices(12)) for a, b in zip(SOME_ORDERS, copies, strict=True))


def test_caches_are_not_pickled() -> None:
    """A checkpoint that grows with the lengths seen."""
    order = TokenOrder.from_permutation(torch.randperm(1000))
    before = len(pickle.dumps(order))
    order.index(1000, CPU)
    order.index(1000, torch.device("meta"))
    assert len(pickle.dumps(order)) == before


def test_an_order_cannot_be_changed() -> None:
    """A cached plan would go on with the old order."""
    with pytest.raises(AttributeError):
        TokenOrder("snake").kind = "hilbert"  # type: ignore[misc]
    given_grid = [4, 3]
    order = TokenOrder("snake", given_grid)  # type: ignore[arg-type]
    given_grid[0] = 5
    assert order == TokenOrder("snake", (4, 3))
    assert repr(order) == "TokenOrder('snake', grid=(4, 3), prefix=0)"
    assert repr(TokenOrder.from_permutation([1, 0])) == "TokenOrder.from_permutation(<2 tokens>)"


@pytest.mark.parametrize("order", [TokenOrder("hilbert"), TokenOrder.from_permutation(list(reversed(range(12))))])
def test_results_are_the_callers_own(order: TokenOrder) -> None:
    """An edit of a returned tensor that reaches the cache, and every later call."""
    expected = order.indices(12).tolist()
    order.indices(12).zero_()
    order.inverse(12).zero_()
    if order.kind == "hilbert":
        create_hilbert_mapping(12, "hilbert").zero_()
    assert order.indices(12).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_later_edits_of_a_permutation_change_nothing(dtype: torch.dtype) -> None:
    """An int32 tensor on the CPU is what the order stores: it must be a copy all the same."""
    permutation = torch.tensor([2, 0, 1], dtype=dtype)
    order = TokenOrder.from_permutation(permutation)
    permutation.zero_()
    assert order.indices(3).tolist() == [2, 0, 1]


def test_inference_mode_leaves_nothing_behind() -> None:
    """Tensors made in inference mode and cached cannot be saved for a backward later."""
    with torch.inference_mode():
        orders = [TokenOrder("hilbert", (17, 3)), TokenOrder.from_permutation(torch.arange(51))]
        for order in orders:
            order.index(51, CPU)
    assert not any(order.index(51, CPU).is_inference() for order in orders)


def test_a_default_device_moves_nothing() -> None:
    """Models are built under `torch.device("meta")`; their orders must still hold numbers."""
    with torch.device("meta"):
        orders = [TokenOrder("hilbert"), TokenOrder("snake"), TokenOrder.from_permutation(list(range(39)))]
        orders.append(TokenOrder.from_coordinates(torch.zeros(39, 2, dtype=torch.int64, device="cpu")))
        assert all(order.inverse(39).sort().values.tolist() == list(range(39)) for order in orders)


# Caches


def test_threads_share_one_table() -> None:
    """Two threads that both build a table and keep different ones."""
    order = TokenOrder("hilbert", (53, 47))
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: order.index(53 * 47, CPU), range(64)))
    assert all(table is tables[0] for table in tables)
    assert torch.equal(tables[0].sort().values, torch.arange(53 * 47, dtype=torch.int32))


def test_the_cache_is_bounded() -> None:
    """Training on ragged lengths would fill the memory of the GPU."""
    order = TokenOrder("snake", prefix=1)
    first = order.index(100, CPU)
    for length in range(101, 101 + order_module.CACHED_TABLES):
        order.index(length, CPU)
    assert order.index(100, CPU) is not first


def test_as_order_takes_all_that_the_function_takes() -> None:
    """Words and values that reach a plan unread."""
    order = TokenOrder("hilbert", (2, 3))
    assert as_order(None) is None
    assert as_order(order) is order
    assert as_order("snake") == TokenOrder("snake")
    assert as_order(torch.tensor([1, 0])) == TokenOrder.from_permutation([1, 0])
    with pytest.raises(OrderError, match="'snake', 'hilbert', a TokenOrder or a tensor, got 'zigzag'"):
        as_order("zigzag")
    with pytest.raises(ArgumentTypeError, match="got list; TokenOrder"):
        as_order([1, 0])  # type: ignore[arg-type]
    with pytest.raises(OrderError, match="position 1 holds 1 again"):
        as_order(torch.tensor([1, 1]))


def test_a_tensor_is_checked_again_only_after_an_edit() -> None:
    """A check at every call waits for the GPU; a check never repeated misses an edit."""
    tensor = torch.tensor([2, 0, 1])
    order = as_order(tensor)
    assert as_order(tensor) is order
    tensor.copy_(torch.tensor([1, 2, 0]))
    assert as_order(tensor) == TokenOrder.from_permutation([1, 2, 0])
    tensor[0] = 7
    with pytest.raises(OrderError, match="position 0 holds 7"):
        as_order(tensor)
    with torch.inference_mode():
        assert as_order(torch.tensor([0, 1])) == TokenOrder.from_permutation([0, 1])


def test_a_dropped_tensor_leaves_the_cache() -> None:
    """Memory of every order ever passed, or the order of a dead tensor given to a new one at its address."""
    before = len(order_module._SEEN)
    tensor = torch.arange(5)
    as_order(tensor)
    assert len(order_module._SEEN) == before + 1
    del tensor
    gc.collect()
    assert len(order_module._SEEN) == before


def test_nothing_new_is_made_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronisation under capture breaks it with a message about something else."""
    order, ready, tensor = TokenOrder("hilbert", (7, 9)), TokenOrder("hilbert", (9, 7)), torch.arange(63)
    table = ready.index(63, CPU)
    monkeypatch.setattr(order_module, "_is_capturing", lambda device: True)
    monkeypatch.setattr(order_module, "_CAPTURED", {})
    with pytest.raises(OrderError, match="run the same call once before the capture"):
        order.index(63, CPU)
    with pytest.raises(OrderError, match="run the same call once before the capture"):
        as_order(tensor)
    assert ready.index(63, CPU) is table
    # A replay reads this memory: it must outlive the cache's entry.
    assert list(order_module._CAPTURED.values()) == [table]


# The client's function, and speed


@pytest.mark.parametrize("length", [0, 1, 2, 10, 1000])
def test_create_hilbert_mapping_is_the_snake(length: int) -> None:
    """The function's old users get another map, or another dtype."""
    mapping = create_hilbert_mapping(length)
    assert mapping.dtype == torch.int32
    assert mapping.tolist() == TokenOrder("snake").indices(length).tolist()
    assert create_hilbert_mapping(length, kind="hilbert").tolist() == TokenOrder("hilbert").indices(length).tolist()
    with pytest.raises(OrderError, match="got -3"):
        create_hilbert_mapping(-3)


A_MILLION = pytest.mark.parametrize(
    ("kind", "where"),
    [*itertools.product(["snake", "hilbert"], [(1000, 1000), (997, 1013), (100, 100, 100), (97, 101, 103), 2, 3])],
)
"""Grids, or so many dimensions of random points."""


def order_a_million(kind: str, where: tuple[int, ...] | int, prefix: int) -> None:
    """Another prefix is another order, which no cache knows."""
    if isinstance(where, int):
        points = torch.randint(0, 2**21, (1_000_000, where))
        TokenOrder.from_coordinates(points, kind).indices(len(points))
    else:
        TokenOrder(kind, where, prefix).indices(math.prod(where) + prefix)


@A_MILLION
def test_no_token_is_handled_in_python(kind: str, where: tuple[int, ...] | int) -> None:
    """Work token by token, counted in Python's own instructions: a busy machine makes no more of them."""
    executed = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal executed
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        executed += event == "opcode"
        assert executed < 250_000, "one for every fourth token"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        order_a_million(kind, where, prefix=1)
    finally:
        sys.settrace(before)
    assert executed > 50, "nothing was counted"


@A_MILLION
def test_a_million_tokens_take_no_noticeable_time(kind: str, where: tuple[int, ...] | int) -> None:
    """A slow way without Python's help. It takes 0.03 to 0.2 s of one core (`python -m benchmarks.orders`)."""
    start = time.process_time()
    order_a_million(kind, where, prefix=2)
    assert time.process_time() - start < 2
