"""The search on synthetic times: no process, no clock."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dilated_attention_pytorch.config import LaunchConfig, ProblemKey
from dilated_attention_pytorch.database import Resources
from dilated_attention_pytorch.tuning.journal import Measurement
from dilated_attention_pytorch.tuning.search import (
    ENOUGH,
    FINALISTS,
    STEPS,
    Request,
    Verdict,
    candidate_of,
    decide,
    search,
)
from dilated_attention_pytorch.tuning.space import Candidate

from ..measurements import PROBLEM

KEY = ProblemKey.of(PROBLEM, "fwd", 0)
DEFAULT = Candidate.of(LaunchConfig(64, 64))
OTHERS = [Candidate.of(LaunchConfig(64, 32, num_stages=stages)) for stages in (1, 2, 3, 4, 5)]
EVERY = [DEFAULT, *OTHERS]


def row(
    candidate: Candidate,
    median: float,
    stage: str = "finals",
    *,
    width: float = 0.002,
    shared: int = 1000,
    status: str = "ok",
    spills: int = 0,
) -> Measurement:
    times = {"median_us": median, "low_us": median * (1 - width), "high_us": median * (1 + width)}
    resources = Resources(shared, 100, spills)
    given = times if status == "ok" and stage not in ("screen", "check") else {}
    return Measurement(KEY, dict(candidate.choices), candidate.route, None, stage, status, resources=resources, **given)


class Bench:
    """Answers a search's requests from a table of microseconds; whoever is not in it takes 1000."""

    def __init__(self, times: Mapping[Candidate, float], fails: Mapping[tuple[str, Candidate], str] = {}) -> None:
        self.times, self.fails = times, fails
        self.asked: list[Request] = []

    def of(self, stage: str) -> list[Candidate]:
        return [c for request in self.asked if request.stage == stage for c in request.candidates]

    def run(self, *arguments: object, **options: object) -> Verdict | None:
        steered = search(*arguments, **options)  # type: ignore[arg-type]
        rows: list[Measurement] | None = None
        while True:
            try:
                request = next(steered) if rows is None else steered.send(rows)
            except StopIteration as end:
                return end.value
            self.asked.append(request)
            rows = [self._row(request, candidate) for candidate in request.candidates]

    def _row(self, request: Request, candidate: Candidate) -> Measurement:
        stage = "tails" if request.ragged and request.stage == "check" else request.stage
        status = self.fails.get((stage, candidate), "ok")
        return row(candidate, self.times.get(candidate, 1000.0), request.stage, status=status, spills=8)


def test_the_fastest_wins_whatever_its_place() -> None:
    """A search that stops early, or that prefers whom it saw first."""
    for best in OTHERS:
        verdict = Bench({best: 100.0, DEFAULT: 200.0}).run(EVERY)
        assert verdict is not None
        assert candidate_of(verdict.winner) == best and verdict.why == "fastest" and verdict.raced == len(EVERY)


def test_nobody_is_timed_before_it_was_checked() -> None:
    """The fastest kernel is often the one that computes nothing."""
    bench = Bench({OTHERS[0]: 1.0, OTHERS[1]: 100.0}, {("check", OTHERS[0]): "correctness"})
    verdict = bench.run(EVERY)
    assert verdict is not None and candidate_of(verdict.winner) == OTHERS[1]
    assert OTHERS[0] not in bench.of("race") and OTHERS[0] not in bench.of("finals")


def test_who_fails_on_tails_does_not_win() -> None:
    """Right on whole tiles and wrong on short ones: it would be recorded for every length; or be the runner-up."""
    bench = Bench({OTHERS[0]: 10.0, OTHERS[1]: 10.5}, {("tails", OTHERS[0]): "correctness"})
    verdict = bench.run(EVERY)
    assert verdict is not None and candidate_of(verdict.winner) == OTHERS[1]
    assert OTHERS[0] not in map(candidate_of, verdict.finals)
    assert [request.candidates for request in bench.asked if request.ragged] == 2 * [(OTHERS[0],)] + 2 * [(OTHERS[1],)]


