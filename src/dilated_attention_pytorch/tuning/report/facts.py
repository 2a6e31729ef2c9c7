"""What a journal says, in numbers: computed once, and said by the terminal, the page and JSON alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ...config import ProblemKey
from ...errors import ConfigError
from ..journal import Config, End, Journal, Measurement, Pick, ProblemRow, Run
from ..space import Candidate
from .peaks import Roof, arithmetic

NEAR = 1.02
"""A candidate whose time is at most this many times the pick's is as good as the pick."""

OP_WORDS = {"fwd": "forward", "dkdv": "dK and dV", "dq": "dQ", "bwd": "all gradients"}
STATUS_WORDS = {
    "compile": "The compiler refused it.",
    "timeout": "It ran or compiled past its time limit and was ended.",
    "resources": "The device refused the launch: too much shared memory or too many registers.",
    "runtime": "It raised an error while it ran.",
    "illegal_access": "It touched memory that is not its own; its worker was started afresh.",
    "correctness": "It computed something else than the reference does.",
    "screened": "Left out before any launch: compiled, it cannot fit or spills too much.",
}
TIMED = ("race", "step", "finals")
"""Stages that time, from the first look to the last word."""


@dataclass(frozen=True)
class Race:
    """One problem: what was tried, and what won.

    Attributes:
        number: Its place in the run, from 1.
        problem: What was asked.
        pick: What won; None where the run ended before.
        timed: Every candidate with a time, by its last stage, fastest first.
        failed: Rows of candidates that have none.
        noisy: Rows whose times spread too wide.
        floor_us: The shortest time that the device's peaks allow; None where they are not known.
    """

    number: int
    problem: ProblemRow
    pick: Pick | None
    timed: tuple[Measurement, ...]
    failed: tuple[Measurement, ...]
    noisy: tuple[Measurement, ...]
    floor_us: float | None

    @property
    def words(self) -> tuple[str, str]:
        """The key in words: kernel and branches, and the rest."""
        return in_words(self.problem.key)

    @property
    def time_us(self) -> float | None:
        """The pick's time, or the best so far."""
        if self.pick is not None:
            return self.pick.median_us
        return self.timed[0].median_us if self.timed else None

    @property
    def gain(self) -> float | None:
        """How many times faster than the untuned default the pick is; both are of the finals."""
        return ratio(self.pick.default_us, self.pick.median_us) if self.pick is not None else None

    @property
    def behind(self) -> float | None:
        """The runner-up's time over the pick's."""
        return ratio(self.pick.second_us, self.pick.median_us) if self.pick is not None else None

    @property
    def roof_share(self) -> float | None:
        """The shortest time that the device allows over the pick's: 1 is the roof."""
        return ratio(self.floor_us, self.pick.median_us) if self.pick is not None else None

    @property
    def near(self) -> tuple[Measurement, ...]:
        """Candidates other than the pick that are as good; an external route is none."""
        if self.pick is None:
            return ()
        bound, route = NEAR * self.pick.median_us, self.pick.route
        rows = (row for row in self.timed if row is not self.winner and row.route == route)
        return tuple(row for row in rows if time_of(row) <= bound)

    @cached_property
    def winner(self) -> Measurement | None:
        """The pick among the timed rows; of several texts in its configuration, the one that took its time."""
        pick = self.pick
        if pick is None:
            return None
        same = [row for row in self.timed if (row.config, row.route) == (pick.config, pick.route)]
        return min(same, key=lambda row: abs(time_of(row) - pick.median_us), default=None)

    @property
    def apart(self) -> str:
        """What the launches took that the pick stands in for, in words; nothing where there are none."""
        if self.pick is None or not is_positive(self.pick.apart_us):
            return ""
        return f"apart {micros(self.pick.apart_us)} µs" + (": calls make those" if self.pick.is_beaten else "")

    def is_default(self, row: Measurement) -> bool:
        """Whether the row is of the untuned default."""
        return self.problem.default is not None and row.config == self.problem.default


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        run: Where it ran; of a resumed run, where it was resumed.
        starts: How often it was started.
        end: How it ended; None where it was killed or still runs, as far as its rows tell.
        races: Its problems in the order of the run.
        roof: What the device can reach.
    """

    run: Run | None
    starts: int
    end: End | None
    races: tuple[Race, ...]
    roof: Roof

    @cached_property
    def measured(self) -> tuple[Race, ...]:
        """Races with a pick."""
        return tuple(race for race in self.races if race.pick is not None)

    @cached_property
    def work(self) -> float:
        """Share of the run's estimated work that has a pick, 0..1."""
        return min(math.fsum(race.problem.weight for race in self.measured), 1.0)

    @cached_property
    def gains(self) -> dict[int, float]:
        """Gain over the untuned default by the race's number, least first; races without one are left out."""
        found = {race.number: race.gain for race in self.races if race.gain is not None}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @cached_property
    def gain(self) -> float | None:
        """Geometric mean of the gains."""
        logs = [math.log(gain) for gain in self.gains.values()]
        return math.exp(math.fsum(logs) / len(logs)) if logs else None

    @cached_property
    def near(self) -> int:
        """Candidates as good as their problem's pick."""
        return sum(len(race.near) for race in self.races)

    @cached_property
    def failures(self) -> dict[str, list[tuple[Race, Measurement]]]:
        """Failed rows by kind, the most frequent first."""
        found: dict[str, list[tuple[Race, Measurement]]] = {}
        for race in self.races:
            for row in race.failed:
                found.setdefault(row.status, []).append((race, row))
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    @cached_property
    def noisy(self) -> tuple[tuple[Race, Measurement], ...]:
        """Rows whose times spread too wide, with their races."""
        return tuple((race, row) for race in self.races for row in race.noisy)

    @property
    def state(self) -> str:
        """How the run ended, in words."""
        if self.end is None:
            return "unfinished: it was stopped, or is still running"
        return f"{'finished in' if self.end.finished else 'out of budget after'} {duration(self.end.seconds)}"


