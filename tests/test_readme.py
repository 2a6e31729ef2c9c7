"""The examples of the README run, each by itself in a fresh process on the CPU, as somebody pastes them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(?P<mark><!-- not run: [^\n]+ -->\s*)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A block of Python: its first line's number, its text, and whether it is to be run."""

    line: int
    code: str
    runs: bool


def examples(text: str) -> list[Example]:
    """The ```python blocks of a page; `<!-- not run: reason -->` right before one keeps it from being run."""
    return [
        Example(text.count("\n", 0, found.start("code")) + 1, found["code"], found["mark"] is None)
        for found in BLOCK.finditer(text)
    ]


RUN = [example for example in examples(README.read_text(encoding="utf-8") if README.exists() else "") if example.runs]


def test_the_readme_has_examples() -> None:
    """A page whose fences this test does not recognise would pass with nothing run."""
    assert RUN


@pytest.mark.parametrize("example", RUN, ids=lambda example: f"line{example.line}")
def test_an_example_runs_as_it_is_pasted(example: Example, tmp_path: Path) -> None:
    """An example that misses an import, leans on the one before it, or calls what was renamed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", example.code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"README.md:{example.line}\n{example.code}\n{done.stderr}"


def test_blocks_are_told_apart() -> None:
    """A marked block that runs, or a mark that silences the block after its own."""
    page = "```bash\nls\n```\n<!-- not run: a GPU -->\n\n```python\na = 1\n```\ntext\n```python\nb = 2\n\nc = 3\n```\n"
    assert examples(page) == [Example(7, "a = 1\n", False), Example(11, "b = 2\n\nc = 3\n", True)]