def test_who_runs_on_no_tails_is_not_asked_about_them() -> None:
    """The fastest launch for all gradients fell for the sizes that no call hands it; the others still answer."""
    bench = Bench({OTHERS[0]: 10.0}, {("tails", candidate): "correctness" for candidate in EVERY})
    verdict = bench.run(EVERY, tailed=lambda candidate: candidate != OTHERS[0])
    assert verdict is not None and candidate_of(verdict.winner) == OTHERS[0]
    assert bench.run(EVERY, tailed=lambda candidate: True) is None


def test_a_candidate_far_behind_is_dropped_early() -> None:
    """Seconds for what can no longer win."""
    bench = Bench({DEFAULT: 100.0})
    bench.run(EVERY)
    limits = [request.limit_us for request in bench.asked if request.stage == "race"]
    assert limits[0] == float("inf") and set(limits[1:]) == {125.0}


def test_finals_hold_the_best_the_default_and_the_incumbent() -> None:
    """A winner that was never timed beside the default has no gain to tell."""
    times = {candidate: 100.0 + place for place, candidate in enumerate(OTHERS)} | {DEFAULT: 180.0}
    incumbent = Candidate.of(LaunchConfig(16, 16))
    bench = Bench(times | {incumbent: 150.0})
    bench.run(EVERY, incumbent, rivals=[Candidate("cudnn")])
    assert bench.of("finals") == [*OTHERS[:FINALISTS], DEFAULT, incumbent, Candidate("cudnn")]


def test_a_rival_never_wins() -> None:
    """An external route in the database: no launch could be made of it."""
    verdict = Bench({Candidate("cudnn"): 1.0}).run(EVERY, rivals=[Candidate("cudnn")])
    assert verdict is not None and verdict.winner.route == "kernel"
    assert {row.route for row in verdict.finals} == {"kernel"}


APART = Candidate.apart([("fwd", (place,), LaunchConfig(32, 32)) for place in (0, 1)])


def test_what_a_joint_launch_stands_in_for_is_timed_in_turn_with_it() -> None:
    """Times of two moments, of which the busier one loses; or an entry whose configuration is several launches'."""
    bench = Bench({OTHERS[0]: 100.0, APART: 90.0})
    verdict = bench.run(EVERY, apart=APART)
    assert verdict is not None and verdict.apart is not None
    assert (candidate_of(verdict.winner), candidate_of(verdict.apart)) == (OTHERS[0], APART)
    assert APART not in map(candidate_of, verdict.finals) and APART not in bench.of("race")
    [finals] = [request for request in bench.asked if request.stage == "finals"]
    assert {*finals.candidates} == {OTHERS[0], DEFAULT, APART}
    wrong = Bench({APART: 90.0}, {("check", APART): "correctness"})
    verdict = wrong.run(EVERY, apart=APART)
    assert verdict is not None and verdict.apart is None and APART not in wrong.of("finals")


def test_a_rival_is_timed_only_if_it_is_right() -> None:
    """A rival that computes something else: ours looks slow beside it."""
    bench = Bench({}, {("check", Candidate("cudnn")): "correctness"})
    bench.run(EVERY, rivals=[Candidate("cudnn"), Candidate("torch")])
    assert Candidate("cudnn") not in bench.of("finals") and Candidate("torch") in bench.of("finals")


def test_the_step_goes_around_the_best() -> None:
    """A winner just outside of the grid is never found, or a whole second grid is raced."""
    near = [Candidate.of(LaunchConfig(128, 32, num_stages=stages, maxnreg=168)) for stages in range(1, 9)]
    bench = Bench({OTHERS[2]: 50.0, near[3]: 40.0})
    verdict = bench.run(EVERY, neighbours=lambda candidate: near if candidate == OTHERS[2] else [DEFAULT])
    assert bench.of("step") == near[:STEPS]
    assert verdict is not None and candidate_of(verdict.winner) == near[3]


