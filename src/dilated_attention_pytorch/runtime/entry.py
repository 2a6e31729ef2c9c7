"""How Triton launches a compiled kernel, once its own Python is done: the function in C, and what that is given.

Nothing of this is documented by Triton. Versions 3.6 to 3.9 have been read; where a launcher is not as known here,
`entry` has none, and Triton launches for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any, NamedTuple

READ = ("3.6.", "3.7.", "3.8.", "3.9.")


class Entry(NamedTuple):
    """What launches a kernel on a grid: `launch(*before, stream, *behind, ...)`.

    Attributes:
        launch: The function in C, or the launcher itself where launches differ from each other.
        before: What it is given in front of the stream.
        behind: What it is given between the stream and the kernel's arguments.
        packed: It takes those as one tuple, not one by one.
        expand: What it is given for the kernel's arguments, tensor descriptors encoded; None where that is the same.
    """

    launch: Callable[..., None]
    before: tuple[Any, ...]
    behind: tuple[Any, ...]
    packed: bool
    expand: Callable[[Sequence[Any]], list[Any]] | None


def entry(compiled: Any, programs: int, count: int) -> Entry | None:
    """The entry of a compiled kernel that was launched before; None where its launcher is not as known here.

    AMD's kernels have none: they depend on more than their arguments, on how large the tensors' storage is.

    Args:
        compiled: What Triton's function returned.
        programs: Number of programs.
        count: Number of the kernel's arguments, constants included.
    """
    try:
        launcher = compiled.run
        known = compiled.metadata.target.backend == "cuda" and _takes_these(type(launcher).__call__)
    except AttributeError:
        return None
    if not known:
        return None
    before, behind = (programs, 1, 1), (compiled.function, compiled.packed_metadata, None, None, None)
    if not _is_stateless(launcher):
        return Entry(launcher, before, behind, False, None)
    # A copy of the launcher tells what its function is given.
    teller, stream, arguments = copy(launcher), object(), tuple(object() for _ in range(count))
    told: list[tuple[Any, ...]] = []
    teller.launch = lambda *given: told.append(given)
    teller(*before, stream, *behind, *arguments)
    given = told[0]
    packed = given[-1] == arguments
    place, end = given.index(stream), len(given) - (1 if packed else count)
    found = Entry(launcher.launch, given[:place], given[place + 1 : end], packed, None)
    return _expanding(found) if isinstance(launcher.launch, FunctionType) else found


def _is_stateless(launcher: Any) -> bool:
    """It gives its function nothing that differs from launch to launch, such as scratch memory."""
    import triton

    scratch = (getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile"))
    taken = any(scratch) or getattr(launcher, "gsan_enabled", False)
    return not taken and hasattr(launcher, "launch") and triton.__version__.startswith(READ)


def _expanding(outer: Entry) -> Entry | None:
    """The entry behind a function in Python that encodes tensor descriptors, and this function with nothing behind."""
    function = outer.launch
    assert isinstance(function, FunctionType)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if "launcher" not in cells:
        return None
    within = cells["launcher"].cell_contents
    cells["launcher"] = CellType(lambda *given: given)
    alone = FunctionType(function.__code__, function.__globals__, closure=tuple(cells.values()))

    def expand(arguments: Sequence[Any]) -> list[Any]:
        given = alone(*outer.before, 0, *outer.behind, *((tuple(arguments),) if outer.packed else arguments))
        return list(given[-1] if outer.packed else given[len(outer.before) + 1 + len(outer.behind) :])

    return outer._replace(launch=within, expand=expand)


@lru_cache
def _takes_these(launcher: Callable[..., None]) -> bool:
    """What follows `function` has been the same, and was not always spelt out."""
    names = tuple(inspect.signature(launcher).parameters)
    told = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
    first = ("self", "gridX", "gridY", "gridZ", "stream", "function")
    return names in ((*first, "args"), (*first, *told, "args"))
