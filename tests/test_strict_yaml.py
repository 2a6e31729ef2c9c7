"""What plain YAML forgives and the files of measurements must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dilated_attention_pytorch import _strict_yaml
from dilated_attention_pytorch._strict_yaml import Field
from dilated_attention_pytorch.errors import DatabaseError

BOMB = "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n"


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("a: 1\n<<<<<<< HEAD\nb: 2\n=======\n", 2, "merge was left unresolved"),
        ("a: 1\nb: [1, 2\n", 3, "no YAML"),
        ("", 1, "empty"),
        ("a: 1\n---\nb: 2\n", 2, "no YAML"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "carries the tag tag:yaml.org,2002:python/object"),
        (BOMB, 1, "through an alias"),
        ("a: &a [*a]\n", 1, "through an alias"),
        ("a:\n  <<: {b: 1}\n", 2, "carries the tag tag:yaml.org,2002:merge"),
    ],
)
def test_a_document_is_refused(tmp_path: Path, text: str, line: int, complaint: str) -> None:
    """Each of these loads, runs code or unfolds into gigabytes in plain YAML, or says nothing of where."""
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(DatabaseError, match=rf"file\.yaml:{line}: .*{complaint}"):
        _strict_yaml.load(path)


@pytest.mark.parametrize(
    ("text", "read", "complaint"),
    [
        ("a: 1\na: 2", Field.mapping, "a is given twice"),
        ("? [1]\n: 2", Field.mapping, "a key that is no name"),
        ("[1]", Field.mapping, "must be a mapping, got a sequence"),
        ("{a: 1, c: 2}", lambda f: f.fields(("a", "b")), "c is no field"),
        ("a: 1", lambda f: f.fields(("a", "b")), "lacks b"),
        ("a: 1", Field.items, "must be a list"),
        ("3.10", Field.text, "must be a string, got 3.10; quote it"),
        ("3.6.0", lambda f: f.text(quoted=True), 'must be quoted, got 3.6.0; write "3.6.0"'),
        ("on", Field.text, "must be a string"),
        ("c", lambda f: f.word(("a", "b")), "must be one of a, b, got c"),
        ("'7'", Field.integer, "must be an integer"),
        ("0x10", Field.integer, "must be a decimal integer"),
        ("1_000", Field.integer, "must be a decimal integer"),
        ("-1", Field.integer, "must be at least 0"),
        ("1e3", Field.number, "must be a number"),
        (".inf", Field.number, "must be a finite number"),
        (".nan", Field.number, "must be a finite number"),
        ("-1.5", Field.number, "not negative"),
        ("on", Field.truth, "must be true or false"),
        ("1", Field.truth, "must be true or false"),
    ],
)
def test_a_value_is_refused(tmp_path: Path, text: str, read: Callable[[Field], object], complaint: str) -> None:
    """Each of these is quietly something else in plain YAML: 3.1, a string, a boolean, the last of two."""
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(DatabaseError) as raised:
        read(_strict_yaml.load(path))
    assert complaint in str(raised.value)
    assert str(raised.value).startswith(f"{path}:")


def test_values_are_read(tmp_path: Path) -> None:
    """A reader that refuses everything would pass the tests above."""
    path = tmp_path / "file.yaml"
    path.write_text(
        'text: plain\nquoted: "3.10"\nwhole: 12\nnumber: 1.50e-03\nyes: true\nnothing: null\nlist: [1, 2]\n'
    )
    found = _strict_yaml.load(path).mapping()
    assert found["text"].text() == "plain"
    assert found["quoted"].text(quoted=True) == "3.10"
    assert found["whole"].integer() == found["whole"].number() == 12
    assert found["number"].number() == 0.0015
    assert found["yes"].truth()
    assert found["nothing"].optional(Field.number) is None
    assert found["number"].optional(Field.number) == 0.0015
    assert [item.integer() for item in found["list"].items()] == [1, 2]
