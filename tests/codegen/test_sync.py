"""What is written into generated/, what is removed, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen import sync
from codegen.render import MARK
from codegen.sync import Difference, compare, render_all, write
from dilated_attention_pytorch.errors import CodegenError
from dilated_attention_pytorch.variant import Variant

VARIANTS = [Variant(None, None), Variant(48, 5), Variant("full", 3, "hilbert")]
FILES = ["delta.py", "full_d3_hilbert.py", "general.py", "s48_d5.py"]


def kinds(differences: list[Difference]) -> dict[str, str]:
    return {difference.file: difference.kind for difference in differences}


@pytest.fixture
def texts(templates: Path) -> dict[str, str]:
    return render_all(VARIANTS, templates)


def test_every_variant_and_shared_module_is_written_and_then_nothing_differs(
    texts: dict[str, str], generated: Path
) -> None:
    assert kinds(write(texts, generated)) == dict.fromkeys(FILES, "missing")
    assert sorted(path.name for path in generated.iterdir()) == FILES, "a draft was left behind"
    assert compare(texts, generated) == []


def test_what_does_not_differ_is_not_touched(texts: dict[str, str], generated: Path) -> None:
    """Fresh time stamps on every file would recompile every kernel."""
    write(texts, generated)
    before = {path.name: path.stat().st_mtime_ns for path in generated.iterdir()}
    (generated / "s48_d5.py").write_text("edited by hand\n")
    assert kinds(write(texts, generated)) == {"s48_d5.py": "stale"}
    after = {path.name: path.stat().st_mtime_ns for path in generated.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"s48_d5.py"}
    assert (generated / "s48_d5.py").read_text() == texts["s48_d5.py"]


def test_a_stale_file_is_shown_by_a_short_diff(texts: dict[str, str], generated: Path) -> None:
    """A check that only says 'stale' sends its reader off to find out why; a whole file drowns him."""
    write(texts, generated)
    (generated / "s48_d5.py").write_text(texts["s48_d5.py"].replace("length, 48", "length, 49"))
    (generated / "delta.py").write_text("".join(f"line = {i}\n" for i in range(100)))
    diffs = {difference.file: difference.diff for difference in compare(texts, generated)}
    assert "-    return range(0, length, 49)\n+    return range(0, length, 48)" in diffs["s48_d5.py"]
    assert len(diffs["delta.py"].splitlines()) == sync.DIFF_LINES + 1
    assert diffs["delta.py"].endswith("more lines")


def test_an_orphan_goes_only_if_it_is_ours(texts: dict[str, str], generated: Path) -> None:
    """A withdrawn variant would stay loadable; or somebody's own file would be deleted."""
    (generated / "s9_d9.py").write_text(f"{MARK}attention.py.jinja.\n")
    (generated / "notes.py").write_text("mine = 1\n")
    (generated / "README.md").write_text("not code\n")
    expected = {"s9_d9.py": "orphan", "notes.py": "foreign"}
    assert kinds(write(texts, generated)) == {**dict.fromkeys(FILES, "missing"), **expected}
    assert kinds(compare(texts, generated)) == {"notes.py": "foreign"}
    assert (generated / "README.md").exists()


def test_nothing_is_written_when_one_text_is_no_python(templates: Path) -> None:
    """Half of generated/ would be new and half old."""
    (templates / "attention.py.jinja").write_text("{% if segment == 48 %}\nb = = 1\n{% endif %}\n")
    with pytest.raises(CodegenError, match="s48_d5 is rendered as no Python, line 3: invalid syntax: b = = 1"):
        render_all(VARIANTS, templates)


@pytest.mark.parametrize("name", ["general", "General"])
def test_two_modules_never_share_a_file(templates: Path, name: str) -> None:
    """A shared module named like a variant would overwrite it; on some disks case does not tell them apart."""
    (templates / f"{name}.py.jinja").write_text("a = 1\n")
    with pytest.raises(CodegenError, match="would be the same file"):
        render_all(VARIANTS, templates)


@pytest.mark.parametrize("name", ["two-words", "class"])
def test_a_template_is_named_as_a_module(templates: Path, name: str) -> None:
    """It would be rendered, and no import could reach it."""
    (templates / f"{name}.py.jinja").write_text("a = 1\n")
    with pytest.raises(CodegenError, match="is no module name"):
        render_all(VARIANTS, templates)
