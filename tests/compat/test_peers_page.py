"""The examples of docs/peers.md run."""

from __future__ import annotations

import pytest

from ..test_readme import ROOT, Example, examples

PAGE = ROOT / "docs" / "peers.md"
EXAMPLES = examples(PAGE.read_text(encoding="utf-8"))


def test_examples_are_found() -> None:
    """A page whose examples are not recognised, or all silenced."""
    assert [example.runs for example in EXAMPLES] == [True, False, True, True]


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.runs], ids=lambda example: f"line{example.line}")
def test_an_example_runs(example: Example) -> None:
    """A name that was changed in the code alone."""
    if "transformers" in example.code:
        pytest.importorskip("transformers")
    exec(compile(example.code, f"{PAGE}:{example.line}", "exec"), {})
