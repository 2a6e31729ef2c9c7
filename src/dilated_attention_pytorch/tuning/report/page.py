"""The report as one HTML file: no network, no fonts or scripts of others, whole without JavaScript.

It is built with the standard library rather than with a template: everything is text in an element, so the serialiser
escapes all of it, and the console command needs no package for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from ..journal import Measurement
from . import plots
from .facts import (
    OP_WORDS,
    STATUS_WORDS,
    Race,
    Report,
    config_name,
    count,
    is_positive,
    micros,
    percent,
    shortened,
    time_of,
    times,
)
from .markup import document, tag
from .text import place, versions, when

HERE = Path(__file__).parent
LONGEST = 1000
"""Characters of a kind's example message; a compiler may print a whole program."""


def page(report: Report) -> str:
    """The text of the HTML file."""
    run = report.run
    where = run.device if run is not None else "no run yet"
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Tuning report: {where}"),
        tag("style", style),
    )
    sections = (_problems, _roofline, _races, _failures, _noisy)
    main = tag("main", _figures(report), *(part for section in sections for part in section(report)))
    body = tag("body", plots.symbols(), _masthead(report, where), main, tag("script", script))
    return document(tag("html", head, body, lang="en"))


def _masthead(report: Report, where: str) -> Element:
    run = report.run
    lines = (" · ".join(facts(report)) for facts in (place, versions, when))
    command = [tag("p", tag("code", run.command), class_="command")] if run is not None else []
    return tag(
        "header",
        tag("p", "Tuning report", class_="kicker"),
        tag("h1", where),
        *(tag("p", line) for line in lines if line),
        *command,
    )


def _figures(report: Report) -> Element:
    failed = sum(map(len, report.failures.values()))
    kinds = [f"{len(rows)} {kind.replace('_', ' ')}" for kind, rows in report.failures.items()]
    most = ", ".join(kinds[:2]) + (f" and {len(kinds) - 2} kinds more" if len(kinds) > 2 else "")
    worst = next(iter(report.gains.items()), None)
    said = [
        (f"{len(report.measured)} of {len(report.races)}", "problems measured", f"{percent(report.work)} of the work"),
        (times(report.gain), "gain over the default", f"geometric mean of {len(report.gains)}"),
        (times(worst[1] if worst else None), "least gain", f"problem {worst[0]}" if worst else "no default was timed"),
        (str(report.near), "near-ties", "candidates within 2 % of a pick"),
        (str(failed), "failures", most or "every candidate ran"),
        (str(len(report.noisy)), "noisy rows", "spread too wide, measured twice"),
    ]
    items = (
        tag("div", tag("dt", name), tag("dd", tag("strong", number), tag("span", note))) for number, name, note in said
    )
    return tag("dl", *items, class_="figures")


# ---- Problems --------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("#", "number"),
    ("Problem", "text"),
    ("Pick", "text"),
    ("Time, µs", "number"),
    ("Default, µs", "number"),
    ("Gain", "number"),
    ("Second, µs", "number"),
    ("Of roof", "number"),
)


def _problems(report: Report) -> Iterator[Element]:
    if not report.races:
        yield tag("p", "The journal holds no problem yet.")
        return
    widest = max([1.0, *report.gains.values()])
    heads = (tag("th", name, scope="col", role="columnheader", data_sort=kind) for name, kind in COLUMNS)
    rows = (_problem(race, widest) for race in report.races)
    yield tag("h2", "Problems", id="problems")
    yield tag(
        "p",
        "Each problem is what its winner is stored under. Gain is the untuned default’s time over the pick’s, both of "
        "the interleaved finals; the roof is the shortest time that the device’s peak arithmetic and bandwidth allow.",
        class_="lead",
    )
    yield tag(
        "table",
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *rows, role="rowgroup"),
        class_="problems",
        role="table",
        aria_labelledby="problems",
    )


