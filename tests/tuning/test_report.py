"""The report on a run: its numbers, its page and its command, on journals that nobody ran."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dilated_attention_pytorch import cli
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.tuning.journal import (
    STATUSES,
    End,
    Journal,
    Measurement,
    Pick,
    ProblemRow,
    Row,
    read,
)
from dilated_attention_pytorch.tuning.report import as_dict, page, plain, show, summarise
from dilated_attention_pytorch.tuning.report.facts import OP_WORDS, count, duration, micros, percent, shortened, times
from dilated_attention_pytorch.tuning.report.peaks import PEAKS, Roof
from dilated_attention_pytorch.tuning.space import Candidate

from .made_up import DEFAULT, LAUNCHES, RUN, keys, rows, write

KEY, OTHER, THIRD = keys()[:3]
VOID = {"meta", "link", "br", "img", "input", "hr"}
NAN, INF = math.nan, math.inf


class Page(HTMLParser):
    """A page's elements: (tag, attributes, text within it), in the order in which they end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], str]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert self._open == [], "elements that never end"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice: {tag} {attrs}"
        self._open.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, text = self._open.pop()
        assert opened == tag, f"<{opened}> ends with </{tag}>"
        self.found.append((tag, attributes, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def all(self, tag: str, class_: str = "") -> list[tuple[dict[str, str], str]]:
        """Attributes and text of the elements of a kind, in the order in which they end."""
        return [
            (a, text)
            for name, a, text in self.found
            if name == tag and (not class_ or class_ in a.get("class", "").split())
        ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A killed run: its last problem is not decided, its last line is torn."""
    return write(tmp_path_factory.mktemp("runs") / "made-up.jsonl", rows(), torn=True)


@pytest.fixture(scope="module")
def journal(written: Path) -> Journal:
    return read(written)


@pytest.fixture(scope="module")
def shown(journal: Journal) -> Page:
    return Page(page(summarise(journal)))


def of(*found: Row) -> Journal:
    """A journal of these rows."""
    journal = Journal()
    for row in found:
        journal.add(row)
    return journal


def problem(key: object = KEY, **changes: object) -> ProblemRow:
    usual = ProblemRow(KEY, "longnet", 0.5, 1e9, 1e6, DEFAULT, None)
    return dataclasses.replace(usual, key=key, **changes)


def timed(median: float | None, config: object = DEFAULT, stage: str = "finals", **changes: object) -> Measurement:
    low, high = (None, None) if median is None else (median * 0.99, median * 1.01)
    usual = Measurement(KEY, DEFAULT, "kernel", "general", stage, "ok", median, low, high)
    return dataclasses.replace(usual, config=config, **changes)


def pick(median: float, default: float | None, key: object = KEY, **changes: object) -> Pick:
    usual = Pick(KEY, LAUNCHES[0], "kernel", "fastest", median, median * 0.99, median * 1.01, default, median * 1.1, 5)
    return dataclasses.replace(usual, key=key, **changes)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_the_gain_is_of_the_finals() -> None:
    """The default's time of the first race, hours before, set against the pick's time of the finals."""
    report = summarise(
        of(
            *(problem(), timed(500.0, stage="race"), timed(200.0), timed(100.0, LAUNCHES[0]), pick(100.0, 200.0)),
            *(problem(OTHER), pick(100.0, 50.0, OTHER)),
            *(problem(THIRD), pick(100.0, 800.0, THIRD)),
        )
    )
    assert report.gains == {2: 0.5, 1: 2.0, 3: 8.0}
    assert list(report.gains) == [2, 1, 3]
    assert report.gain == pytest.approx(2.0)
    assert "2.00× over the untuned default (geometric mean of 3); worst 0.50× (#2), best 8.00× (#3)" in plain(report)


@pytest.mark.parametrize("default", [None, NAN, 0.0, INF])
def test_a_default_without_a_time_has_no_gain(default: float | None) -> None:
    """A division by zero, a mean that is NaN, or a problem counted as a gain of 1."""
    report = summarise(of(RUN, problem(), pick(100.0, default), problem(OTHER), pick(100.0, 300.0, OTHER)))
    assert report.gains == {2: 3.0}
    assert report.gain == pytest.approx(3.0)
    alone = summarise(of(RUN, problem(), pick(100.0, default)))
    assert alone.gain is None
    assert "no problem has both a pick and a time" in plain(alone)
    assert as_dict(alone)["problems"][0]["pick"]["default_us"] is None
    Page(page(alone))


def test_near_ties_are_within_two_percent_of_the_pick() -> None:
    """The pick counted as its own tie, the bound taken of the wrong time, a failure counted."""
    candidates = [timed(time, config) for time, config in zip((101.0, 102.0, 102.1, 99.0), LAUNCHES[1:], strict=False)]
    failed = timed(None, LAUNCHES[7], status="runtime")
    race = summarise(of(problem(), timed(100.0, LAUNCHES[0]), *candidates, failed, pick(100.0, None))).races[0]
    assert sorted(row.median_us or 0 for row in race.near) == [99.0, 101.0, 102.0]


def test_launches_apart_are_no_tie_and_are_told() -> None:
    """What calls make in place of the pick is not in the report, or is in it as a configuration as good as the pick."""
    beside = Candidate.apart([("dq", (place,), LaunchConfig(64, 32)) for place in (0, 1)])
    rows = timed(100.0, LAUNCHES[0]), timed(99.0, dict(beside.choices), route="apart")
    report = summarise(of(RUN, problem(), *rows, pick(100.0, 200.0, apart_us=99.0)))
    assert report.races[0].near == ()
    told = "apart 99.00 µs: calls make those"
    assert told in plain(report) and told in page(report)
    assert "apart dq 0=64x32_w4_s2, dq 1=64x32_w4_s2" in page(report)
    assert as_dict(report)["problems"][0]["pick"]["apart_us"] == 99.0
    slower = summarise(of(RUN, problem(), pick(100.0, 200.0, apart_us=101.0)))
    assert "apart 101.0 µs" in plain(slower) and "calls make" not in plain(slower)


def test_a_candidates_last_stage_counts() -> None:
    """A lucky time of the first race ranks before the finals; a resumed run's finals are those that count."""
    found = [timed(90.0, stage="race"), timed(110.0), timed(120.0), timed(70.0, stage="step")]
    race = summarise(of(problem(), *found, timed(100.0, LAUNCHES[0], "race"))).races[0]
    assert [row.median_us for row in race.timed] == [100.0, 120.0]


def test_the_pick_is_one_row() -> None:
    """Two texts in the same configuration: the other one taken for the winner."""
    found = [timed(130.0, LAUNCHES[0], variant="d4_even"), timed(100.0, LAUNCHES[0]), pick(100.0, 200.0)]
    race = summarise(of(problem(), *found)).races[0]
    assert race.winner is not None
    assert race.winner.median_us == 100.0
    picks = [text for _, text in Page(page(summarise(of(problem(), *found)))).all("text", "pick-label")]
    assert len(picks) == 1


def test_the_share_of_the_roof() -> None:
    """Microseconds for seconds, the memory's roof for the arithmetic's, half precision's peak for float32."""
    compute = problem(flops=989.4e12 * 40e-6, bytes=3352e9 * 10e-6)
    memory = problem(OTHER, flops=989.4e12 * 10e-6, bytes=3352e9 * 25e-6)
    fp32 = dataclasses.replace(THIRD, dtype="fp32")
    single = problem(fp32, flops=66.9e12 * 50e-6, bytes=1.0)
    report = summarise(of(RUN, compute, memory, single, *(pick(100.0, None, key) for key in (KEY, OTHER, fp32))))
    assert [race.roof_share for race in report.races] == pytest.approx([0.4, 0.25, 0.5])
    tf32 = Roof.over("h100", None)
    assert tf32.floor_us("tf32", 494.7e12, 1.0) == pytest.approx(1e6)


@pytest.mark.parametrize(("name", "bandwidth"), [("cpu", None), ("nvidia-unheard-of", 1000.0), ("nvidia-gb10", None)])
def test_a_device_without_peaks_has_no_roof(name: str, bandwidth: float | None) -> None:
    """A share of a roof that nobody knows, or no report on a new GPU."""
    run = dataclasses.replace(RUN, device=name, bandwidth=bandwidth)
    report = summarise(of(run, problem(), pick(100.0, 120.0)))
    assert report.races[0].roof_share is None
    assert "so no complete roof is drawn" in page(report)


def test_peaks_are_of_known_devices() -> None:
    """A slip in a name, by which a device loses its roof."""
    assert PEAKS.keys() <= devices.known().keys()
    assert all(peak.half > peak.fp32 for peak in PEAKS.values())


def test_work_is_counted_by_weight() -> None:
    """A run killed before its cheap problems began taken for complete: it has measured all problems it ever wrote."""
    report = summarise(of(RUN, problem(weight=0.6), problem(OTHER, weight=0.3), pick(100.0, 120.0)))
    assert (len(report.measured), len(report.races), report.work) == (1, 2, 0.6)
    assert "1 of 2 problems, 60 % of the estimated work" in plain(report)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([RUN, problem()], "unfinished: it was stopped, or is still running"),
        ([RUN, problem(), End(80.0, True)], "finished in 1 min 20 s"),
        ([RUN, problem(), End(600.0, False)], "out of budget after 10 min 0 s"),
        ([RUN, problem(), End(9.0, False), RUN, problem()], "resumed 1× · unfinished"),
        ([RUN, problem(), RUN, problem(), End(9.0, True)], "resumed 1× · finished in 9.0 s"),
        ([RUN, problem(), RUN, problem(), End(9.0, False)], "resumed 1× · out of budget after 9.0 s"),
        ([RUN, problem(), End(9.0, False), RUN, End(8.0, False), RUN], "resumed 2× · unfinished"),
        ([RUN, problem(), End(9.0, True), RUN], "resumed 1× · finished in 9.0 s"),
        ([RUN, problem(), End(9.0, True), RUN, problem()], "resumed 1× · unfinished"),
    ],
)
def test_how_a_run_ended(found: list[Row], said: str) -> None:
    """The end of a first start taken for the end of the resumed one, or a problem begun twice counted twice."""
    report = summarise(of(*found))
    assert said in plain(report)
    assert len(report.races) == 1


def test_words_and_numbers() -> None:
    """A minute of 60 seconds, four figures that turn into five, 1 rows, a word too long to be shown at all."""
    assert [duration(s) for s in (8.25, 59.99, 119.7, 3599.9, 7500)] == [
        "8.2 s",
        "60.0 s",
        "2 min 0 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
    values = (3.14159, 99.996, 171.23, 999.96, 1204.4, None, NAN)
    assert [micros(value) for value in values] == ["3.14", "100.0", "171.2", "1,000", "1,204", "—", "—"]
    assert (times(1.184), percent(0.5), times(None), percent(None)) == ("1.18×", "50 %", "—", "—")
    assert (count(1, "row"), count(0, "row")) == ("1 row", "0 rows")
    assert [shortened(text, 9) for text in ("a\n  b", "mangled9", "mangled_name")] == ["a b", "mangled9", "mangled …"]


# ---- The page --------------------------------------------------------------------------------------------------------


def test_no_row_is_lost(journal: Journal, shown: Page) -> None:
    """A problem, a candidate, a failure or a noisy row that the page leaves out."""
    candidates = {
        (row.key, row.route, *sorted(row.config.items())) for row in journal.measurements if row.status == "ok"
    }
    failed = [row for row in journal.measurements if row.status != "ok"]
    assert {row.status for row in failed} == set(STATUSES) - {"ok"}
    said = [int(text.split()[0]) for _, text in shown.all("summary")]
    assert len(said) == len(journal.problems) == len(keys())
    assert sum(said) == len(candidates) + len(failed)
    assert len(shown.all("line", "failure")) == len(failed)
    assert sum(int(text.split()[0]) for _, text in shown.all("dt") if text.split()[0].isdecimal()) == len(failed)
    assert len(shown.all("line", "noisy")) == 1
    assert len([a for a, _ in shown.all("tr") if a.get("role") == "row"]) == 1 + len(journal.problems)
    text = plain(summarise(journal))
    assert all(f"\n  {number:2}  " in text for number in range(1, len(journal.problems) + 1))


def test_each_candidate_has_its_mark(journal: Journal, shown: Page) -> None:
    """A candidate that is drawn twice or not at all, stages that look the same, two picks in one race."""
    report = summarise(journal)
    marks = [a["href"] for a, _ in shown.all("use")]
    legend = 5
    in_races = sum(marks.count(f"#mark-{name}") for name in ("pick", "default", "race", "step", "finals", "beyond"))
    assert in_races - legend == sum(len(race.timed) for race in report.races)
    assert marks.count("#mark-pick") - 1 == len(report.measured) == 20
    shapes = [text for tag, a, text in shown.found if tag == "g" and a.get("id", "").startswith("mark-")]
    assert len(shapes) == 6 + len(OP_WORDS)


def test_what_lies_beyond_the_axis_is_marked() -> None:
    """A candidate forty times slower that squeezes all others into a corner, or falls off the plot."""
    slow = timed(4000.0, LAUNCHES[3])
    shown = Page(page(summarise(of(RUN, problem(), timed(120.0), timed(100.0, LAUNCHES[0]), slow, pick(100.0, 120.0)))))
    assert [a["x"] for a, _ in shown.all("use", "beyond")] == ["7", "100%"]


NASTY = "</script><script>alert(1)</script><img src=x onerror='a'>\" ' & </style></title><!-- \x1b[31m\x00\ud800 ]]>"


def test_all_text_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markup in a message, a name or a version that the browser obeys; an escape sequence that the terminal obeys; half
    of a pair that no file can hold."""
    names = ("device", "arch", "torch", "triton", "driver", "command", "started")
    odd = dataclasses.replace(KEY, op=NASTY, dtype=NASTY, queries=NASTY, order=NASTY, flags=(NASTY,))
    config = {NASTY: NASTY}
    journal = write(
        tmp_path / "nasty.jsonl",
        [
            dataclasses.replace(RUN, **dict.fromkeys(names, NASTY)),
            problem(odd, workload=NASTY, default=config),
            timed(100.0, config, key=odd, route=NASTY, variant=NASTY, flag="noisy"),
            timed(None, config, key=odd, status=NASTY, message=NASTY),
            pick(100.0, 120.0, odd, config=config, route=NASTY, why=NASTY),
        ],
    )
    assert cli.main(["report", str(journal)]) == 0
    out = capsys.readouterr().out
    assert "alert(1)" in out
    assert "\x1b" not in out
    text = journal.with_suffix(".html").read_text(encoding="utf-8")
    shown = Page(text)
    assert len(shown.all("script")) == len(shown.all("style")) == 1
    assert shown.all("img") == []
    assert not [name for _, a, _ in shown.found for name in a if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)
    assert any("<img src=x onerror='a'>\" ' & </style>" in code for _, code in shown.all("code"))


def test_the_page_needs_nothing_from_elsewhere(shown: Page, journal: Journal) -> None:
    """A font, a script, a style or an image of another host; a link to a place that is not there."""
    text = page(summarise(journal))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|@font-face|srcset|fetch\(|innerHTML", text)
    assert not [a for _, a, _ in shown.found if "src" in a]
    ids = [a["id"] for _, a, _ in shown.found if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = [a["href"] for _, a, _ in shown.found if "href" in a]
    assert {href[0] for href in wanted} == {"#"}
    assert {href[1:] for href in wanted} <= set(ids)
    named = " ".join(a.get("aria-labelledby", "") for _, a, _ in shown.found).split()
    assert set(named) <= set(ids)


def test_it_can_be_read_without_eyes_and_without_colour(shown: Page) -> None:
    """A plot without a name, a heading cell that heads nothing, a page without a language, a mark of colour alone."""
    assert shown.all("html")[0][0]["lang"] == "en"
    for attributes, text in shown.all("svg"):
        hidden = attributes.get("aria-hidden") == "true"
        assert hidden or (attributes["role"] in ("img", "group") and "aria-labelledby" in attributes), text
    assert all(a["scope"] in ("row", "col") for a, _ in shown.all("th"))
    shapes = {a["id"] for _, a, _ in shown.found if a.get("id", "").startswith("mark-")}
    assert {f"mark-{name}" for name in ("pick", "default", "race", "step", "finals")} <= shapes


def test_colours_have_contrast(shown: Page) -> None:
    """Text that cannot be read in the sun or by an old eye: WCAG asks 4.5 to 1 of small letters."""
    ((_, style),) = shown.all("style")
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 2

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for theme in themes:
        for name in ("ink", "muted", "accent", "warm"):
            light, dark = sorted((luminance(theme[name]), luminance(theme["paper"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


ODD = (None, NAN, INF, -1.0, 0.0, 1e-300, 1e300)


@pytest.mark.parametrize("odd", ODD)
def test_no_place_in_a_plot_is_not_a_number(odd: float | None) -> None:
    """NaN, infinity or a negative time in a coordinate, for which the browser drops the whole mark without a word."""
    work = 1.0 if odd is None else odd
    found = [
        *(problem(flops=work, bytes=1e6), pick(100.0, odd, second_us=odd, low_us=work, high_us=work)),
        *(problem(OTHER, flops=1e9, bytes=work), pick(work, 100.0, OTHER)),
        *(timed(odd, LAUNCHES[0]), timed(100.0, LAUNCHES[1], low_us=odd, high_us=odd), timed(odd, LAUNCHES[2], "race")),
        *(timed(100.0, LAUNCHES[0], key=OTHER), timed(100.0, key=OTHER)),
    ]
    text = page(summarise(of(RUN, *found)))
    assert not re.search(r"=\"[^\"]*\b(nan|inf)", text, re.IGNORECASE)
    for tag, attributes, _ in Page(text).found:
        if tag in ("line", "circle", "use", "rect", "text"):
            for name in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"} & attributes.keys():
                assert math.isfinite(float(attributes[name].rstrip("%")))
                assert attributes[name][-1] != "%" or 0 <= float(attributes[name][:-1]) <= 100
    json.dumps(as_dict(summarise(of(RUN, *found))), allow_nan=False)


@pytest.mark.parametrize("found", [[], [RUN], [RUN, problem()], [RUN, problem(), timed(None, status="timeout")]])
def test_hardly_anything_to_tell(found: list[Row]) -> None:
    """A run looked at in its first second: the first of nothing, the mean of nothing, an empty axis."""
    report = summarise(of(*found))
    assert Page(page(report)).all("h1")
    assert plain(report)
    json.dumps(as_dict(report), allow_nan=False)


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs folder, empty."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    folder = tmp_path / "dilated-attention" / "runs"
    folder.mkdir(parents=True)
    return folder


def few() -> list[Row]:
    return [RUN, problem(), timed(120.0), timed(100.0, LAUNCHES[0]), pick(100.0, 120.0), End(12.0, True)]


def test_a_torn_journal_is_reported(
    written: Path, journal: Journal, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report on a killed run is a traceback, or the torn row is guessed at."""
    torn = runs / "killed.jsonl"
    torn.write_bytes(written.read_bytes())
    assert cli.main(["report", "killed"]) == 0
    out = capsys.readouterr().out
    assert "20 of 21 problems" in out
    assert "unfinished" in out
    assert f"page: {torn.with_suffix('.html')}" in out
    whole = [row for row in rows() if isinstance(row, Measurement)]
    assert journal.measurements == whole[:-1]


def test_a_run_by_name_by_path_and_the_newest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oldest run, or another one of that name."""
    for age, name in enumerate(("new", "older", "oldest")):
        path = write(runs / f"{name}.jsonl", few())
        os.utime(path, (1e9 - age, 1e9 - age))
    for arguments, name in (([], "new"), (["older"], "older"), ([str(runs / "oldest.jsonl")], "oldest")):
        assert cli.main(["report", *arguments]) == 0
        assert f"page: {runs / name}.html" in capsys.readouterr().out


def test_json_is_json_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of the summary in what a script reads; a page that nobody asked for."""
    path = write(runs / "run.jsonl", few())
    assert cli.main(["report", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gain"], found["finished"], found["problems"][0]["pick"]["median_us"]) == (1.2, True, 100.0)
    assert not path.with_suffix(".html").exists()
    assert cli.main(["report", "run", "--json", "--html", str(runs / "x.html")]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (runs / "x.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_is_opened(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path handed to the browser."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    write(runs / "run.jsonl", few())
    monkeypatch.chdir(runs)
    assert cli.main(["report", "run.jsonl", "--open"]) == 0
    assert opened == [(runs / "run.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no run in .*runs; `dilated-attention tune` makes one"),
        (["nowhere"], "'nowhere' is neither a journal file nor a run in .*; the newest there: none yet"),
        (["broken.jsonl"], "broken.jsonl:1: is no row of a tuning journal"),
        (["run.jsonl", "--html", "missing/x.html"], "missing.x.html cannot be written: No such file"),
    ],
)
def test_what_cannot_be_reported_is_a_sentence(
    arguments: list[str],
    sentence: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback for a name that is mistyped."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run.jsonl", few())
    (tmp_path / "broken.jsonl").write_text("{}\n", encoding="utf-8")
    assert cli.main(["report", *arguments]) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_terminal_and_a_pipe_are_told_the_same(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours in a file, a table without its problems in a narrow window, a failure where rich is not installed."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "160")
    report = summarise(journal)
    window, pipe, bare = Terminal(), io.StringIO(), Terminal()
    show(report, window)
    show(report, pipe)
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    show(report, bare)
    assert pipe.getvalue() == bare.getvalue() == plain(report) + "\n"
    assert "\x1b" not in pipe.getvalue()
    for row in ("fwd bf16 D64 2048/1", "20 of 21 problems", "illegal_access"):
        assert row in pipe.getvalue()
        assert row in window.getvalue()
