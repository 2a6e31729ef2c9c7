"""Rendering: pure, repeatable, and honest about what is wrong with a template."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen.render import MARK, render, render_shared, shared_names
from dilated_attention_pytorch.errors import CodegenError
from dilated_attention_pytorch.source_hash import kernel_hash
from dilated_attention_pytorch.variant import Variant


def test_the_text_is_the_template_under_a_header(templates: Path) -> None:
    """Jinja's own habits would leave blank lines where a statement stood, or eat the last newline."""
    header, module, *body = render(Variant(48, 5), templates).split("\n")
    assert header == f"{MARK}attention.py.jinja. Do not edit: change the template and run it again."
    assert module == f"# Module s48_d5, kernel hash {kernel_hash(chr(10).join(body))}."
    assert body == [
        '"""The module `s48_d5`."""  # a comment',
        "",
        "",
        "def steps(length):",
        "    return range(0, length, 48)",
        "",
    ]


def test_nothing_in_a_text_changes_by_itself(templates: Path) -> None:
    """A date, a host or a path in the header would make every checkout stale."""
    elsewhere = templates.parent / "elsewhere"
    templates.rename(elsewhere)
    first = render(Variant("full", 3), elsewhere)
    elsewhere.rename(templates)
    assert render(Variant("full", 3), templates) == first
    assert str(templates.parent) not in first


def test_general_and_full_are_told_apart(templates: Path) -> None:
    """`full` in place of `general` would attend over one segment, whatever was asked."""
    assert "SEGMENT" in render(Variant(None, None), templates)
    assert "range(0, 1)" in render(Variant("full", None), templates)
    assert "range(0, 1)" in render(Variant("full", 4), templates)


def test_shared_modules_are_the_other_templates(templates: Path) -> None:
    """A file of macros would be rendered as a module, or delta forgotten."""
    assert shared_names(templates) == ["delta"]
    assert render_shared("delta", templates).endswith("\nBLOCK = 64\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a = 1\nb = {{ segmnt }}\n", "attention.py.jinja:2, rendering s48_d5: 'segmnt' is undefined"),
        ("a = 1\n{% if even %}\nb = 1\n", "attention.py.jinja:3, rendering s48_d5: Unexpected end of template"),
        (
            '{% import "_absent.jinja" as absent %}\n',
            "attention.py.jinja:1, rendering s48_d5: '_absent.jinja' not found",
        ),
    ],
    ids=["name", "syntax", "import"],
)
def test_a_fault_in_a_template_is_located(templates: Path, text: str, sentence: str) -> None:
    """A misspelt name would be rendered as nothing, and the kernel quietly lose a statement."""
    (templates / "attention.py.jinja").write_text(text)
    with pytest.raises(CodegenError) as refusal:
        render(Variant(48, 5), templates)
    assert sentence in str(refusal.value)
