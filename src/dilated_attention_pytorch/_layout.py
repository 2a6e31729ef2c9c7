"""Where the artifacts lie: kernels and measurements.

A wheel carries them inside the package. A checkout, installed editable or not at all, has them at its root, where
the workshop and the tuner write them.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "_artifacts"


def is_checkout() -> bool:
    """The package is read from a checkout, so that new kernels and measurements can be kept in it."""
    return not _INSTALLED.is_dir()


def generated_dir() -> Path:
    """The folder of the rendered kernel modules."""
    return _root() / "generated"


def tune_db_dir() -> Path:
    """The folder of the tuning database that came with the package."""
    return _root() / "tune_db"


def data_dir() -> Path:
    """The user's folder for what this package keeps: `$XDG_DATA_HOME/dilated-attention`, or where systems put it."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "dilated-attention"


def own_db_dir() -> Path:
    """Where `tune` writes: the checkout's database, or, for an installed package, a folder of the user's."""
    return tune_db_dir() if is_checkout() else user_db_dir()


def user_db_dir() -> Path:
    """The user's own folder of measurements, which an installed package reads before those that it came with."""
    return data_dir() / "tune_db"


def _root() -> Path:
    return _PACKAGE.parent.parent if is_checkout() else _INSTALLED
