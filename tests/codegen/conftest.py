"""Small templates, so that a test shows the text it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

import dilated_attention_pytorch  # noqa: F401  The package itself, before codegen imports parts of it without.

ATTENTION = '''\
"""The module `{{ name }}`."""  # a comment


def steps(length):
    {% if general %}
    return range(0, length, SEGMENT)
    {% elif full %}
    return range(0, 1)
    {% else %}
    return range(0, length, {{ segment }})
    {% endif %}
'''


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A folder with a template for variants, a shared one, and a file of macros."""
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "attention.py.jinja").write_text(ATTENTION)
    (folder / "chain.py.jinja").write_text('"""The module `{{ name }}`."""\n\n\nLEVELS = {{ levels }}\n')
    for ring in ("ring", "chainring", "orderring"):
        (folder / f"{ring}.py.jinja").write_text('"""The module `{{ name }}`."""\n')
    (folder / "delta.py.jinja").write_text('{% import "_sizes.jinja" as sizes %}\nBLOCK = {{ sizes.block() }}\n')
    (folder / "_sizes.jinja").write_text("{% macro block() %}64{% endmacro %}\n")
    return folder


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """A folder to render into."""
    folder = tmp_path / "generated"
    folder.mkdir()
    return folder