def summarise(journal: Journal) -> Report:
    """A journal's numbers. A resumed run is one run; a problem begun twice is one problem, its last pick counts."""
    run = journal.runs[-1] if journal.runs else None
    roof = Roof.over(run.device, run.bandwidth) if run is not None else Roof()
    problems = {problem.key: problem for problem in journal.problems}
    picks = {pick.key: pick for pick in journal.picks if is_positive(pick.median_us)}
    rows: dict[ProblemKey, list[Measurement]] = {key: [] for key in problems}
    for row in journal.measurements:
        rows.setdefault(row.key, []).append(row)
    races = tuple(
        _race(number, problem, picks.get(key), rows[key], roof)
        for number, (key, problem) in enumerate(problems.items(), start=1)
    )
    return Report(run, len(journal.runs), journal.end, races, roof)


def _race(number: int, problem: ProblemRow, pick: Pick | None, rows: Iterable[Measurement], roof: Roof) -> Race:
    latest: dict[tuple[object, ...], Measurement] = {}
    failed, noisy = [], []
    for row in rows:
        who = (row.route, row.variant, *sorted(row.config.items()))
        if row.status != "ok":
            failed.append(row)
        elif row.stage in TIMED and is_positive(row.median_us):
            latest[who] = max(row, latest.get(who, row), key=lambda timed: TIMED.index(timed.stage))
        if row.flag == "noisy":
            noisy.append(row)
    return Race(
        number,
        problem,
        pick,
        tuple(sorted(latest.values(), key=time_of)),
        tuple(failed),
        tuple(noisy),
        roof.floor_us(arithmetic(problem.key), problem.flops, problem.bytes),
    )