def test_who_spills_is_raced_only_for_want_of_others() -> None:
    """Half a minute for kernels that live in local memory; or nothing at all where all of them do."""
    some = {("screen", candidate): "screened" for candidate in OTHERS[3:]}
    bench = Bench({}, some)
    bench.run(EVERY)
    assert bench.of("race") == EVERY[:4]
    every = {("screen", candidate): "screened" for candidate in EVERY}
    bench = Bench({}, every)
    assert bench.run(EVERY) is not None and bench.of("race")[0] == DEFAULT and len(bench.of("race")) == ENOUGH


def test_time_that_is_over_leads_to_the_finals() -> None:
    """A budget that throws away what was raced."""
    bench = Bench({OTHERS[0]: 50.0})
    verdict = bench.run(EVERY, hurry=lambda: len(bench.of("race")) >= 2, neighbours=lambda candidate: OTHERS)
    assert bench.of("race") == [DEFAULT, OTHERS[0]] and not bench.of("step")
    assert verdict is not None and candidate_of(verdict.winner) == OTHERS[0]


@pytest.mark.parametrize("stage", ["screen", "check", "race", "tails", "finals"])
def test_nothing_that_works_is_no_verdict(stage: str) -> None:
    """A crash in the tuner, or a pick without a time, where no candidate survives."""
    assert Bench({}, {(stage, candidate): "runtime" for candidate in EVERY}).run(EVERY) is None


# ---- The decision ----------------------------------------------------------------------------------------------------

A, B, C = OTHERS[:3]


@pytest.mark.parametrize(
    ("finals", "incumbent", "winner", "why"),
    [
        ([row(DEFAULT, 110), row(A, 100)], None, A, "fastest"),
        ([row(DEFAULT, 101.9), row(A, 100)], None, DEFAULT, "tie: default"),
        ([row(DEFAULT, 104, width=0.05), row(A, 100, width=0.05)], None, DEFAULT, "tie: default"),
        ([row(DEFAULT, 120), row(A, 100), row(B, 101, shared=900)], None, B, "tie: less shared memory"),
        ([row(DEFAULT, 120), row(A, 100), row(B, 101.5), row(C, 103)], None, A, "fastest"),
        ([row(DEFAULT, 120), row(A, 100), row(B, 102)], B, B, "tie: incumbent"),
        ([row(DEFAULT, 120), row(A, 100), row(B, 102.9)], B, B, "incumbent kept"),
        ([row(DEFAULT, 120), row(A, 100), row(B, 103.1)], B, A, "fastest"),
        ([row(DEFAULT, 100), row(A, 120)], None, DEFAULT, "fastest"),
        ([row(DEFAULT, 100), row(A, 105)], A, DEFAULT, "fastest"),
        ([row(DEFAULT, 100), row(A, 102.5)], A, DEFAULT, "fastest"),
        ([row(A, 100), row(B, 100)], DEFAULT, A, "fastest"),
        ([row(DEFAULT, 110), row(A, 100), row(B, 115, width=0.15, shared=900)], None, A, "fastest"),
        ([row(DEFAULT, 110), row(A, 100), row(B, 115, width=0.15, shared=900)], B, A, "fastest"),
    ],
)
def test_ties_go_where_they_should(
    finals: list[Measurement], incumbent: Candidate | None, winner: Candidate, why: str
) -> None:
    """Noise that rewrites the database at each tuning, or an entry slower than the untuned default, however noisy."""
    found, said = decide(finals, DEFAULT, incumbent)
    assert (candidate_of(found), said) == (winner, why)


def test_fewer_warps_break_a_tie() -> None:
    """The same shared memory: the smaller block leaves room for others."""
    wide = Candidate.of(LaunchConfig(64, 32, num_warps=8))
    narrow = Candidate.of(LaunchConfig(64, 32, num_warps=2))
    found, why = decide([row(wide, 100), row(narrow, 101)], DEFAULT)
    assert (candidate_of(found), why) == (narrow, "tie: fewer warps")


def test_deciding_again_changes_nothing() -> None:
    """Two candidates of equal speed that take turns as the winner at each tuning."""
    first, _ = decide([row(DEFAULT, 120), row(A, 100), row(B, 101)], DEFAULT)
    again, _ = decide([row(DEFAULT, 120), row(A, 101), row(B, 100)], DEFAULT, candidate_of(first))
    assert candidate_of(again) == candidate_of(first)