def _problem(race: Race, widest: float) -> Element:
    pick = race.pick
    title, rest = race.words
    name = tag("a", title, href=f"#problem-{race.number}")
    small = tag("small", rest, " · ", race.problem.workload)
    cells: list[tuple[tuple[str | Element, ...], float | None]] = [((str(race.number),), race.number)]
    if pick is None:
        best = f"best so far {micros(time_of(race.timed[0]))} µs" if race.timed else "nothing timed"
        chosen: tuple[str | Element, ...] = ("none", tag("small", best))
        cells += [(chosen, None), *[(("—",), None)] * 5]
    else:
        why = [tag("small", said) for said in ("" if pick.why == "fastest" else pick.why, race.apart) if said]
        spread = tag("small", f"{micros(pick.low_us)}–{micros(pick.high_us)}")
        behind = "" if race.behind is None else f"{100 * (race.behind - 1):+.1f} %"
        cells += [
            ((tag("code", config_name(pick.config, pick.route)), *why), None),
            ((micros(pick.median_us), spread), pick.median_us),
            ((micros(pick.default_us),), pick.default_us),
            (_gain(race.gain, widest), race.gain),
            ((micros(pick.second_us), tag("small", behind)), pick.second_us),
            (_share(race.roof_share), race.roof_share),
        ]
    head = tag("th", name, small, scope="row", role="rowheader", data_number=race.number)
    shown = [
        tag(
            "td", *content, role="cell", data_label=label, data_value=value if is_positive(value) else None, class_=kind
        )
        for (content, value), (label, kind) in zip(cells, (COLUMNS[0], *COLUMNS[2:]), strict=True)
    ]
    return tag("tr", shown[0], head, *shown[1:], role="row")


def _gain(gain: float | None, widest: float) -> tuple[str | Element, ...]:
    if gain is None:
        return ("—",)
    width = f"{100 * max(gain - 1, 0) / (widest - 1):.0f}%" if widest > 1 else "0%"
    return (times(gain), _bar(width))


def _share(share: float | None) -> tuple[str | Element, ...]:
    return ("—",) if share is None else (percent(share), _bar(f"{100 * min(share, 1):.0f}%"))


def _bar(width: str) -> Element:
    return tag("span", tag("i", style=f"width:{width}"), class_="bar", aria_hidden="true")


# ---- Plots -----------------------------------------------------------------------------------------------------------


def _roofline(report: Report) -> Iterator[Element]:
    drawn = plots.roofline(report)
    if drawn is None:
        return
    yield tag("h2", "Under the roof")
    known = report.roof.bandwidth and report.roof.peak
    text = "A mark is a pick, the small ring below it the untuned default; the line between them is what tuning won. "
    text += (
        "Traffic counts what a launch must read and write at least, so what the caches absorb can lift a mark."
        if known
        else "This device’s peak arithmetic or bandwidth is not in the table, so no complete roof is drawn."
    )
    yield tag("p", text, class_="lead")
    shown = {race.problem.key.op for race in report.measured}
    marks = (tag("span", plots.key(op, f"point {op}"), word) for op, word in OP_WORDS.items() if op in shown)
    legend = tag("p", *marks, class_="legend")
    yield tag("figure", legend, drawn, class_="roofline")


def _races(report: Report) -> Iterator[Element]:
    if not report.races:
        return
    right = plots.last(report)
    words = {"pick": "pick", "default": "untuned default", **plots.STAGE_WORDS}
    words |= {"beyond": f"beyond {right:g}×"} if right == plots.WIDEST else {}
    yield tag("h2", "Races")
    yield tag(
        "p",
        "Candidates from the fastest down, by their time over the pick’s, with the interval that holds the median; a "
        "mark’s shape is the last stage it reached. The band is 2 %: what lies in it is as good as the pick. "
        "Dashed intervals are noisy. Strokes below are candidates that failed, by kind.",
        class_="lead",
    )
    yield tag("p", *(tag("span", plots.key(name, name), word) for name, word in words.items()), class_="legend")
    yield tag("div", *(_race(race, right) for race in report.races), class_="races")


