"""Home of the rendered kernel modules, wherever the installation keeps their files.

They import triton, so nothing is imported before `load` asks for it. They have to be loaded from here alone: a second
copy of a module would be a second copy of each of its kernels.
"""

from __future__ import annotations

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
        return import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name == full_name:
            reason = f"there is no generated module {name!r} in {generated_dir()}; in a checkout, `python -m codegen`"
            raise UnsupportedError(f"{reason} writes those of codegen/matrix.py") from error
        if error.name == "triton":
            raise UnsupportedError(f"{name!r} needs triton, which is not installed: pip install triton") from error
        raise
