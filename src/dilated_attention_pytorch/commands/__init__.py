"""The commands of the tuner, a module each.

A module has `add(commands)`, which adds its parser and sets `run`: the function of the parsed arguments that returns
the exit code. What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_all(commands: Commands) -> None:
    """Add the parser of every module, by name."""
    for found in sorted(iter_modules(__path__), key=lambda found: found.name):
        import_module(f".{found.name}", __name__).add(commands)
