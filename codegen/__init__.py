"""The workshop: variants -> text, `python -m codegen`. Runs from a checkout, is never installed; needs jinja2 alone.

It shares the owner of variant names with the package, whose `__init__` imports torch. Floor 0 is therefore imported
here under a bare parent that stands in for the package and leaves again: from then on a plain
`from dilated_attention_pytorch.variant import Variant` finds the submodule, without torch, and a later import of the
package itself finds the same classes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dilated_attention_pytorch"


def _import_floor_0() -> None:
    if PACKAGE in sys.modules:
        return
    bare = ModuleType(PACKAGE)
    bare.__path__ = [str(ROOT / "src" / PACKAGE)]
    sys.modules[PACKAGE] = bare
    try:
        for name in ("errors", "variant", "source_hash"):
            importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        del sys.modules[PACKAGE]


_import_floor_0()
