"""The commands of the tuner, a module each.

A module has `add(commands)`, which adds its parser and sets `run`: the function of the parsed arguments that returns
the exit code. What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ..errors import ArgumentError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_all(commands: Commands) -> None:
    """Add the parser of every module, by name."""
    for found in sorted(iter_modules(__path__), key=lambda found: found.name):
        import_module(f".{found.name}", __name__).add(commands)


def write(path: Path, text: str, option: str) -> None:
    """Write a file that an option names.

    Raises:
        ArgumentError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, option, error) from error


def try_to_write(path: Path, option: str) -> None:
    """Before the work whose result is to be written there; leaves nothing behind.

    Raises:
        ArgumentError: It could not be written.
    """
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise _unwritable(path, option, error) from error
    if is_new:
        path.unlink()


def _unwritable(path: Path, option: str, error: OSError) -> ArgumentError:
    return ArgumentError(f"{path} cannot be written: {error.strerror}; {option} says where else")
