"""The sequence in which tokens are visited: snakes, Hilbert curves, and any other permutation.

An order maps *steps* to tokens: `indices(N)[t]` is the token visited at step t, so `x[:, indices]` is in curve order
and `argsort(indices)` undoes it. On tokens without a natural second dimension a curve changes what attention
computes and has no meaning of its own; it is meant for tokens that lie on a grid or at points of space.
"""

from __future__ import annotations

import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import _plot
from ._curves import COORDINATE_BITS, hilbert_places, hilbert_walk, snake_places, snake_walk
from .errors import ArgumentTypeError, OrderError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = ("snake", "hilbert")
CACHED_TABLES = 32
"""Tables of steps that are kept for orders of curves, over all lengths and devices; 4 bytes a token each."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TokenOrder:
    """A token order, as a value: hashable, comparable, picklable, never changed.

    Attributes:
        kind: "snake" (every second row backwards, in three dimensions also every second layer), "hilbert" (a
            generalised Hilbert curve: every step leads to a neighbouring cell, but for at most one diagonal step
            where no curve without it exists), or "explicit" (`from_permutation`, `from_coordinates`).
        grid: Sides of the grid, row-major: (columns,), (rows, columns) or (layers, rows, columns). None lays the
            tokens in rows of ⌈√(N - prefix)⌉, the last one cut off.
        prefix: So many leading tokens keep the first steps (class tokens, text before an image).

    Raises:
        OrderError: An unknown kind, a side below 1, a negative prefix.
        ArgumentTypeError: `grid` or `prefix` is not made of integers.
    """

    kind: str
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    _permutation: _Permutation | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self._permutation is not None:
            return
        if self.kind == "explicit":
            raise OrderError("an explicit order is made by TokenOrder.from_permutation or TokenOrder.from_coordinates")
        _check_curve(self.kind)
        object.__setattr__(self, "prefix", _as_int("prefix", self.prefix))
        if self.prefix < 0:
            raise OrderError(f"prefix must be at least 0, got {self.prefix}")
        if self.grid is None:
            return
        if isinstance(self.grid, str) or not isinstance(self.grid, Sequence):
            raise ArgumentTypeError(f"grid must be a tuple of 1 to 3 sides such as (32, 48), got {self.grid!r}")
        grid = tuple(_as_int("a side of grid", side) for side in self.grid)
        if not 1 <= len(grid) <= 3 or min(grid) < 1:
            raise OrderError(f"grid must have 1 to 3 sides of at least 1, got {grid}")
        object.__setattr__(self, "grid", grid)

    @classmethod
    def from_permutation(cls, permutation: Tensor | Sequence[int]) -> TokenOrder:
        """The order that visits token `permutation[t]` at step t. Checked here, once; later edits change nothing.

        Args:
            permutation: (N,) integers, each of 0..N-1 once, on any device.

        Raises:
            OrderError: It is not one-dimensional, not of integers, or no permutation.
            ArgumentTypeError: It is neither a tensor nor a sequence of numbers.
        """
        return cls("explicit", _permutation=_Permutation(_as_permutation(permutation)))

    @classmethod
    def from_coordinates(cls, coords: Tensor, kind: str = "hilbert") -> TokenOrder:
        """Visits points of the plane or of space along a curve. Points in the same cell keep their sequence.

        Coordinates count from the least of each axis, so neither a shift nor a negative value matters. The curve is
        the one of a grid with the same axes: "hilbert" on the smallest square or cube of side 2^k that holds all
        points, "snake" on their bounding box. `from_coordinates` of all cells of such a grid is `TokenOrder(kind,
        grid)`.

        Args:
            coords: (N, 2) or (N, 3) integers, on any device; an axis spans less than 2^21.
            kind: "snake" or "hilbert".

        Raises:
            OrderError: Another shape, dtype, span or kind.
            ArgumentTypeError: `coords` is no tensor.
        """
        _check_curve(kind)
        if not isinstance(coords, Tensor):
            raise ArgumentTypeError(f"coords must be an integer tensor (N, 2) or (N, 3), got {type(coords).__name__}")
        if not _holds_integers(coords):
            raise OrderError(f"coords must hold integers, got {coords.dtype}: floor them to cells first")
        if coords.ndim != 2 or coords.shape[1] not in (2, 3):
            raise OrderError(f"coords must have shape (N, 2) or (N, 3), got {tuple(coords.shape)}")
        if len(coords) == 0:
            return cls.from_permutation([])
        points = coords.detach().to(_CPU, torch.int64).t().contiguous()
        lowest, highest = points.amin(1), points.amax(1)
        # Compared as Python integers, which do not wrap around.
        span = max(high - low for low, high in zip(lowest.tolist(), highest.tolist(), strict=True))
        if span >= 1 << COORDINATE_BITS:
            raise OrderError(
                f"coords must span less than 2^{COORDINATE_BITS} = {1 << COORDINATE_BITS} on each axis, got {span}: "
                "divide them by a cell size first"
            )
        points -= lowest[:, None]
        places = hilbert_places(points) if kind == "hilbert" else snake_places(points)
        return cls.from_permutation(places.argsort(stable=True))

    @property
    def permutation(self) -> Tensor | None:
        """int32 (N,) on the CPU: the token at each step of an explicit order, None for a curve. Never write to it."""
        return None if self._permutation is None else self._permutation.tokens

    def indices(self, length: int) -> Tensor:
        """int64 (N,) on the CPU: the token at each step. The tensor is the caller's own.

        Raises:
            OrderError: The order does not fit a sequence of this length.
        """
        return self.index(length, _CPU).to(torch.int64)

    def inverse(self, length: int) -> Tensor:
        """int64 (N,) on the CPU: the step at which each token is visited. The tensor is the caller's own.

        Raises:
            OrderError: The order does not fit a sequence of this length.
        """
        tokens = self.indices(length)
        return torch.empty_like(tokens).scatter_(0, tokens, torch.arange(length, device=_CPU))

    def index(self, length: int, device: torch.device) -> Tensor:
        """int32 (N,) on a device: the token at each step, for kernels. Cached and shared: never write to it.

        Raises:
            OrderError: The order does not fit a sequence of this length, or a CUDA graph is being captured and the
                tensor is not on the device yet.
        """
        self.check(length)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        tables = _CURVE_TABLES if self._permutation is None else self._permutation.tables
        key = (self.kind, self.grid, self.prefix, length, device)
        capturing = _is_capturing(device)
        if capturing and key not in tables:
            raise OrderError(
                f"this token order is not on {device} yet, and a CUDA graph under capture cannot copy it there: "
                "run the same call once before the capture"
            )
        # An inference tensor in the cache could never be saved for a backward.
        with torch.inference_mode(False):
            table = tables.get(key, lambda: self._tokens(length) if device == _CPU else self._copy(length, device))
        if capturing:
            _CAPTURED[id(table)] = table
        return table

    def row_width(self, length: int) -> int | None:
        """Tokens in a grid row of a snake in at most two dimensions, None for any other order.

        A kernel computes such an order: step t < prefix is token t; of the others row (t - prefix) // width runs
        backwards where it is odd, a last row that is cut off within its own cells.

        Raises:
            OrderError: The order does not fit a sequence of this length.
        """
        self.check(length)
        if self.kind != "snake":
            return None
        sides = [side for side in self._sides(length) if side > 1]
        return None if len(sides) > 2 else sides[-1] if sides else 1

    def plot(
        self,
        length: int,
        *,
        segment_length: int | None = None,
        coords: Tensor | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draws the way from token to token, in a colour for each segment. Needs matplotlib, the extra `plot`.

        Rows run downwards, as in an image. Prefix tokens lie nowhere: they are not drawn, but they take the first
        steps of the first segment.

        Args:
            length: N.
            segment_length: w, in steps; None is one segment.
            coords: (N - prefix, 2) or (N - prefix, 3) numbers: row and column of each token, or layer, row and
                column. None is its cell in the grid, which an explicit order has not: give it what it was made from.
            ax: matplotlib axes to draw on, in three dimensions made with projection="3d"; None makes a figure.

        Returns:
            The axes.

        Raises:
            OrderError: The order does not fit a sequence of this length, `coords` does not fit it or is missing, or
                `segment_length` is below 1.
            ArgumentError: `ax` has not the dimensions of the tokens.
            ArgumentTypeError: An argument is of a wrong type.
            MissingPackageError: matplotlib is not installed.
        """
        tokens = self.indices(length)[self.prefix :] - self.prefix
        segment_length = max(length, 1) if segment_length is None else _as_int("segment_length", segment_length)
        if segment_length < 1:
            raise OrderError(f"segment_length must be at least 1, got {segment_length}")
        if coords is None:
            coords = self._cells(length)
        if not isinstance(coords, Tensor):
            raise ArgumentTypeError(f"coords must be a tensor (N, 2) or (N, 3), got {type(coords).__name__}")
        if coords.shape not in ((len(tokens), 2), (len(tokens), 3)):
            raise OrderError(
                f"coords must have shape ({len(tokens)}, 2) or ({len(tokens)}, 3), a row for each token behind the "
                f"prefix, got {tuple(coords.shape)}"
            )
        return _plot.draw(coords.detach().to(_CPU)[tokens], self.prefix, segment_length, ax)

    def check(self, length: int) -> None:
        """Refuses a sequence length that the order does not fit.

        Raises:
            OrderError: The message says which length would fit.
            ArgumentTypeError: `length` is no integer.
        """
        length = _as_int("a sequence length", length)
        if not 0 <= length < 2**31:
            raise OrderError(f"a sequence length must lie in 0..2^31-1, got {length}")
        if self._permutation is not None:
            if length != len(self._permutation.tokens):
                raise OrderError(f"this order permutes {len(self._permutation.tokens)} tokens, but there are {length}")
        elif self.grid is not None:
            cells = math.prod(self.grid)
            if cells + self.prefix != length:
                raise OrderError(
                    f"grid {self.grid} with prefix {self.prefix} holds {cells} + {self.prefix} = "
                    f"{cells + self.prefix} tokens, but there are {length}"
                )
        elif self.prefix > length:
            raise OrderError(f"prefix {self.prefix} exceeds the sequence length {length}")

    def __repr__(self) -> str:
        if self._permutation is not None:
            return f"TokenOrder.from_permutation(<{len(self._permutation.tokens)} tokens>)"
        return f"TokenOrder({self.kind!r}, grid={self.grid}, prefix={self.prefix})"

    def _sides(self, length: int) -> tuple[int, ...]:
        """The grid, or the near-square one for this length; (0, 0) where nothing follows the prefix."""
        if self.grid is not None:
            return self.grid
        cells = length - self.prefix
        columns = math.isqrt(cells - 1) + 1 if cells else 0
        return (-(-cells // columns) if cells else 0, columns)

    def _cells(self, length: int) -> Tensor:
        """int64 (N - prefix, 2 or 3): row and column, or layer, row and column, of each token behind the prefix."""
        if self._permutation is not None:
            raise OrderError(
                "an explicit order does not know where its tokens lie: pass coords, as given to from_coordinates, or "
                "for a grid torch.cartesian_prod(torch.arange(rows), torch.arange(columns))"
            )
        sides = self._sides(length)
        cells = torch.arange(length - self.prefix, device=_CPU)
        return torch.stack(torch.unravel_index(cells, (1, *sides) if len(sides) == 1 else sides), dim=1)

    def _tokens(self, length: int) -> Tensor:
        """int32 (N,) on the CPU: the token at each step."""
        if self._permutation is not None:
            return self._permutation.tokens
        tokens = torch.arange(length, dtype=torch.int32, device=_CPU)
        if length > self.prefix:
            walk = hilbert_walk if self.kind == "hilbert" else snake_walk
            tokens[self.prefix :] = walk(self._sides(length), length - self.prefix).add_(self.prefix)
        return tokens

    def _copy(self, length: int, device: torch.device) -> Tensor:
        return copy_to_keep(self.index(length, _CPU), device)


def as_order(order: str | TokenOrder | Tensor | None) -> TokenOrder | None:
    """What `dilated_attention` accepts as `order`, as a `TokenOrder`.

    A tensor is checked when it is first seen and again after an in-place edit, not at every call: on a GPU the check
    waits for the device.

    Args:
        order: None, "snake", "hilbert", a `TokenOrder`, or an integer tensor (N,) as for `from_permutation`.

    Raises:
        OrderError: An unknown word, a tensor that is no permutation, or one first seen while a CUDA graph is captured.
        ArgumentTypeError: Anything else.
    """
    if order is None or isinstance(order, TokenOrder):
        return order
    if isinstance(order, str):
        if order not in CURVES:
            raise OrderError(f"order must be {', '.join(map(repr, CURVES))}, a TokenOrder or a tensor, got {order!r}")
        return TokenOrder(order)
    if not isinstance(order, Tensor):
        raise ArgumentTypeError(
            "order must be None, 'snake', 'hilbert', a TokenOrder or an integer tensor (N,), "
            f"got {type(order).__name__}; TokenOrder.from_permutation takes a list"
        )
    if order.is_inference():  # counts no edits
        return TokenOrder.from_permutation(order)
    version = order._version
    with _SEEN_LOCK:
        seen = _SEEN.get(order)
    if seen is not None and seen[0] == version:
        return seen[1]
    if _is_capturing(order.device):
        raise OrderError(
            "this order tensor is seen for the first time, and a CUDA graph under capture cannot wait for its check: "
            "pass TokenOrder.from_permutation(tensor), or run the same call once before the capture"
        )
    made = TokenOrder.from_permutation(order)
    with _SEEN_LOCK:
        _SEEN[order] = version, made
    return made


def copy_to_keep(table: Tensor, device: torch.device) -> Tensor:
    """A copy on a device that outlives the call which needs it first.

    That call may allocate from the memory pool of a CUDA graph (`torch.compile(mode="reduce-overhead")` warms up so),
    where nothing may stay. Pools belong to a thread: another one makes the copy, and waits for it.
    """
    if device.type != "cuda":
        return table.to(device)
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(table.to, device).result()


def create_hilbert_mapping(seq_len: int, kind: str = "snake") -> Tensor:
    """The token at each step for a sequence laid in rows of a near-square grid.

    Args:
        seq_len: N.
        kind: "snake", the approximation of a Hilbert curve that this function has always returned, or "hilbert".

    Returns:
        int32 (N,) on the CPU. `x[:, mapping]` is in curve order; `argsort(mapping)` undoes it.

    Raises:
        OrderError: A negative length or an unknown kind.
    """
    with torch.inference_mode(False):  # a caller may keep it, and train later
        return TokenOrder(kind).index(seq_len, _CPU).clone()


class _Tables:
    """At most `size` tensors, of which the one unused for longest goes first. Threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tables

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor under `key`, made if need be. Two threads may both make it; both get the same one."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        made = make()
        with self._lock:
            made = self._tables.setdefault(key, made)
            while len(self._tables) > self._size:
                self._tables.popitem(last=False)
        return made


class _Permutation:
    """A checked permutation: compared by content, with its copies on devices, which go when it goes."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.tables = _Tables(size=16)
        self._hash = hash((len(tokens), int((tokens * torch.arange(len(tokens), device=_CPU)).sum())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Permutation) and self._hash == other._hash and torch.equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[_Permutation], tuple[Tensor]]:
        return _Permutation, (self.tokens,)

    def __deepcopy__(self, memo: dict[int, object]) -> _Permutation:
        return self  # immutable


_CURVE_TABLES = _Tables(CACHED_TABLES)
_CAPTURED: dict[int, Tensor] = {}
"""Tables that a CUDA graph reads, by identity: a replay reads their memory, so they are never dropped."""
_SEEN: MutableMapping[Tensor, tuple[int, TokenOrder]] = WeakIdKeyDictionary()
"""Order tensors that were checked: their version then, and the order."""
_SEEN_LOCK = threading.Lock()


def _as_permutation(permutation: Tensor | Sequence[int]) -> Tensor:
    """A checked int32 copy on the CPU."""
    if isinstance(permutation, Tensor):
        given = permutation.detach()
    else:
        try:
            given = torch.as_tensor(permutation, device=_CPU)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentTypeError(
                f"a permutation must be a tensor or a sequence of integers, got {type(permutation).__name__}: {error}"
            ) from None
        if given.numel() == 0:
            given = given.to(torch.int64)  # an empty list has no dtype of its own
    if not _holds_integers(given):
        raise OrderError(f"a permutation must hold integers, got {given.dtype}")
    if given.ndim != 1:
        raise OrderError(f"a permutation must have shape (N,), got {tuple(given.shape)}")
    if given.is_meta:
        raise OrderError("a permutation must hold numbers, and a meta tensor has none: make it on the CPU")
    with torch.inference_mode(False):
        tokens = given.to(_CPU, torch.int64)
        length = len(tokens)
        outside = (tokens < 0) | (tokens >= length)
        if outside.any():
            step = int(outside.nonzero()[0])
            raise OrderError(
                f"a permutation of {length} tokens must hold each of 0..{length - 1} once, "
                f"but position {step} holds {int(tokens[step])}"
            )
        seen = torch.zeros(length, dtype=torch.bool, device=_CPU)
        seen[tokens] = True
        if not seen.all():
            by_token = tokens.argsort(stable=True)
            repeats = by_token[1:][tokens[by_token].diff() == 0]
            step = int(repeats.min())
            raise OrderError(
                f"a permutation of {length} tokens must hold each of 0..{length - 1} once, "
                f"but position {step} holds {int(tokens[step])} again"
            )
        return tokens.to(torch.int32, copy=True)


def _check_curve(kind: str) -> None:
    if kind not in CURVES:
        raise OrderError(f"kind must be one of {', '.join(CURVES)}, got {kind!r}")


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _as_int(label: str, value: object) -> int:
    """An integer of any kind (NumPy's too) as Python's; True and False are none."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise ArgumentTypeError(f"{label} must be an integer, got {value!r}")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
