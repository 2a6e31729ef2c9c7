"""Home of the rendered kernel modules, wherever the installation keeps their files.

They import triton, so nothing is imported before `load` asks for it. They have to be loaded from here alone: a second
copy of a module would be a second copy of each of its kernels.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from .._layout import generated_dir
from ..errors import UnsupportedError

__path__.append(str(generated_dir()))


def names() -> frozenset[str]:
    """The modules that there are. Imports none of them, and works without triton."""
    return frozenset(path.stem for path in generated_dir().glob("*.py"))


def load(name: str) -> ModuleType:
    """The module, imported at the first call; later calls, and calls of other threads, get the same one.

    Raises:
        UnsupportedError: There is none of this name, or triton is not installed.
    """
    full_name = f"{__name__}.{name}"
    try:
        return _settled(import_module(full_name))
    except ModuleNotFoundError as error:
        if error.name == full_name:
            reason = f"there is no generated module {name!r} in {generated_dir()}; in a checkout, `python -m codegen`"
            raise UnsupportedError(f"{reason} writes those of codegen/matrix.py") from error
        if error.name == "triton":
            raise UnsupportedError(f"{name!r} needs triton, which is not installed: pip install triton") from error
        raise


@cache
def _settled(module: ModuleType) -> ModuleType:
    """The module, whose functions have their keys in Triton's cache on disk.

    Triton 3.6 to 3.9 makes a function's key from its globals and those of what it calls, if that has a key already. In
    the order in which they stand here, and not in which kernels are called, processes find each other's kernels.
    """
    for value in vars(module).values():
        if hasattr(type(value), "cache_key"):
            value.cache_key  # noqa: B018
    return module