def as_dict(report: Report) -> dict[str, Any]:
    """The numbers for a script: plain values, null where there is none."""
    return {
        "run": asdict(report.run) if report.run is not None else None,
        "starts": report.starts,
        "finished": report.end is not None and report.end.finished,
        "seconds": report.end.seconds if report.end is not None else None,
        "asked": len(report.races),
        "measured": len(report.measured),
        "work": report.work,
        "gain": report.gain,
        "problems": [_race_as_dict(race) for race in report.races],
        "failures": {
            kind: {"rows": len(rows), "problem": rows[0][0].number, "message": rows[0][1].message}
            for kind, rows in report.failures.items()
        },
        "noisy": [
            {"problem": race.number, "candidate": config_name(row.config, row.route), "stage": row.stage}
            for race, row in report.noisy
        ],
    }


def _race_as_dict(race: Race) -> dict[str, Any]:
    pick = race.pick
    chosen: dict[str, Any] | None = None
    if pick is not None:
        chosen = {"config": dict(pick.config), "route": pick.route, "why": pick.why}
        for name in ("median_us", "low_us", "high_us", "default_us", "second_us", "apart_us"):
            value = getattr(pick, name)
            chosen[name] = value if is_positive(value) else None
    return {
        "number": race.number,
        "words": " · ".join(race.words),
        "key": asdict(race.problem.key),
        "workload": race.problem.workload,
        "pick": chosen,
        "gain": race.gain,
        "of_roof": race.roof_share,
        "near": [config_name(row.config, row.route) for row in race.near],
        "timed": len(race.timed),
        "failed": len(race.failed),
    }


# ---- Words and numbers -----------------------------------------------------------------------------------------------


def is_positive(value: float | None) -> bool:
    """A finite number above zero, as every time is."""
    return value is not None and math.isfinite(value) and value > 0


def time_of(row: Measurement) -> float:
    """The median of a row that has one, in µs."""
    assert row.median_us is not None
    return row.median_us


def ratio(over: float | None, under: float | None) -> float | None:
    """over/under where both and it are positive and finite, else None."""
    found = over / under if over and under and is_positive(over) and is_positive(under) else None
    return found if is_positive(found) else None


def in_words(key: ProblemKey) -> tuple[str, str]:
    """A key in words: "forward · 2048 rows at dilation 2", and "bf16 · head dimension 64 · causal · grid 512"."""
    branches = " + ".join(
        f"{rows} rows" + (f" at dilation {stride}" if stride > 1 else "") for rows, stride in key.branches
    )
    rest = [key.dtype, f"head dimension {key.head_dim}"]
    rest += ["all queries"] if key.queries == "all" else []
    rest += [f"{key.order} order"] if key.order != "none" else []
    rest += ["causal"] if key.causal else []
    return f"{OP_WORDS.get(key.op, key.op)} · {branches}", " · ".join([*rest, *key.flags, f"grid {key.grid}"])


def config_name(config: Config, route: str) -> str:
    """A candidate as a person would call it: "128x64_w8_s3", "torch views=1"; no choice is too odd to be named."""
    try:
        return Candidate(route, tuple(config.items())).name
    except (ConfigError, TypeError, ValueError):
        pass
    return " ".join([*([] if route == "kernel" else [route]), *(f"{k}={v}" for k, v in config.items())])


def shortened(message: str, width: int = 120) -> str:
    """A message in one line of so many characters at most."""
    line = " ".join(message.split())
    return line if len(line) <= width else f"{line[: width - 2]} …"


def duration(seconds: float) -> str:
    """Seconds in words: "8.2 s", "3 min 20 s", "2 h 5 min"."""
    if not seconds < 60:
        minutes, left = divmod(round(seconds), 60)
        return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds:.1f} s"


def count(number: int, word: str) -> str:
    """How many of them: "1 row", "2 rows"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def micros(value: float | None) -> str:
    """Microseconds to four figures: "171.2", "1,204", "—" for none."""
    if value is None or not is_positive(value):
        return "—"
    return f"{value:,.0f}" if value >= 999.95 else f"{value:.{1 if value >= 99.995 else 2}f}"


def times(value: float | None) -> str:
    """A factor: "1.18×", "—" for none."""
    return "—" if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """A share: "64 %", "—" for none."""
    return "—" if value is None else f"{100 * value:.0f} %"
