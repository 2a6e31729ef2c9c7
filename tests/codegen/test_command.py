"""`python -m codegen` as a person meets it: in a small checkout of its own, with jinja2 and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOOR_0 = ("errors.py", "variant.py", "source_hash.py")


@pytest.fixture
def checkout(tmp_path: Path, templates: Path) -> Path:
    """What the workshop needs of a checkout; the package's `__init__` fails, as it does where torch is absent."""
    shutil.copytree(ROOT / "codegen", tmp_path / "codegen", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "src" / "dilated_attention_pytorch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch\n")
    for name in FLOOR_0:
        shutil.copy(ROOT / "src" / "dilated_attention_pytorch" / name, package)
    site = tmp_path / "site"
    site.mkdir()
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (site / name).symlink_to(Path(spec.origin).parent)
    return tmp_path


def codegen(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where no other package can be imported (-S) and no other program found."""
    environment = {"PYTHONPATH": str(checkout / "site"), "PATH": "", "PYTHONIOENCODING": "utf-8"}
    if "SYSTEMROOT" in os.environ:
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    command = [sys.executable, "-S", "-m", "codegen", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def test_it_writes_checks_and_mends(checkout: Path) -> None:
    """It would need torch or git, or `--check` would pass over a file that was edited by hand."""
    first = codegen(checkout)
    assert first.returncode == 0, first.stderr
    assert codegen(checkout, "--check").returncode == 0
    generated = checkout / "generated"
    (generated / "s2048_d1.py").write_text((generated / "s2048_d1.py").read_text().replace("2048)", "2047)"))
    (generated / "delta.py").rename(generated / "s9_d9.py")
    before = {path.name: path.read_bytes() for path in generated.iterdir()}
    check = codegen(checkout, "--check")
    assert check.returncode == 1
    for line in (
        "stale    generated/s2048_d1.py",
        "  -    return range(0, length, 2047)",
        "missing  generated/delta.py",
        "orphan   generated/s9_d9.py",
        "3 files differ from what is rendered; mend: python -m codegen",
    ):
        assert f"{line}\n" in check.stdout
    assert {path.name: path.read_bytes() for path in generated.iterdir()} == before, "--check wrote something"
    assert codegen(checkout).returncode == 0
    assert codegen(checkout, "--check").stdout == ""


def test_a_foreign_file_is_named_and_kept(checkout: Path) -> None:
    """A module that nobody rendered could be loaded as if it had been reviewed."""
    codegen(checkout)
    foreign = checkout / "generated" / "mine.py"
    foreign.write_text("a = 1\n")
    for arguments in ([], ["--check"]):
        result = codegen(checkout, *arguments)
        assert result.returncode == 1
        assert "generated/mine.py was not rendered by this program: move it away" in result.stderr
    assert foreign.exists()


def test_list_prints_every_variant_with_its_reason(checkout: Path) -> None:
    result = codegen(checkout, "--list")
    rows = [line.split("  ", 1) for line in result.stdout.splitlines()]
    assert {name for name, _ in rows} >= {"general", "full_hilbert_all", "s16384_d6", "s128_d4_snake_all_one_even"}
    assert all(reason.strip() for _, reason in rows)
    assert not (checkout / "generated").exists()


def test_add_writes_the_line_once_and_generates(checkout: Path) -> None:
    """A second `--add` would write a second line; a new pattern would wait for a second command."""
    matrix = checkout / "codegen" / "matrix.py"
    added = codegen(checkout, "--add", "2993:7:hilbert")
    assert added.returncode == 0, added.stderr
    once = matrix.read_text()
    assert once.count('    Pattern(2993, 7, "hilbert", reason="added"),\n') == 1
    assert (checkout / "generated" / "s2993_d7_hilbert.py").exists()
    again = codegen(checkout, "--add", "2993:7:hilbert")
    assert again.returncode == 0
    assert "2993:7:hilbert is in codegen/matrix.py already" in again.stdout
    assert matrix.read_text() == once
    assert codegen(checkout, "--check").returncode == 0


def test_add_takes_branches_that_share_a_pass(checkout: Path) -> None:
    """A line that does not read back, or a chain whose segments cut each other."""
    assert codegen(checkout, "--add", "512:1+1024:2").returncode == 0
    assert (checkout / "generated" / "s512_1024_d1_2_even.py").exists()
    assert codegen(checkout, "--check").returncode == 0
    refused = codegen(checkout, "--add", "512:1+1000:2")
    assert refused.returncode == 2
    assert "are no chain: each segment length must divide the next" in refused.stderr


@pytest.mark.parametrize("spec", ["3000", "3000:5:peano"])
def test_add_refuses_nonsense_and_writes_nothing(checkout: Path, spec: str) -> None:
    before = (checkout / "codegen" / "matrix.py").read_bytes()
    result = codegen(checkout, "--add", spec)
    assert result.returncode == 2
    assert result.stderr.startswith(f"python -m codegen: '{spec}'" if ":" not in spec else "python -m codegen: 'peano'")
    assert "Traceback" not in result.stderr
    assert (checkout / "codegen" / "matrix.py").read_bytes() == before
    assert not (checkout / "generated").exists()


def test_add_keeps_the_matrix_when_the_pattern_cannot_be_rendered(checkout: Path) -> None:
    """A line that the template cannot render would break every later run."""
    template = checkout / "templates" / "attention.py.jinja"
    template.write_text(template.read_text() + "{% if segment == 2993 %}\na = = 1\n{% endif %}\n")
    before = (checkout / "codegen" / "matrix.py").read_bytes()
    result = codegen(checkout, "--add", "2993:7")
    assert result.returncode == 2
    assert "s2993_d7 is rendered as no Python" in result.stderr
    assert (checkout / "codegen" / "matrix.py").read_bytes() == before
