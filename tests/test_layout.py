"""Where the artifacts are found, and the home of the rendered modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dilated_attention_pytorch import _layout, generated
from dilated_attention_pytorch.errors import UnsupportedError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of generated/; what a test loads from it is forgotten after."""
    monkeypatch.setattr(generated, "__path__", [str(tmp_path)])
    monkeypatch.setattr(generated, "generated_dir", lambda: tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(generated.__name__):
            del sys.modules[name]


def test_a_checkout_reads_its_own_root() -> None:
    """A new kernel or measurement would be written in one place and read from another."""
    assert _layout.is_checkout()
    assert _layout.generated_dir() == ROOT / "generated"
    assert _layout.tune_db_dir() == ROOT / "tune_db"


def test_an_installation_reads_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel would look for kernels next to site-packages."""
    monkeypatch.setattr(_layout, "_INSTALLED", tmp_path)
    assert not _layout.is_checkout()
    assert _layout.generated_dir() == tmp_path / "generated"
    assert _layout.tune_db_dir() == tmp_path / "tune_db"


def test_names_imports_nothing(home: Path) -> None:
    """Asking what there is would import every kernel, and triton with them."""
    (home / "s48_d5.py").write_text("raise RuntimeError('imported')\n")
    (home / "README.md").write_text("not a module\n")
    assert generated.names() == {"s48_d5"}


def test_threads_get_one_module(home: Path) -> None:
    """Two copies of a module are two copies of each kernel, compiled twice."""
    (home / "slow.py").write_text("import time\n\ntime.sleep(0.05)\nthing = object()\n")
    with ThreadPoolExecutor(8) as pool:
        things = set(pool.map(lambda _: generated.load("slow").thing, range(8)))
    assert len(things) == 1


def test_an_absent_module_is_named_with_the_remedy(home: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"there is no generated module 's48_d5' in .*`python -m codegen`"):
        generated.load("s48_d5")


def test_absent_triton_is_named_with_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "s48_d5.py").write_text("import triton\n")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match="'s48_d5' needs triton, which is not installed: pip install triton"):
        generated.load("s48_d5")


def test_a_fault_inside_a_module_is_not_taken_for_its_absence(home: Path) -> None:
    """The reader would be sent to render what is rendered, and wrong."""
    (home / "s48_d5.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        generated.load("s48_d5")
