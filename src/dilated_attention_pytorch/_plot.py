"""Drawing a token order: a line from token to token, in a colour for each segment. Needs matplotlib."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ArgumentError, MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#332288", "#DDAA33", "#117733", "#66BBEE", "#882255", "#44AA99", "#DD6677", "#999933")
"""Of segments, in turn: dark and light, so that they differ in print too (after P. Tol's palettes)."""
INK, BETWEEN = "#222222", "#AAAAAA"


def draw(visited: Tensor, first_step: int, segment_length: int, ax: Axes | None) -> Axes:
    """Draws the way through points, a filled dot where it begins and an open one where it ends.

    Steps between segments, and those more than twice as long as the median, are thin and grey.

    Args:
        visited: (steps, 2 or 3): row and column, or layer, row and column, of what is visited at each step.
        first_step: Which step of the sequence the first of them is; segments are counted from step 0.
        segment_length: Steps a segment.
        ax: Where to draw; None makes a figure.

    Raises:
        ArgumentError: `ax` is flat and the points are not, or the other way round.
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingPackageError(
            "to draw a token order takes matplotlib: pip install 'dilated-attention-kernels[plot]'"
        ) from error

    dims = visited.shape[1]
    if ax is None:
        ax = pyplot.figure().add_subplot(projection="3d" if dims == 3 else None)
    elif (ax.name == "3d") != (dims == 3):
        raise ArgumentError(
            f"these tokens lie in {dims} dimensions: ax must be made "
            f"{'with' if dims == 3 else 'without'} projection='3d', or be None"
        )
    if len(visited):
        _draw_way(ax, visited.flip(1), first_step, segment_length)  # matplotlib counts columns first
    if dims == 2:
        ax.set_aspect("equal")
    ax.yaxis.set_inverted(True)
    ax.set_axis_off()
    return ax


def _draw_way(ax: Any, points: Tensor, first_step: int, segment_length: int) -> None:
    dims = points.shape[1]
    if dims == 3:
        ax.set_box_aspect((points.amax(0) - points.amin(0) + 1).tolist())
    box, (width, height) = ax.get_position(), ax.get_figure().get_size_inches()
    spacing = 72 * min(box.width * width, box.height * height) / len(points) ** (1 / dims)
    thick = min(max(spacing * (0.45 if dims == 2 else 0.12), 0.5), 5.0)

    segment = torch.arange(first_step, first_step + len(points)) // segment_length
    far = points.double().diff(dim=0).norm(dim=1)
    leaps = far > 2 * far.median() if len(far) else far.bool()
    starts = [0, *((segment.diff() != 0) | leaps).nonzero().flatten().add(1).tolist(), len(points)]
    for start, stop in pairwise(starts):
        colour = COLOURS[int(segment[start]) % len(COLOURS)]
        alone = {"marker": "o", "markersize": thick} if stop - start == 1 else {}
        ax.plot(*points[start:stop].T.numpy(), color=colour, linewidth=thick, **alone)
        ax.plot(*points[stop - 1 : stop + 1].T.numpy(), color=BETWEEN, linewidth=min(thick / 3, 1.0), zorder=1)
    ends = {"marker": "o", "markersize": 2 * thick, "markeredgecolor": INK, "zorder": 3}
    ax.plot(*points[:1].T.numpy(), markerfacecolor=INK, **ends)
    ax.plot(*points[-1:].T.numpy(), markerfacecolor="white", **ends)
