"""docs/client.md: its examples run, and its numbers are those of the committed results."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import client

from .blocks import FENCED

PAGE = client.PAGE.read_text(encoding="utf-8")
EXAMPLES = FENCED.findall(PAGE)


def test_there_are_examples() -> None:
    """Fences that this test does not recognise: a page with nothing run."""
    assert len(EXAMPLES) == PAGE.count("```python") == 4


@pytest.mark.parametrize("place", range(len(EXAMPLES)))
def test_an_example_runs_as_it_is_pasted(place: int) -> None:
    """An example that misses an import, leans on the one before it, or calls what was renamed."""
    exec(compile(EXAMPLES[place], f"client.md, example {place}", "exec"), {})


def test_numbers_are_those_of_the_results() -> None:
    """A table edited by hand, or left behind by a new measurement: `python -m benchmarks.client --page`."""
    assert client.with_results(PAGE) == PAGE


def test_auto_s_table() -> None:
    """Two tables of one rule that differ."""
    from dilated_attention_pytorch.kernels import auto_branches

    rows = re.findall(r"^\s*(\| \d+ to \d+ \|.*)$", str(auto_branches.__doc__), re.MULTILINE)
    assert rows
    assert [row for row in rows if row not in PAGE] == []


def test_the_script_runs(tmp_path, monkeypatch, capsys) -> None:
    """A measurement that fails on the GPU after ten minutes, or a row that is measured and not shown."""
    output = tmp_path / "client_none.json"
    monkeypatch.setattr("sys.argv", ["client", "--tiny", "--output", str(output)])
    assert client.main() == 0
    document = json.loads(output.read_text(encoding="utf-8"))
    page = capsys.readouterr().out
    assert page.strip() == client.render(document, output.name).strip()
    assert {row["row"] for row in document["table"]} == {*client.GUIDE, "SDPA"}
    assert len(document["claims"]) == len(client.TINY.claims) * len(client.DTYPES) * len(client.SCOPES)
    for name, (forward, backward, memory) in client.GUIDE.items():
        assert f"| {name} | the guide's | {forward} | {backward} | {memory} |" in page
    for row in document["table"]:
        assert f"| {row['row']} | {row['dtype']} | {row['forward_ms']:.3f} | {row['backward_ms']:.3f} |" in page
    for row in document["claims"]:
        assert row["holds"] == (row["faster"] >= client.FASTER and row["memory_share"] < client.SHARE)


def test_contenders_that_differ_are_not_timed() -> None:
    """A peer that computes something else is beaten in vain."""
    import torch

    sizes = client.TINY
    core, x = client.make(sizes, 40, "fp32", torch.device("cpu"))
    wrong = {"right": core, "wrong": lambda x: core(x, dilation_rate=2)}
    with pytest.raises(SystemExit, match="wrong differs by"):
        client.agree(wrong, [x], [x], "fp32")
