"""Texts <-> generated/: what differs, and writing it. The only part of the workshop that touches the disk."""

from __future__ import annotations

import ast
import difflib
import keyword
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dilated_attention_pytorch.errors import CodegenError
from dilated_attention_pytorch.variant import Variant

from . import ROOT
from .render import MARK, TEMPLATES, render, render_shared, shared_names

GENERATED = ROOT / "generated"
DIFF_LINES = 12


@dataclass(frozen=True)
class Difference:
    """One file of generated/ that is not as it would be rendered now.

    Attributes:
        kind: "stale", "missing", "orphan" (ours, but rendered no more) or "foreign" (not ours).
        file: Its name.
        diff: A short unified diff from the file to its text; empty where only one of them exists.
    """

    kind: str
    file: str
    diff: str = ""


def render_all(variants: Iterable[Variant], templates: Path = TEMPLATES) -> dict[str, str]:
    """File name -> text, of every variant and every shared module, checked before anything is written.

    Raises:
        CodegenError: A text is no Python, or two modules would share a file.
    """
    texts: dict[str, str] = {}
    taken: dict[str, str] = {}
    modules = [(name, render_shared(name, templates)) for name in shared_names(templates)]
    modules += [(variant.name, render(variant, templates)) for variant in variants]
    for name, text in modules:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise CodegenError(f"{name!r} is no module name: rename its template")
        other = taken.setdefault(name.lower(), name)  # some file systems do not tell cases apart
        if f"{name}.py" in texts or other != name:
            raise CodegenError(f"{name!r} and {other!r} would be the same file: rename one")
        try:
            ast.parse(text)
        except SyntaxError as error:
            line = text.splitlines()[(error.lineno or 1) - 1].strip()
            raise CodegenError(f"{name} is rendered as no Python, line {error.lineno}: {error.msg}: {line}") from error
        texts[f"{name}.py"] = text
    return texts


def compare(texts: dict[str, str], folder: Path = GENERATED) -> list[Difference]:
    """What `write` would change, sorted by file name; reads only."""
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    differences = []
    for file in sorted(texts.keys() | found.keys()):
        if file not in found:
            differences.append(Difference("missing", file))
        elif file not in texts:
            differences.append(Difference("orphan" if found[file].startswith(MARK) else "foreign", file))
        elif found[file] != texts[file]:
            differences.append(Difference("stale", file, _short_diff(file, found[file], texts[file])))
    return differences


def write(texts: dict[str, str], folder: Path = GENERATED) -> list[Difference]:
    """Make the folder hold these texts: write what differs, remove what is ours and rendered no more.

    Each file is replaced in one step, so that a reader or an interruption never meets half of one.

    Returns:
        What differed before. Foreign files still do: they are left alone.
    """
    folder.mkdir(exist_ok=True)
    differences = compare(texts, folder)
    for difference in differences:
        path = folder / difference.file
        if difference.kind in ("missing", "stale"):
            draft = folder / f".{difference.file}.{os.getpid()}"
            draft.write_text(texts[difference.file], encoding="utf-8", newline="\n")
            draft.replace(path)
        elif difference.kind == "orphan":
            path.unlink()
    return differences


def _short_diff(file: str, old: str, new: str) -> str:
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), file, "rendered", lineterm="", n=1))
    more = len(diff) - DIFF_LINES
    return "\n".join(diff[:DIFF_LINES] + ([f"… {more} more lines"] if more > 0 else []))
