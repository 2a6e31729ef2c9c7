"""The identity of a rendered kernel module: a hash of its code, blind to comments, docstrings and blank lines.

The workshop writes it into the header of a generated file, the tuning database stores it as `kernel` with a
measurement, and the runtime compares the two. It must be the same under every Python, so the text is read by a regular
expression and not by `tokenize` or `ast`, whose output differs between versions.
"""

from __future__ import annotations

import hashlib
import re

_COMMENT_OR_STRING = re.compile(
    r"(?P<comment>[ \t]*\#[^\n]*)"
    r"|\"\"\"(?:\\.|[^\\])*?\"\"\"|'''(?:\\.|[^\\])*?'''"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
    re.DOTALL,
)
_BLANK_LINES = re.compile(r"\n\s*\n")
_DOCSTRING = re.compile(r"(?P<before>\A\s*|:\n[ ]*)\"\"\"(?:\\.|[^\\])*?\"\"\"(?=\n|\Z)", re.DOTALL)


def code_only(source: str) -> str:
    """The source without comments, docstrings and blank lines."""
    text = _COMMENT_OR_STRING.sub(lambda match: "" if match["comment"] else match[0], source)
    text = _BLANK_LINES.sub("\n", text)
    text = _DOCSTRING.sub(lambda match: match["before"], text)
    return _BLANK_LINES.sub("\n", text).strip()


def kernel_hash(source: str) -> str:
    """Twelve hexadecimal digits that stay as long as the code of a generated module does."""
    return hashlib.sha256(code_only(source).encode()).hexdigest()[:12]
