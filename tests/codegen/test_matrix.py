"""The matrix: which texts a pattern becomes, and what `--add` accepts and writes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from codegen import matrix
from codegen.matrix import Pattern, expand, parse, with_pattern
from dilated_attention_pytorch.errors import CodegenError, ConfigError

MATRIX = Path(matrix.__file__)


def texts(pattern: Pattern) -> list[str]:
    return [variant.name for variant, _ in pattern.texts()]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Pattern(2048, 1), ["s2048_d1", "s2048_d1_even", "s2048_d1_even_ring"]),
        (Pattern(16384, 6), ["s16384_d6"]),  # 6 does not divide 16384
        (Pattern(5792, 2), ["s5792_d2"]),  # 2896 rows fill no tiles of 64
        (Pattern(128, 4), ["s128_d4", "s128_d4_one", "s128_d4_one_even"]),  # 32 rows: a tile of their own, no two of 64
        (Pattern(96, 1), ["s96_d1", "s96_d1_one"]),  # 96 rows fill no tile: its size is a power of two
        (Pattern(128, 16), ["s128_d16_one"]),  # 8 rows fill no tile: a tensor core takes 16
        (Pattern("full", 3, "hilbert"), ["full_d3_hilbert", "full_d3_hilbert_even", "full_d3_hilbert_even_ring"]),
        (Pattern(2048, 4, "none", "all"), ["s2048_d4_all", "s2048_d4_all_even"]),  # a ring asks no queries without keys
    ],
    ids=lambda value: "" if isinstance(value, list) else f"{value.segment}:{value.dilation}",
)
def test_a_pattern_becomes_the_texts_its_numbers_allow(pattern: Pattern, expected: list[str]) -> None:
    """An even text where rows leave a ragged tile would read and write what is not there."""
    assert texts(pattern) == expected


def test_reasons_of_patterns_that_share_a_variant_are_joined_once() -> None:
    """A duplicate line would render twice, or lose the second workload's reason."""
    reasons = expand([Pattern(64, 1, reason="a"), Pattern(64, 1, reason="b"), Pattern(64, 1, reason="a")])
    named = {variant.name: reason for variant, reason in reasons.items()}
    assert named["s64_d1"] == "a, b"
    assert named["s64_d1_even"] == "a, b; nothing is ragged"


def test_every_order_and_kind_of_queries_has_its_general_variants() -> None:
    """A pattern without a text of its own would find nothing to run through."""
    named = {variant.name for variant in expand([])}
    assert named == {
        f"{base}{order}{queries}{even}"
        for base in ("general", "full")
        for order in ("", "_snake", "_hilbert")
        for queries in ("", "_all")
        for even in ("", "_even")
    } | {f"general{queries}_one{even}" for queries in ("", "_all") for even in ("", "_even")} | {
        "general_even_ring",
        "full_even_ring",
        "general_one_even_ring",
        "general_ring",
        "full_ring",
        "general_hilbert_even_ring",  # any order, a snake too
        "full_hilbert_even_ring",
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("3000:5", Pattern(3000, 5)),
        ("3000:5:hilbert", Pattern(3000, 5, "hilbert")),
        ("3000:5:snake:all", Pattern(3000, 5, "snake", "all")),
        ("3000:5:all:snake", Pattern(3000, 5, "snake", "all")),
        ("full:3:all", Pattern("full", 3, "none", "all")),
    ],
)
def test_a_spec_is_read(spec: str, expected: Pattern) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("3000", "'3000' has no dilation rate"),
        ("", "'' has no dilation rate"),
        ("", "'' has no dilation rate"),
        ("many:5", "segment 'many' in 'many:5' is no positive integer"),
        ("3000:full", "dilation 'full' in '3000:full' is no positive integer"),
        ("0:5", "segment '0' in '0:5' is no positive integer"),
        ("3000:-5", "dilation '-5' in '3000:-5' is no positive integer"),
        ("3000:٥", "is no positive integer"),
        ("9" * 5000 + ":5", "is no positive integer"),
        ("5:3000", "'5:3000' keeps one step a segment at most"),
        ("3000:5:peano", "'peano' in '3000:5:peano' is neither an order nor a kind of queries"),
        ("3000:5:snake:hilbert", "'3000:5:snake:hilbert' names order twice"),
    ],
)
def test_a_spec_that_is_none_is_refused_in_a_sentence(spec: str, sentence: str) -> None:
    """Nonsense would be written into matrix.py and break every later run."""
    with pytest.raises(CodegenError) as refusal:
        parse(spec)
    assert sentence in str(refusal.value)
    assert "e.g. 3000:5:hilbert" in str(refusal.value)


@pytest.mark.parametrize("spec", ["2993:7", "2993:7:hilbert", "2993:7:all", "full:97:snake:all"])
def test_the_written_line_reads_back_as_the_pattern(spec: str, tmp_path: Path) -> None:
    """`--add` would write a line that means something else, or a file that ruff or Python refuses."""
    file = tmp_path / "matrix.py"
    file.write_bytes(MATRIX.read_bytes())
    matrix.add(parse(spec), file)
    before, after = MATRIX.read_text().splitlines(), file.read_text().splitlines()
    new = [line for line in after if line not in before]
    assert len(after) == len(before) + 1
    assert len(new) == 1
    assert len(new[0]) <= 120
    assert eval(new[0].strip().rstrip(","), {"Pattern": Pattern}) == parse(spec)
    tree = ast.parse(file.read_text())
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)]
    assert len(lists[0].elts) == len(matrix.PATTERNS) + 1


def test_a_second_line_goes_below_the_first() -> None:
    source = with_pattern(with_pattern(MATRIX.read_text(), parse("2993:7")), parse("2993:9"))
    assert source.index("Pattern(2993, 7") < source.index("Pattern(2993, 9") < source.index("def expand")


def test_a_pattern_refuses_what_no_variant_can_be() -> None:
    """A typing error in matrix.py would be met as a kernel that does not compile."""
    with pytest.raises(ConfigError, match="order must be one of"):
        Pattern(2048, 1, "hibert")