def _race(race: Race, right: float) -> Element:
    title, rest = race.words
    pick = race.pick
    if pick is None:
        verdict = tag(
            "p", "No pick: the run ended before this problem was decided, or no candidate held.", class_="verdict"
        )
    else:
        text = f" {micros(pick.median_us)} µs, {pick.why}"
        text += f"; {len(race.near)} as good" if race.near else ""
        text += f"; {race.apart}" if race.apart else ""
        verdict = tag("p", tag("code", config_name(pick.config, pick.route)), text, class_="verdict")
    drawn = plots.race_plot(race, right)
    rows = [*race.timed, *race.failed]
    parts = [drawn, _candidates(race, rows)] if drawn is not None else [tag("p", "Nothing was measured.")]
    return tag(
        "article",
        tag("h3", tag("span", str(race.number), class_="ordinal"), " ", title),
        tag("p", rest, class_="key-rest"),
        verdict,
        *parts,
        id=f"problem-{race.number}",
    )


def _candidates(race: Race, rows: Iterable[Measurement]) -> Element:
    """The plot's numbers, folded away."""
    shown = []
    base = race.time_us
    for row in rows:
        timed = row.status == "ok"
        relative = times(time_of(row) / base) if timed and base else "—"
        spread = f"{micros(row.low_us)}–{micros(row.high_us)}" if timed else "—"
        cells = (micros(row.median_us) if timed else "—", spread, relative)
        end = f"{row.stage}, {row.flag}" if row.flag else row.stage if timed else row.status.replace("_", " ")
        why = [tag("small", shortened(row.message))] if row.message else []
        name = config_name(row.config, row.route)
        shown.append(
            tag(
                "tr",
                tag("th", name, scope="row"),
                *(tag("td", c, class_="number") for c in cells),
                tag("td", end, *why),
            )
        )
    columns = {"Candidate": None, "µs": "number", "interval": "number", "× pick": "number", "stage or failure": None}
    return tag("details", tag("summary", f"{count(len(shown), 'row')} as a table"), _table(columns, shown))


def _table(columns: Mapping[str, str | None], rows: Iterable[Element]) -> Element:
    """A table that scrolls where it has no room; columns by name, with the class of those that are numbers."""
    heads = (tag("th", name, scope="col", class_=kind) for name, kind in columns.items())
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return tag("div", table, class_="scroll")


# ---- What went wrong -------------------------------------------------------------------------------------------------


def _failures(report: Report) -> Iterator[Element]:
    if not report.failures:
        return
    yield tag("h2", "Failures")
    yield tag("p", "A candidate that fails costs nothing but its row; the first message of each kind:", class_="lead")
    items = []
    for kind, failed in report.failures.items():
        race, row = failed[0]
        link = tag("a", f"problem {race.number}", href=f"#problem-{race.number}")
        name = tag("code", config_name(row.config, row.route))
        message = row.message.strip()[:LONGEST] or "no message"
        items += [
            tag("dt", tag("strong", str(len(failed))), " ", kind.replace("_", " ")),
            tag("dd", tag("p", STATUS_WORDS.get(kind, "")), tag("p", name, ", ", link), tag("pre", message)),
        ]
    yield tag("dl", *items, class_="failures")


def _noisy(report: Report) -> Iterator[Element]:
    if not report.noisy:
        return
    yield tag("h2", "Noisy rows")
    yield tag(
        "p",
        "Times that spread too wide even when measured again: another process was on the device, or its clock moved.",
        class_="lead",
    )
    words, numbers = ("Problem", "Candidate", "Stage"), ("Time, µs", "Low", "High")
    rows = []
    for race, row in report.noisy:
        link = tag("a", f"{race.number}", href=f"#problem-{race.number}")
        spread = (micros(value) for value in (row.median_us, row.low_us, row.high_us))
        rows.append(
            tag(
                "tr",
                tag("th", link, scope="row"),
                tag("td", tag("code", config_name(row.config, row.route))),
                tag("td", row.stage),
                *(tag("td", value, class_="number") for value in spread),
            )
        )
    yield _table(dict.fromkeys(words) | dict.fromkeys(numbers, "number"), rows)
