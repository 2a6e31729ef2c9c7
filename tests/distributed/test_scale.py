"""docs/scale.md and the benchmark that feeds it."""

from __future__ import annotations

import re

import pytest

from benchmarks import scale_out
from docs import scale

from ..test_readme import examples
from .conftest import Outcomes

PAGE = scale.PAGE.read_text(encoding="utf-8")
EXAMPLES = examples(PAGE)


def test_tables_are_computed() -> None:
    """Numbers edited by hand, or of a model that has changed: `python -m docs.scale`."""
    assert scale.written(PAGE) == PAGE
    assert scale.main(["--check"]) == 0


def test_a_page_out_of_date_is_told(tmp_path, monkeypatch, capsys) -> None:
    """A check that never fails."""
    page = tmp_path / "scale.md"
    page.write_text(PAGE.replace("1,073,741,824", "1"), encoding="utf-8")
    monkeypatch.setattr(scale, "PAGE", page)
    assert scale.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert scale.main([]) == 0
    assert page.read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line{example.line}")
def test_an_example_runs(example, monkeypatch) -> None:
    """An example that misses an import, or a script that torchrun starts in vain: here it is the only process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    assert example.runs
    exec(compile(example.code, f"scale.md:{example.line}", "exec"), {"__name__": "__main__"})


def test_a_result_is_rendered(outcomes: Outcomes) -> None:
    """A benchmark that fails after minutes on several GPUs, or a row that is measured and not shown."""
    document = outcomes("scaled out")[0]
    text = scale.render(document, "some.json")
    assert [row["ranks"] for row in document["rows"]] == [1, 2, 4]
    for row in document["rows"]:
        assert f"| {row['series']} | {row['tokens']} | {row['ranks']} | {1e3 * row['seconds']:.2f} |" in text
    assert document["rows"][0]["efficiency"] == 1.0
    assert document["rows"][2]["sent_bytes"] > document["rows"][1]["sent_bytes"] > 0
    assert "all-gather" in document["rows"][2]["others"]
    profile = {"series": "some", "ranks": 4, "messages_s": 2e-3, "overlapped_s": 1e-3}
    assert "messages took 2.00 ms on the first one, 1.00 ms" in scale.render({**document, "profile": profile}, "x")


def test_memory_is_shown_where_it_was_measured(outcomes: Outcomes) -> None:
    """A peak that is measured and not shown, or results without one that can no longer be read."""
    document = outcomes("scaled out")[0]
    old = [{name: row[name] for name in row if name not in ("peak_bytes", "kept_bytes")} for row in document["rows"]]
    assert "peak" not in scale.render({**document, "rows": old}, "x")
    peak = {**document["rows"][-1], "peak_bytes": 3 << 29, "kept_bytes": 1 << 30}
    text = scale.render({**document, "rows": [*old[:-1], peak]}, "x")
    assert "| others, ms | peak GiB (model) |" in text
    assert "| 1.50 (1.00) |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_memory_is_what_the_page_says(outcomes: Outcomes) -> None:
    """A step that keeps what the model does not know of: whole tensors of zeros, or of somebody else's rows."""
    for rank, (peak, predicted) in enumerate(outcomes("memory")):
        assert 1.0 <= peak / predicted < 1.15, rank


def test_the_other_way_computes_the_same(outcomes: Outcomes) -> None:
    """A peer that is wrong is beaten in vain."""
    assert max(outcomes("gathered whole")) < 1e-5


def test_time_is_covered_once() -> None:
    """Messages in parallel counted twice: more overlap than there is."""
    assert scale_out.covered([(3, 5), (0, 2), (1, 2.5), (4, 4.5)]) == 4.5
    assert scale_out.covered([]) == 0


def test_the_page_names_the_formula() -> None:
    """The formula that `docs.scale` computes and the tests count, gone from the page."""
    assert re.search(r"2·B·D·e·H·\(w − n\)/r", PAGE)
