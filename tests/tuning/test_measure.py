"""Checking and timing in the measuring process itself, on a CPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.precision import TOLERANCES
from dilated_attention_pytorch.tuning import measure, routes, scenes, worker
from dilated_attention_pytorch.tuning.measure import Answer, CheckJob, Job, Timed, TimeJob, bench, interval
from dilated_attention_pytorch.tuning.routes import Launch, Launcher, Outputs, Scene
from dilated_attention_pytorch.tuning.space import Candidate

from . import standin
from .standin import DEVICE, PROBLEM, candidates, settings, tasks


def test_an_interval_holds_the_median_and_not_every_straggler() -> None:
    """One launch of a hundred that was interrupted makes a quiet GPU look loaded; three launches prove nothing."""
    assert interval([10.0] * 99 + [500.0]) == Timed(10.0, 10.0, 10.0)
    assert interval([3.0, 1.0, 2.0]) == Timed(2.0, 1.0, 3.0)
    times = [float(number) for number in range(1, 101)]
    assert interval(times) == Timed(50.5, 41.0, 60.0)


def loaded(scene: Scene, candidate: Candidate) -> Launcher:
    """A GPU that another process uses now and then."""
    chance = random.Random(3)

    def launcher(outputs: Outputs) -> Launch:
        def run() -> None:
            for name, expected in scene.expected.items():
                outputs[name].copy_(expected)
            time.sleep(chance.choice((0.0002, 0.003)))

        return run

    return launcher


def test_a_wide_spread_is_measured_again_and_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a shared GPU, believed."""
    (task, *_) = tasks()
    series: list[int] = []
    clock = measure._CpuClock.times

    def counted(self: measure._CpuClock, launches: list[Launch], rounds: int, queued: int) -> list[list[float]]:
        series.append(rounds)
        return clock(self, launches, rounds, queued)

    monkeypatch.setattr(measure._CpuClock, "times", counted)
    (timed,) = bench("cpu", DEVICE, {"kernel": loaded})(TimeJob(task, (candidates(task)[0],), budget_us=4e4))
    assert isinstance(timed, Timed) and timed.noisy
    assert series.count(measure._CpuClock.rounds[0]) == 2


def noisy(where: str, device: Device, routes: Mapping[str, object]) -> Callable[[Job], Answer]:
    """A quiet GPU, but for the finals."""
    quiet = standin.without_torch(where, device, routes)

    def answer(job: Job) -> Answer:
        found = quiet(job)
        if isinstance(job, TimeJob) and len(job.candidates) > 1:
            return tuple(replace(timed, noisy=True) for timed in found if isinstance(timed, Timed))
        return found

    return answer


def test_a_noisy_winner_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pick by chance that the next thousand runs use."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")
    how = settings(tmp_path, measurer=noisy, gpus=(str(tmp_path / "asked"),), limit=3)
    found = standin.run(tasks()[:1], how)
    assert len(found.picks) == 1 and not list(tmp_path.rglob("*.yaml"))
    assert {row.flag for row in found.measurements if row.stage == "finals" and row.route == "kernel"} == {"noisy"}


