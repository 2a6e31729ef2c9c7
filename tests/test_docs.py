"""The pages in docs/: examples that run, tables that are computed, figures that show what the package does now."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from dilated_attention_pytorch import TokenOrder
from docs import figures

from .test_readme import Example, examples

PAGES = {name: (figures.PAGES / f"{name}.md").read_text(encoding="utf-8") for name in ("orders", "gallery")}
"""The pages with figures."""
RUN = [(name, example) for name, text in PAGES.items() for example in examples(text) if example.runs]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread for tables of some hundred cells, no window, and no figure left open."""
    matplotlib.use("Agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    pyplot.close("all")


@pytest.mark.parametrize(("name", "example"), RUN, ids=lambda given: getattr(given, "line", given))
def test_an_example_runs(name: str, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that asserts what is no longer so, or misses an import."""
    monkeypatch.chdir(tmp_path)
    exec(compile(example.code, f"{name}.md:{example.line}", "exec"), {"__name__": "__main__"})


def test_tables_are_computed() -> None:
    """Numbers of a curve or of a measurement that is no longer the one in the repository."""
    assert figures.distance_table() in PAGES["orders"]
    assert figures.cost_table() in PAGES["orders"]


def test_figures_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of what the package did once. `python -m docs.figures` draws it anew."""
    assert figures.stale() == []
    assert figures.main(["--check"]) == 0
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", (figures.queries,))
    assert figures.main(["--check"]) == 1
    assert figures.main([]) == 0
    assert figures.main(["--check"]) == 0
    text = (tmp_path / "queries.svg").read_text(encoding="utf-8")
    (tmp_path / "queries.svg").write_text(text.replace(figures.queries().digest, "0" * 16), encoding="utf-8")
    assert figures.stale() == ["queries.svg"]


def test_every_figure_is_shown_once() -> None:
    """A link to a figure that was renamed, or a file that no page shows."""
    shown = [path for text in PAGES.values() for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
    drawn = [f"figures/{figures.path(figure).name}" for figure in figures.FIGURES]
    assert sorted(shown) == sorted(drawn)
    ours = [path for path in figures.FOLDER.iterdir() if "python -m docs.figures" in path.read_text(encoding="utf-8")]
    assert sorted(drawn) == sorted(f"figures/{path.name}" for path in ours)


def test_links_lead_somewhere() -> None:
    """A page or a heading that moved."""
    for text in PAGES.values():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            file, _, heading = target.partition("#")
            assert (figures.PAGES / file).is_file(), target
            titles = re.findall(r"^#+ (.+)$", (figures.PAGES / file).read_text(encoding="utf-8"), re.MULTILINE)
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.__name__)
def test_a_figure_is_drawn(figure: Callable[[], figures.Picture]) -> None:
    """A panel that stays empty, or code that somebody will find broken when a figure is out of date."""
    axes = figure().draw().axes
    assert len(axes) >= 2
    assert all(ax.get_title() and (ax.lines or ax.patches) for ax in axes)


@pytest.mark.parametrize("figure", [figures.queries, figures.volume])
def test_a_figure_is_the_same_twice(figure: Callable[[], figures.Picture]) -> None:
    """A date or a random name in it: every run of the script would be a change to commit."""
    text = figure().svg()
    assert f"data {figure().digest}" in text
    ElementTree.fromstring(text)
    assert figure().svg() == text


def test_what_the_pictures_show_is_what_semantics_say() -> None:
    """A gallery of another attention. Spelt out for each pair of tokens, from the definition."""
    length, branches, heads = 23, [(9, 3), (16, 2)], 4
    order = TokenOrder.from_permutation([(7 * step + 3) % length for step in range(length)])
    step_of = order.inverse(length).tolist()
    counts = figures.seen(length, branches, heads=heads, head_offset="cyclic", order=order, is_causal=True)
    assert counts.shape == (2, heads, length, length)
    for (branch, (w, r)), head in ((pair, head) for pair in enumerate(branches) for head in range(heads)):
        for query in range(length):
            for key in range(length):
                kept = [step_of[token] % w % r == head % r for token in (query, key)]
                together = step_of[query] // w == step_of[key] // w
                assert counts[branch, head, query, key] == int(all(kept) and together and key <= query)


def test_distances_by_hand() -> None:
    """Pairs counted twice, a token's distance to itself, or neighbours across the edge of the grid."""
    square = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert figures.mean_distance(square, 4) == pytest.approx((4 + 2 * 2**0.5) / 6)
    assert figures.mean_distance(square, 2) == 1.0
    assert figures.neighbours_together(None, (2, 3), 3) == pytest.approx(4 / 7)
    assert figures.neighbours_together(TokenOrder("snake", (2, 3)), (2, 3), 4) == pytest.approx(4 / 7)
