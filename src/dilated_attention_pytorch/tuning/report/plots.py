"""The page's plots as SVG: each as wide as its column, in the page's own type and colours, readable without colour.

Places along the width are percentages and heights are pixels, so a plot fills a phone and a wall alike while its
letters keep their size. Shapes tell stages apart; `symbols` defines them once for the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from xml.etree.ElementTree import Element

from ..journal import Measurement
from .facts import NEAR, OP_WORDS, Race, Report, config_name, micros, percent, ratio, shortened, time_of
from .markup import tag
from .peaks import arithmetic

FIRST = 0.94
"""Left end of a race's axis, in times of the pick."""
WIDEST = 4.0
"""Races reach no further right; slower candidates are drawn at the edge."""
PITCH = 8
"""Pixels from candidate to candidate."""
TICKS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)

STAGE_WORDS = {"race": "first race", "step": "a step around the best", "finals": "finals"}


def symbols() -> Element:
    """Every mark, once: stages, pick, default and off the scale; then one for each kernel."""
    shapes = {
        "race": tag("circle", r="2.6"),
        "step": tag("path", d="M0-3.6 3.4 2.4H-3.4Z"),
        "finals": tag("circle", r="3.2"),
        "pick": tag("path", d="M0-6 6 0 0 6-6 0Z"),
        "default": tag("path", d="M-4-4H4V4H-4Z"),
        "beyond": tag("path", d="M-7-3.5-1 0-7 3.5"),
        "fwd": tag("circle", r="4.2"),
        "dkdv": tag("path", d="M-4-4H4V4H-4Z"),
        "dq": tag("path", d="M0-5 4.6 3.4H-4.6Z"),
        "bwd": tag("path", d="M0-5 5 0 0 5-5 0Z"),
    }
    # A symbol would be clipped to a box; a group that is used is not.
    groups = (tag("g", shape, id=f"mark-{name}") for name, shape in shapes.items())
    return tag("svg", tag("defs", *groups), width="0", height="0", aria_hidden="true", class_="defs")


def mark(name: str, x: str, y: float, class_: str | None = None) -> Element:
    """One of `symbols`, placed."""
    return tag("use", href=f"#mark-{name}", x=x, y=f"{y:g}", class_=class_ or name)


def key(name: str, class_: str) -> Element:
    """A mark in a line of text."""
    return tag("svg", mark(name, "7", 7, class_), class_="key", width="14", height="14", aria_hidden="true")


# ---- Races -----------------------------------------------------------------------------------------------------------


def last(report: Report) -> float:
    """Right end of all races' axes, in times of the pick: the same for all, so that they can be compared."""
    reach = 1.5
    for race in report.races:
        if base := race.time_us:
            reach = max([reach, *(time_of(row) / base for row in race.timed)])
    return min(reach, WIDEST)