@pytest.mark.parametrize(("share", "draws"), [(1 << 30, 1), (0, 2)])
def test_a_problems_tensors_are_drawn_once(share: int, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 reference run again for each operation; or a GPU that fills up with the tensors of earlier tasks."""
    drawn: list[Problem] = []
    draw = scenes.drawn

    def counted(problem: Problem, *how: object) -> Scene:
        drawn.append(problem)
        return draw(problem, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "drawn", counted)
    monkeypatch.setattr(measure, "DRAWN_BYTES", share)
    asked = bench("cpu", DEVICE, {"kernel": loaded})
    first, other = replace(PROBLEM, branches=((64, 1),)), replace(PROBLEM, branches=((128, 1),))
    for problem in (first, other, first):
        for task in tasks(problem):
            found = asked(CheckJob(task, candidates(task)[0]))
            assert isinstance(found, measure.Checked) and not found.wrong
    assert drawn.count(scenes.small(first)) == draws
    assert drawn.count(scenes.small(other)) == 1


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("op", ["fwd", "dkdv", "dq"])
def test_what_must_come_out_is_told_twice_alike(op: str, merge: bool) -> None:
    """An expectation that is wrong: every right kernel is dropped."""
    cpu = torch.device("cpu")
    problem = replace(PROBLEM, mask=True, order="snake", row_width=11, padding="zeros", dropout=True, causal=False)
    tensors = (scenes.drawn(problem, DEVICE, cpu, seed=5, exact=exact) for exact in (True, False))
    exact, wide = (scenes.asked(each, op, merge, seed=5) for each in tensors)
    assert torch.equal(exact.q, wide.q)
    if merge:
        assert all(torch.allclose(exact.before[name], wide.before[name], atol=1e-5) for name in exact.before)
    found = measure.compare(exact, {name: value.float() for name, value in wide.expected.items()})
    assert not found.wrong and found.error < 1e-6


VIEWED = replace(PROBLEM, length=192, heads=5, kv_heads=5, branches=((48, 1), (96, 3)))
GROUPED = replace(VIEWED, heads=4, kv_heads=2, branches=((48, 1),))


@pytest.mark.parametrize(
    "problem",
    [
        VIEWED,
        replace(VIEWED, head_offset="blocked", causal=True, batch=2),
        replace(VIEWED, head_offset="zero", branches=((192, 4),)),
        GROUPED,
    ],
    ids=["cyclic", "blocked-causal", "zero-full", "grouped"],
)
def test_a_rival_computes_what_we_do(problem: Problem) -> None:
    """A time of cuDNN on other rows, or of other heads' keys, that ours is held against."""
    cudnn = {"cudnn": lambda scene, candidate: routes.strided_sdpa(scene, SDPBackend.MATH)}
    asked = bench("cpu", DEVICE, cudnn)
    for task in tasks(problem):
        found = asked(CheckJob(task, Candidate("cudnn")))
        assert isinstance(found, measure.Checked) and not found.wrong and 0 < found.error < 1e-5, (task, found)
        (timed,) = asked(TimeJob(task, (Candidate("cudnn"),), budget_us=100.0))
        assert isinstance(timed, Timed)


def test_a_rival_that_is_wrong_is_found_out() -> None:
    """Its heads' rows in other places, or a gradient that it does not give: every such time would be believed."""
    (task, *_) = (task for task in tasks(VIEWED) if task.op == "dkdv" and task.merge)
    given = bench("cpu", DEVICE, {"cudnn": swapped})(CheckJob(task, Candidate("cudnn")))
    assert isinstance(given, measure.Checked) and given.wrong.startswith("dq: relative error")


def swapped(scene: Scene, candidate: Candidate) -> Launcher:
    """All gradients of a rival, two of its heads in each other's place."""
    return lambda outputs: lambda: lambda: {name: scene.alone[name].flip(2) for name in ("dq", "dk", "dv")}


@pytest.mark.parametrize(("op", "name", "segment"), [("fwd", "out", 96), ("dq", "dq", 2), ("dkdv", "dk", 2)])
def test_rounding_alone_is_no_error(op: str, name: str, segment: int) -> None:
    """A right kernel dropped, as bf16 costs the formula itself more than the tolerance; or any error excused so."""
    problem = replace(PROBLEM, dtype="bf16", branches=((segment, 1),))
    inputs = scenes.asked(scenes.drawn(problem, DEVICE, torch.device("cpu"), seed=2, exact=True), op, False, seed=2)
    rounding = scenes.rounded(inputs, alone=False)[name].double() - inputs.expected[name]
    tolerance = TOLERANCES["bf16"].out if op == "fwd" else TOLERANCES["bf16"].grad
    assert 1.9 * rounding.norm() > tolerance * inputs.expected[name].norm()
    for times, fits in ((1.9, True), (2.1, False)):
        results = {**inputs.expected, name: inputs.expected[name] + times * rounding}
        assert (not measure.compare(inputs, results).wrong) == fits


def test_rounding_is_merged_as_results_are() -> None:
    """A merged result held to the rounding of the branch alone: any error of the merge would be excused."""
    tensors = scenes.drawn(replace(PROBLEM, dtype="bf16"), DEVICE, torch.device("cpu"), seed=2, exact=True)
    inputs = scenes.asked(tensors, "fwd", True, seed=2)
    merged, wanted = scenes.rounded(inputs, alone=False)["out"], inputs.expected["out"]
    assert 0 < (merged - wanted).norm() < 0.01 * wanted.norm()


def test_small_and_ragged_problems_keep_what_makes_the_kernel() -> None:
    """A check of another text than the one that is timed, or of no tail at all."""
    full = replace(PROBLEM, branches=((1000, 3),))
    long = replace(PROBLEM, length=1040, batch=3)
    assert scenes.small(long).length == 520 and scenes.small(long).batch == 1
    assert scenes.small(PROBLEM).length == 410
    assert scenes.ragged(long).length % 260 not in (0, 130)
    assert scenes.small(full) == full and scenes.ragged(full).is_full(0) and scenes.ragged(full).length < 410


def test_a_check_is_of_the_ragged_problem_where_asked() -> None:
    """Tails that are never run."""
    lengths: list[int] = []

    def noted(scene: Scene, candidate: Candidate) -> Launcher:
        lengths.append(scene.problem.length)
        return standin.right(scene, candidate)

    (task, *_) = tasks(replace(PROBLEM, length=1040))
    asked = bench("cpu", DEVICE, {"kernel": noted})
    for ragged in (False, True):
        found = asked(CheckJob(task, candidates(task)[0], ragged))
        assert isinstance(found, measure.Checked) and not found.wrong and found.error < 1e-6
    assert lengths == [520, 347]
