"""YAML read strictly: every value is where and what its reader says, or the error names file, line and remedy.

Plain YAML forgives too much for a file of measurements: `3.10` becomes 3.1, of two equal keys the last one wins, an
alias may unfold into gigabytes, a tag may run code. Here a document is never turned into objects by the YAML library:
`load` parses it into nodes, and a reader takes each value out by the kind it expects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DatabaseError

_CONFLICT = re.compile(r"^(<{7}|={7}|>{7}|\|{7})( |$)", re.MULTILINE)
_DEEPEST = 32
"""Levels of nesting. Files here have six; the YAML library turns levels into recursion, and thousands end Python."""
_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))


def load(path: Path) -> Field:
    """The root of a YAML file.

    Raises:
        DatabaseError: The file cannot be read, is no YAML, is empty, holds a conflict marker, an alias or a tag, or
            nests too deep.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DatabaseError(f"{path}:1: cannot be read: {error.strerror}; mend or restore the file") from error
    except UnicodeDecodeError as error:
        raise DatabaseError(f"{path}:1: this is no text in UTF-8; restore the file") from error
    if marker := _CONFLICT.search(text):
        line = text.count("\n", 0, marker.start()) + 1
        raise DatabaseError(f"{path}:{line}: a merge was left unresolved here; keep one side and delete the markers")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_depth(path, yaml.parse(text, Loader=loader))
        node = yaml.compose(text, Loader=loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        reason = getattr(error, "problem", None) or type(error).__name__
        raise DatabaseError(f"{path}:{line}: this is no YAML ({reason}); mend or restore the file") from error
    if node is None:
        raise DatabaseError(f"{path}:1: the file is empty; restore it, or delete it")
    _refuse_aliases_and_tags(path, node)
    return Field(path, node)


def _refuse_depth(path: Path, events: Iterable[Any]) -> None:
    """Before anything recurses: events come one by one, however deep they are."""
    from yaml.events import CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in events:
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            line = event.start_mark.line + 1
            raise DatabaseError(f"{path}:{line}: nests more than {_DEEPEST} levels deep; mend or restore the file")


def _refuse_aliases_and_tags(path: Path, root: Any) -> None:
    """An alias is a node met twice. Refusing it at the second meeting keeps an alias bomb from ever unfolding."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            raise Field(path, node).error("is used through an alias (*name)", "write the value out at each place")
        seen.add(id(node))
        if node.tag not in _TAGS and node.tag != "tag:yaml.org,2002:timestamp":
            raise Field(path, node).error(f"carries the tag {node.tag}", "remove the tag: files here hold plain values")
        if node.id == "sequence":
            waiting.extend(node.value)
        elif node.id == "mapping":
            waiting.extend(part for pair in node.value for part in pair)


@dataclass(frozen=True)
class Field:
    """One value of a file, with where it stands. Every method either returns what it is named for or raises.

    Attributes:
        path: The file.
        node: What the YAML parser found: a scalar, a sequence or a mapping.
        label: The name that leads to it, such as `config.block_m`.
    """

    path: Path
    node: Any
    label: str = "the document"

    def error(self, problem: str, remedy: str) -> DatabaseError:
        """`file:line: label problem; remedy`."""
        return DatabaseError(f"{self.path}:{self.node.start_mark.line + 1}: {self.label} {problem}; {remedy}")

    def fields(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Field]:
        """The fields of a mapping: all of `required`, any of `optional`, no other."""
        found = self.mapping()
        if unknown := sorted(found.keys() - {*required, *optional}):
            expected = ", ".join((*required, *optional))
            raise found[unknown[0]].error("is no field of this file format", f"expected {expected}")
        if missing := [name for name in required if name not in found]:
            raise self.error(f"lacks {', '.join(missing)}", "add what is missing, or remove the entry")
        return found

    def mapping(self) -> dict[str, Field]:
        """The values of a mapping by their keys, whatever these are."""
        if self.node.id != "mapping":
            raise self.error(f"must be a mapping, got {self._shown}", "write 'name: value' pairs")
        found: dict[str, Field] = {}
        for key, value in self.node.value:
            if key.id != "scalar":
                raise Field(self.path, key, self.label).error("has a key that is no name", "use plain names as keys")
            name = key.value
            label = name if self.label == "the document" else f"{self.label}.{name}"
            if name in found:
                raise Field(self.path, key, label).error("is given twice", "keep one of the two")
            found[name] = Field(self.path, value, label)
        return found

    def items(self) -> list[Field]:
        """The values of a list."""
        if self.node.id != "sequence":
            raise self.error(f"must be a list, got {self._shown}", "write [a, b] or '- a' lines")
        return [Field(self.path, node, f"{self.label}[{index}]") for index, node in enumerate(self.node.value)]

    def text(self, *, quoted: bool = False) -> str:
        """A string; `quoted` asks for quotation marks, so that '3.10' and '1e3' stay what they are."""
        if quoted and (self.node.id != "scalar" or self.node.style not in ("'", '"')):
            raise self.error(f"must be quoted, got {self._shown}", f'write "{self._shown}"')
        value: str = self._scalar("str", "a string", "quote it if it is meant as text")
        return value

    def word(self, words: tuple[str, ...]) -> str:
        """A string out of a fixed list."""
        text = self.text()
        if text not in words:
            raise self.error(f"must be one of {', '.join(words)}, got {text}", "correct the word")
        return text

    def integer(self, at_least: int = 0) -> int:
        """A decimal integer."""
        text = self._scalar("int", "an integer", "write decimal digits, without quotation marks")
        if not re.fullmatch(r"-?(0|[1-9]\d{0,18})", text):
            raise self.error(f"must be a decimal integer, got {text}", "write plain digits")
        if int(text) < at_least:
            raise self.error(f"must be at least {at_least}, got {text}", "correct the number")
        return int(text)

    def number(self) -> float:
        """A finite, non-negative number, written as an integer or a float."""
        if self.node.tag == "tag:yaml.org,2002:int":
            return float(self.integer())
        text = self._scalar("float", "a number", "write it like 1.5 or 1.5e-03")
        if not re.fullmatch(r"\d+\.\d*(e[-+]\d+)?", text) or math.isinf(float(text)):
            raise self.error(f"must be a finite number that is not negative, got {text}", "measure again")
        return float(text)

    def truth(self) -> bool:
        """`true` or `false`; YAML's other words for them are refused."""
        text = self._scalar("bool", "true or false", "write true or false")
        if text not in ("true", "false"):
            raise self.error(f"must be true or false, got {text}", "write true or false")
        return text == "true"

    def optional(self, read: Callable[[Field], Any]) -> Any:
        """None for `null`, else what `read` makes of it."""
        return None if self.node.tag == "tag:yaml.org,2002:null" else read(self)

    def _scalar(self, kind: str, meaning: str, remedy: str) -> str:
        if self.node.id != "scalar" or self.node.tag != f"tag:yaml.org,2002:{kind}":
            raise self.error(f"must be {meaning}, got {self._shown}", remedy)
        text: str = self.node.value
        return text

    @property
    def _shown(self) -> str:
        return str(self.node.value) if self.node.id == "scalar" else f"a {self.node.id}"