def race_plot(race: Race, right: float) -> Element | None:
    """A problem's candidates below each other, fastest first, along their time; then its failures by kind.

    Args:
        race: The problem.
        right: Right end of the axis, in times of the pick.
    """
    base = race.time_us
    if base is None and not race.failed:
        return None
    kinds = _kinds(race.failed)
    bottom = 20 + PITCH * len(race.timed) if base else 0
    height = bottom + 8 + 16 * len(kinds)
    parts: list[Element] = []
    if base is not None:
        parts += _scale(race, right, bottom)
        for place, row in enumerate(race.timed):
            parts.append(_candidate(race, row, base, right, 22 + PITCH * place))
        parts += _labels(race, base, right)
    for place, (kind, rows) in enumerate(kinds.items()):
        parts += _failures(kind, rows, bottom + 12 + 16 * place)
    title, _ = race.words
    said = f"{len(race.timed)} candidates with a time, {len(race.failed)} without"
    name = f"race-{race.number}"
    return tag(
        "svg",
        tag("title", f"Race of problem {race.number}: {title}", id=f"{name}-title"),
        tag("desc", f"{said}. The table below the plot has every row.", id=f"{name}-desc"),
        *parts,
        class_="plot race-plot",
        width="100%",
        height=f"{height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _along(value: float, right: float) -> str:
    """Where on a race's axis a time stands that is `value` times the pick's; what lies outside stands at the edge."""
    within = min(max(value, FIRST), right)
    return f"{100 * math.log(within / FIRST) / math.log(right / FIRST):.2f}%"


def _scale(race: Race, right: float, bottom: float) -> Iterator[Element]:
    start, stop = (100 * math.log(t / FIRST) / math.log(right / FIRST) for t in (max(FIRST, 1 / NEAR), NEAR))
    yield tag("rect", x=f"{start:.2f}%", y="16", width=f"{stop - start:.2f}%", height=f"{bottom - 16:g}", class_="near")
    room = -math.inf
    for tick in TICKS:
        if tick > right * 1.001:
            break
        x = _along(tick, right)
        yield tag("line", x1=x, x2=x, y1="16", y2=f"{bottom:g}", class_="grid")
        # A narrow screen has 300 pixels: a label needs a tenth of them.
        if float(x[:-1]) - room >= 10:
            room = float(x[:-1])
            anchor = "end" if room > 96 else "middle"
            yield tag("text", f"{tick:g}×", x=x, y="10", text_anchor=anchor, class_="tick")
    if race.gain is not None and FIRST < race.gain <= right:
        x = _along(race.gain, right)
        yield tag("line", x1=x, x2=x, y1="16", y2=f"{bottom:g}", class_="default-line")


def _candidate(race: Race, row: Measurement, base: float, right: float, y: float) -> Element:
    place = time_of(row) / base
    spread = [ratio(end, base) for end in (row.low_us, row.high_us)]
    told = f"{config_name(row.config, row.route)}: {micros(row.median_us)} µs"
    told += f" ({micros(row.low_us)} to {micros(row.high_us)})" if None not in spread else ""
    parts = [tag("title", f"{told}, {STAGE_WORDS[row.stage]}{', noisy' if row.flag else ''}")]
    if place > right:
        return tag("g", *parts, mark("beyond", "100%", y))
    low, high = spread
    if low and high:
        x1, x2 = _along(low, right), _along(high, right)
        parts.append(tag("line", x1=x1, x2=x2, y1=f"{y:g}", y2=f"{y:g}", class_="noisy" if row.flag else "whisker"))
    name = "pick" if row is race.winner else "default" if race.is_default(row) else row.stage
    return tag("g", *parts, mark(name, _along(place, right), y))


def _labels(race: Race, base: float, right: float) -> Iterator[Element]:
    """Names beside the pick and the default, on the side where there is room."""
    for place, row in enumerate(race.timed):
        won, default = row is race.winner, race.is_default(row)
        if not (won or default) or time_of(row) / base > right:
            continue
        names = [f"pick {config_name(row.config, row.route)}"] * won + ["default"] * default
        ends = [_along(ratio(end, base) or time_of(row) / base, right) for end in (row.low_us, row.high_us)]
        left = float(ends[1][:-1]) > 70
        yield tag(
            "text",
            ", ".join(names),
            x=ends[0] if left else ends[1],
            dx="-10" if left else "10",
            y=str(26 + PITCH * place),
            text_anchor="end" if left else "start",
            class_=f"label {'pick' if won else 'default'}-label",
        )


def _kinds(failed: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    kinds: dict[str, list[Measurement]] = {}
    for row in failed:
        kinds.setdefault(row.status, []).append(row)
    return kinds


def _failures(kind: str, rows: list[Measurement], y: float) -> Iterator[Element]:
    yield tag("text", f"{kind.replace('_', ' ')} {len(rows)}", x="0", y=f"{y + 4:g}", class_="tick")
    step = min(2.0, 64 / len(rows))
    for place, row in enumerate(rows):
        x = f"{36 + step * place:.2f}%"
        told = tag("title", f"{config_name(row.config, row.route)}: {shortened(row.message) or kind}")
        yield tag("line", told, x1=x, x2=x, y1=f"{y - 5:g}", y2=f"{y + 5:g}", class_="failure")


# ---- Roofline --------------------------------------------------------------------------------------------------------

ARITHMETIC = {"half": "bf16, fp16", "tf32": "tf32", "fp32": "fp32"}

TALL = 340
"""Pixels of the roofline plot between its axes."""


class _Log:
    """A logarithmic axis over an interval, as shares of it."""

    def __init__(self, values: Iterable[float]) -> None:
        known = list(values)
        self.first, self.last = min(known) / 1.6, max(known) * 1.6

    def __call__(self, value: float) -> float:
        return (math.log(value) - math.log(self.first)) / (math.log(self.last) - math.log(self.first))

    def ticks(self) -> Iterator[float]:
        """Powers of ten, with 2 and 5 of each where the axis is short."""
        steps = (1, 2, 5) if self.last / self.first < 1000 else (1,)
        for decade in range(math.floor(math.log10(self.first)), math.ceil(math.log10(self.last)) + 1):
            yield from (v for step in steps if self.first <= (v := step * 10.0**decade) <= self.last)


class _Point(NamedTuple):
    """A pick under the roof: operations a byte, TFLOP/s, and TFLOP/s of the untuned default."""

    race: Race
    intensity: float
    speed: float
    before: float | None


def _points(report: Report) -> Iterator[_Point]:
    for race in report.measured:
        intensity = ratio(race.problem.flops, race.problem.bytes)
        speed = ratio(race.problem.flops / 1e6, race.time_us)
        if intensity and speed and race.pick is not None:
            yield _Point(race, intensity, speed, ratio(race.problem.flops / 1e6, race.pick.default_us))


def roofline(report: Report) -> Element | None:
    """Operations a second over operations a byte: each pick below the device's roof, and its default below it.

    None where no problem has a pick with work that is known.
    """
    points = list(_points(report))
    if not points:
        return None
    kinds = dict.fromkeys(arithmetic(point.race.problem.key) for point in points)
    peaks = {kind: peak for kind in kinds if (peak := report.roof.tflops(kind))}
    bandwidth = report.roof.bandwidth
    ridges = [1e3 * peak / bandwidth for peak in peaks.values()] if bandwidth else []
    x = _Log([*(point.intensity for point in points), *ridges])
    speeds = [speed for point in points for speed in (point.speed, point.before) if speed]
    y = _Log([*speeds, *peaks.values()])

    roofs = [*_roofs(bandwidth, peaks, x, y)] if bandwidth else []
    levels = [TALL * (1 - y(peak)) for peak in peaks.values()] if bandwidth else []
    parts = [*_frame(x, y), *roofs, *_marks(points, x, y, levels)]
    described = "Each pick's operations a second over its operations a byte, on logarithmic axes"
    described += ", below the device's roof." if ridges else "; the device's peaks are not known."
    return tag(
        "svg",
        tag("title", "Roofline", id="roofline-title"),
        tag("desc", described, id="roofline-desc"),
        *parts,
        class_="plot roofline-plot",
        width="100%",
        height=str(TALL),
        role="group",
        aria_labelledby="roofline-title roofline-desc",
    )


def _frame(x: _Log, y: _Log) -> Iterator[Element]:
    for value in x.ticks():
        place = f"{100 * x(value):.2f}%"
        yield tag("line", x1=place, x2=place, y1="0", y2=str(TALL), class_="grid")
        yield tag("text", f"{value:g}", x=place, y=str(TALL + 16), text_anchor="middle", class_="tick")
    for value in y.ticks():
        level = TALL * (1 - y(value))
        yield tag("line", x1="0", x2="100%", y1=f"{level:.1f}", y2=f"{level:.1f}", class_="grid")
        yield tag("text", f"{value:g}", x="-6", y=f"{level + 4:.1f}", text_anchor="end", class_="tick")
    yield tag("text", "flop a byte", x="100%", y=str(TALL + 34), text_anchor="end", class_="tick")
    yield tag("text", "TFLOP/s", x="-6", y="-10", text_anchor="start", class_="tick")


def _roofs(bandwidth: float, peaks: dict[str, float], x: _Log, y: _Log) -> Iterator[Element]:
    """The memory's slope, and a flat roof for each kind of arithmetic that the run used."""

    def line(start: tuple[float, float], stop: tuple[float, float]) -> Element:
        (x1, y1), (x2, y2) = ((f"{100 * x(i):.2f}%", f"{TALL * (1 - y(t)):.1f}") for i, t in (start, stop))
        return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="roof")

    slope = bandwidth / 1e3
    low = max(x.first, y.first / slope)
    high = min([x.last, y.last / slope, *([max(peaks.values()) / slope] if peaks else [])])
    if low < high:
        yield line((low, low * slope), (high, high * slope))
        middle = math.sqrt(low * high)
        place, level = f"{100 * x(middle):.2f}%", f"{TALL * (1 - y(middle * slope)) - 4:.1f}"
        text = f"{bandwidth:g} GB/s"
        yield tag("text", text, x=place, y=level, dx="-8", text_anchor="end", class_="tick over")
    for kind, peak in peaks.items():
        yield line((max(peak / slope, x.first), peak), (x.last, peak))
        level = f"{TALL * (1 - y(peak)) - 6:.1f}"
        text = f"{peak:g} TFLOP/s {ARITHMETIC[kind]}"
        yield tag("text", text, x="100%", y=level, text_anchor="end", class_="tick over")


def _marks(points: Iterable[_Point], x: _Log, y: _Log, roofs: Iterable[float]) -> Iterator[Element]:
    """Each pick above its default, with its number where no other number and no roof's label stands."""
    labelled = [(float(place), level - 6) for level in roofs for place in range(60, 101, 4)]
    for race, intensity, speed, before in points:
        place, level = 100 * x(intensity), TALL * (1 - y(speed))
        at = f"{place:.2f}%"
        title, rest = race.words
        parts = [tag("title", f"{race.number}: {title} · {rest}, {percent(race.roof_share)} of the roof")]
        if before is not None:
            start = f"{TALL * (1 - y(before)):.1f}"
            parts.append(tag("line", x1=at, x2=at, y1=start, y2=f"{level:.1f}", class_="gained"))
            parts.append(tag("circle", cx=at, cy=start, r="2", class_="before"))
        op = race.problem.key.op if race.problem.key.op in OP_WORDS else "fwd"
        parts.append(mark(op, at, round(level, 1), f"point {op}"))
        if all(abs(place - p) > 4 or abs(level - q) > 14 for p, q in labelled):
            labelled.append((place, level))
            parts.append(tag("text", str(race.number), x=at, y=f"{level + 4:.1f}", dx="8", class_="tick"))
        yield tag("a", *parts, href=f"#problem-{race.number}")
