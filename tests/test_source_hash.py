"""The kernel hash: moved by code, by nothing else, and the same under every Python."""

from __future__ import annotations

import io
import token
import tokenize
from pathlib import Path

import pytest

from dilated_attention_pytorch.source_hash import code_only, kernel_hash

SOURCE = '''\
# a header
"""Docstring with a # sign."""

import triton


@triton.jit(repr=lambda s: f"fwd_{s.constants['BLOCK_M']}#1")  # why
def kernel(x):
    """Says what it does.

    # No comment.
    """
    a = "it's # no comment"  # but this is
    # shape: [BLOCK_M]
    return x + a
'''
SAME = {
    "another comment": SOURCE.replace("# why", "# why not, though"),
    "no comment": SOURCE.replace("  # why", ""),
    "another header": SOURCE.replace("# a header", "# a header\n# of two lines"),
    "another docstring": SOURCE.replace("Says what", 'Tells "what"'),
    "no docstring": SOURCE.replace('"""Docstring with a # sign."""\n', ""),
    "blank lines": SOURCE.replace("    # shape", "\n\n    # shape"),
}
OTHER = {
    "another statement": SOURCE.replace("x + a", "x - a"),
    "a string's sign": SOURCE.replace("it's # no comment", "it's # a comment"),
    "a string's prefix": SOURCE.replace("#1", "#2"),
    "indentation": SOURCE.replace("    return", "        return"),
}


def test_the_hash_is_what_it_was() -> None:
    """A change of the rule makes every measurement in the database stale: it is a decision."""
    assert kernel_hash(SOURCE) == "396ac6de38b2"


@pytest.mark.parametrize("edit", SAME)
def test_a_word_for_the_reader_moves_nothing(edit: str) -> None:
    """A better comment would throw measurements away."""
    assert SAME[edit] != SOURCE
    assert kernel_hash(SAME[edit]) == kernel_hash(SOURCE)


@pytest.mark.parametrize("edit", OTHER)
def test_a_change_of_the_code_moves_it(edit: str) -> None:
    """A measurement would be trusted for a kernel that it was not taken of."""
    assert kernel_hash(OTHER[edit]) != kernel_hash(SOURCE)


def test_comments_are_where_python_says() -> None:
    """The regular expression would take a sign in a string for a comment, or miss one, in code as we write it."""
    for path in Path(__file__).parents[1].glob("src/**/*.py"):
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = source.splitlines()
        for kind, _, (row, column), _, _ in tokens:
            if kind == token.COMMENT:
                lines[row - 1] = lines[row - 1][:column].rstrip()
        assert code_only("\n".join(lines)) == code_only(source), path.name
