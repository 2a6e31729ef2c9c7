"""The search for one task's winner, as a generator that asks for measurements and is handed rows: it measures nothing.

1. screen: everything is compiled; what does not fit or spills is left out.
2. check, race: one candidate after the other, the untuned default and the incumbent first; one that is far behind the
   best so far is dropped after a few launches.
3. step: what lies one step around the best three, the same way.
4. finals: the best few, the default, the incumbent, and what a joint launch stands in for, timed in turn.
5. `decide`; the winner is checked on ragged sizes too, and makes way for the next if it is wrong there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from .journal import Measurement, Pick
from .space import KERNEL, Candidate

FAR_BEHIND = 1.25
"""A candidate whose first launches are slower than the best by this factor is dropped."""
STEPPED_FROM = 3
"""Candidates that the step goes around."""
STEPS = 6
"""Candidates that the step adds at most, those around the best first."""
FINALISTS = 4
CLOSE = 1.10
"""No finalist was slower in the race than the best by more than this factor."""
ENOUGH = 4
"""With fewer candidates than this that do not spill, those that do are raced too."""

TIE = 0.02
"""Medians no further apart than this are a tie, and so are overlapping intervals."""
UPSET = 0.03
"""An incumbent falls only to what is faster by so much."""


@dataclass(frozen=True)
class Request:
    """What a search wants measured.

    Attributes:
        stage: "screen", "check", "race", "step" or "finals".
        candidates: In finals they are timed in turn.
        ragged: On the problem with tails.
        limit_us: A candidate that is slower is dropped early.
    """

    stage: str
    candidates: tuple[Candidate, ...]
    ragged: bool = False
    limit_us: float = float("inf")


@dataclass(frozen=True)
class Verdict:
    """What the finals came to.

    Attributes:
        winner: Its row.
        why: It is the winner.
        finals: The rows that it was chosen from.
        raced: How many raced.
        apart: The row of the launches that it stands in for; None where there are none, or they failed.
    """

    winner: Measurement
    why: str
    finals: tuple[Measurement, ...]
    raced: int
    apart: Measurement | None = None


Search = Generator[Request, list[Measurement], "Verdict | None"]


def search(
    candidates: Sequence[Candidate],
    incumbent: Candidate | None = None,
    *,
    apart: Candidate | None = None,
    rivals: Sequence[Candidate] = (),
    finalists: int = FINALISTS,
    steps: int = STEPS,
    neighbours: Callable[[Candidate], Sequence[Candidate]] = lambda candidate: (),
    tailed: Callable[[Candidate], bool] = lambda candidate: True,
    hurry: Callable[[], bool] = lambda: False,
) -> Search:
    """Find the winner.

    Args:
        candidates: The untuned default first, then by promise.
        incumbent: What the database has.
        apart: The launches that a joint one stands in for: checked, timed in the finals, and never the winner.
        rivals: External routes: checked, timed after the finals, and never the winner.
        finalists: Of those that raced, the default and the incumbent apart.
        steps: Candidates that the step adds at most.
        neighbours: What lies around a candidate.
        tailed: Calls of ragged sizes take a candidate too: there is something to check.
        hurry: Time is over: no further candidate is begun, those that were raced go to the finals.

    Yields:
        Requests; each is answered by the rows of its candidates, in their order.

    Returns:
        None where no candidate survived.
    """
    default = candidates[0]
    wanted = list(dict.fromkeys((default, *([incumbent] if incumbent else []), *candidates)))
    chosen = wanted[: 2 if incumbent else 1]
    racing = _Racing()
    yield from racing.race((yield from _screened(wanted, chosen)), "race", hurry)
    if not hurry():
        around = [near for best in racing.ranked()[:STEPPED_FROM] for near in neighbours(candidate_of(best))]
        new = [candidate for candidate in dict.fromkeys(around) if candidate not in wanted]
        if new:
            yield from racing.race((yield from _screened(new[:steps], [])), "step", hurry)
    rows = yield from _finals(racing, chosen, finalists, apart)
    finals = [row for row in rows if candidate_of(row) != apart]
    while finals:
        winner, why = decide(finals, default, incumbent)
        if not tailed(candidate_of(winner)) or (yield from _right_on_tails(candidate_of(winner))):
            yield from _timed_rivals(rivals)
            beside = next((row for row in rows if candidate_of(row) == apart), None)
            return Verdict(winner, why, tuple(finals), len(racing.rows), beside)
        finals.remove(winner)
    return None


def candidate_of(row: Measurement | Pick) -> Candidate:
    """The candidate that a row measured or a pick is."""
    return Candidate(row.route, tuple(row.config.items()))


def _screened(
    candidates: Sequence[Candidate], chosen: Sequence[Candidate]
) -> Generator[Request, list[Measurement], list[Candidate]]:
    """Those worth racing, in their order; the chosen are, even if they spill."""
    rows = yield Request("screen", tuple(candidates))
    good = [row for row in rows if row.status == "ok" or (row.status == "screened" and candidate_of(row) in chosen)]
    spilling = [row for row in rows if row.status == "screened" and row not in good]
    spilling.sort(key=lambda row: row.resources.spills if row.resources else 0)
    return [candidate_of(row) for row in (*good, *spilling[: max(ENOUGH - len(good), 0)])]


class _Racing:
    """Who was raced, with the rows."""

    def __init__(self) -> None:
        self.rows: list[Measurement] = []

    @property
    def best_us(self) -> float:
        """The fastest median so far."""
        return min((row.median_us for row in self.rows if row.median_us is not None), default=float("inf"))

    def race(
        self, candidates: Sequence[Candidate], stage: str, hurry: Callable[[], bool]
    ) -> Generator[Request, list[Measurement], None]:
        """Check and time one after the other."""
        for candidate in candidates:
            if self.rows and hurry():
                return
            [checked] = yield Request("check", (candidate,))
            if checked.status == "ok":
                [timed] = yield Request(stage, (candidate,), limit_us=FAR_BEHIND * self.best_us)
                if timed.status == "ok":
                    self.rows.append(timed)

    def ranked(self) -> list[Measurement]:
        """The fastest first."""
        return sorted(self.rows, key=lambda row: row.median_us or 0.0)


def _finals(
    racing: _Racing, chosen: Sequence[Candidate], most: int, apart: Candidate | None
) -> Generator[Request, list[Measurement], list[Measurement]]:
    """Rows of the best, of the default, of the incumbent and of the launches apart, timed in turn."""
    ranked = racing.ranked()
    close = [candidate_of(row) for row in ranked if (row.median_us or 0.0) <= CLOSE * racing.best_us]
    raced = [candidate_of(row) for row in ranked]
    wanted = dict.fromkeys((*close[:most], *(c for c in chosen if c in raced)))
    if not wanted:
        return []
    if apart is not None:
        [checked] = yield Request("check", (apart,))
        wanted |= {apart: None} if checked.status == "ok" else {}
    rows = yield Request("finals", tuple(wanted))
    return [row for row in rows if row.status == "ok"]


def _right_on_tails(candidate: Candidate) -> Generator[Request, list[Measurement], bool]:
    """Tails are another text to compile: of all candidates the winner alone is worth it."""
    yield Request("screen", (candidate,), ragged=True)
    [checked] = yield Request("check", (candidate,), ragged=True)
    return checked.status == "ok"


def _timed_rivals(rivals: Sequence[Candidate]) -> Generator[Request, list[Measurement], None]:
    """Apart from the finals: who is ten times slower would leave them few rounds."""
    for rival in rivals:
        [checked] = yield Request("check", (rival,))
        if checked.status == "ok":
            yield Request("finals", (rival,))


def decide(
    finals: Sequence[Measurement], default: Candidate, incumbent: Candidate | None = None
) -> tuple[Measurement, str]:
    """The winner of the finals, and why.

    A tie is within `TIE` of the fastest, or has an interval that overlaps the fastest's. Of those that tie, the
    incumbent goes first, then the default, then what takes less shared memory, then fewer warps. An incumbent also
    stays where the fastest is not `UPSET` faster. Nobody wins who is slower than the default, an incumbent included.

    Args:
        finals: Rows with times, of one route.
        default: The untuned default.
        incumbent: What the database has.
    """
    fastest = min(finals, key=_median)
    rows = {candidate_of(row): row for row in finals}
    ties = [row for row in finals if _ties(row, fastest)]
    untuned = rows.get(default)
    if incumbent in rows:
        held = rows[incumbent]
        beaten = untuned is not None and _median(held) > _median(untuned)
        if not beaten and held in ties:
            return held, "fastest" if held is fastest else "tie: incumbent"
        if not beaten and _median(held) < _median(fastest) * (1 + UPSET):
            return held, "incumbent kept"
    if untuned in ties:
        return untuned, "fastest" if untuned is fastest else "tie: default"
    if untuned is not None:
        ties = [row for row in ties if _median(row) <= _median(untuned)]
    winner = min(ties, key=lambda row: (_shared(row), _warps(row), _median(row)))
    if winner is fastest:
        return winner, "fastest"
    return winner, "tie: less shared memory" if _shared(winner) < _shared(fastest) else "tie: fewer warps"


def _ties(row: Measurement, fastest: Measurement) -> bool:
    overlap = (row.low_us or 0.0) <= (fastest.high_us or 0.0)
    return _median(row) <= _median(fastest) * (1 + TIE) or overlap


def _median(row: Measurement) -> float:
    assert row.median_us is not None, "the finals hold times"
    return row.median_us


def _shared(row: Measurement) -> int:
    return row.resources.shared_bytes if row.resources else 0


def _warps(row: Measurement) -> int:
    return int(row.config.get("num_warps", 0)) if row.route == KERNEL else 0
