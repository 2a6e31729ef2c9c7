"""Regret on problems that nobody tuned: how they are drawn, and that a loss is told as it is."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import regret, retimed
from benchmarks.regret import FASTEST, WHERE, Drawn
from dilated_attention_pytorch import database, generated
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import EVERY_OP, OPS, LaunchConfig, next_power_of_two
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.runtime.variants import text_for
from dilated_attention_pytorch.tuning import problems, space, worker
from dilated_attention_pytorch.tuning.measure import Answer, Checked, CheckJob, Job
from dilated_attention_pytorch.tuning.tune import Progress, Settings

from .measurements import database_at, entry
from .tuning import standin
from .tuning.standin import DEVICE, candidates, microseconds, tasks

H100 = devices.simulated("h100")
TOOLCHAIN = Toolchain("3.6.0")


def tiles(task: problems.Task) -> LaunchConfig:
    """Such as the problem may run with."""
    if task.op != "bwd":
        return LaunchConfig(64, 64)
    return LaunchConfig(64, next_power_of_two(max(task.problem.rows(0), 16)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """What the standard preset would measure, as if it had just been: whatever is committed, and however old."""
    every = problems.of_calls(problems.preset("standard"), H100)
    made_up = [replace(entry(task.op, config=tiles(task)), key=task.key) for task in every]
    return database_at(tmp_path_factory.mktemp("tuned") / "db", {"h100": made_up})


def test_problems_are_new_and_where_they_say(tuned: Database) -> None:
    """Regret of 1.0 on what was tuned itself, or "across" that the nearest entry serves; fewer than 60 by default."""
    drawn = regret.draw(regret.COUNT, 5, H100, TOOLCHAIN, tuned)
    assert drawn[:9] == regret.draw(9, 5, H100, TOOLCHAIN, tuned) != regret.draw(9, 6, H100, TOOLCHAIN, tuned)
    assert len({one.task.key for one in drawn}) == regret.COUNT >= 60
    ops = {key.op for key in retimed.usable(tuned, H100, H100.name, TOOLCHAIN)}
    assert ops == set(EVERY_OP)
    assert {(one.where, one.task.op) for one in drawn} == {*itertools.product(WHERE, OPS)}
    assert min(Counter(one.where for one in drawn).values()) >= 15
    assert {one.choice.rung for one in drawn if one.where == "between"} >= {"nearest"}
    for one in drawn:
        key = one.task.key
        known = tuned.entries(H100.arch, H100.name, key.op)
        alike = [near.branches[0][0] for near in known if regret._kind(near) == regret._kind(key)]
        rows = key.branches[0][0]
        assert key not in known and one.choice.op == key.op
        places = {"across": not alike, "between": bool(alike) and min(alike) <= rows <= max(alike)}
        assert places.get(one.where, bool(alike) and not min(alike) <= rows <= max(alike)), (one.where, key, alike)


@pytest.mark.parametrize("seed", range(2))
def test_every_candidate_has_a_text(tuned: Database, seed: int) -> None:
    """A tuner that ends in an assertion at a length which no preset has: a default that loads as no text of it does."""
    branches_of = []
    for one in regret.draw(regret.COUNT, seed, H100, TOOLCHAIN, tuned):
        task = one.task
        begun = space.space(task, H100)
        near = [candidate for first in begun[::5] for candidate in space.neighbours(task, H100, first)]
        branches_of.append(problems.every_branch(task.problem))
        for candidate in (*begun, *near):
            text = text_for(task.problem, branches_of[-1], task.op, candidate.config, generated.names())
            assert text is not None, (task, candidate)
    assert any(len(branches) > 1 for branches in branches_of)


def test_nothing_tuned_is_told() -> None:
    """An endless draw between problems that do not exist."""
    with pytest.raises(ArgumentError, match=r"no fwd between what is tuned for sm_89"):
        regret.draw(3, 0, devices.simulated("l4"), TOOLCHAIN, database.load())


def test_what_no_longer_holds_is_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regret of the untuned defaults, told as that of the nearest rule, after a template has changed."""
    monkeypatch.setattr(regret, "DRAWS", 10)
    stale = [entry(op, kernel="abcdefabcdef", grid=grid) for op in OPS for grid in (64, 256)]
    with pytest.raises(ArgumentError, match="tune more, or draw fewer"):
        regret.draw(3, 0, H100, TOOLCHAIN, database_at(tmp_path / "db", {"h100": stale}))


@pytest.fixture
def how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Searches that compute nothing, of the eight candidates nearest the default."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")
    monkeypatch.setattr(space, "neighbours", lambda task, device, candidate: [])
    return standin.settings(
        tmp_path, measurer=standin.without_torch, gpus=(str(tmp_path / "asked"),), limit=8, root=None
    )


def drawn_as(place: int) -> list[Drawn]:
    """Each launch of a call, as if the plan ran the candidate of this place by speed, the slowest last."""
    found = []
    for task in tasks():
        [choice] = plan(task.problem, DEVICE, "triton").of(task.op)
        ranked = sorted(candidates(task)[:8], key=lambda candidate: microseconds(candidate.name))
        found.append(Drawn("across", task, replace(choice, config=ranked[place].config)))
    return found


@pytest.mark.parametrize("place", [0, 3, -1])
def test_regret_is_of_what_runs_over_the_best(how: Settings, place: int) -> None:
    """What runs compared with the default, or with the tuner's pick; a slow one that is left out of the finals."""
    drawn = drawn_as(place)
    found = regret.measure(drawn, DEVICE, how, Progress())
    assert found["measured"] == found["asked"] == len(OPS)
    for one, row in zip(drawn, found["rows"], strict=True):
        times = sorted(microseconds(candidate.name) for candidate in candidates(one.task)[:8])
        assert row["regret"] == pytest.approx(times[place] / times[0])
        assert row["dispatched"]["config"] == one.choice.config.name
        assert row["dispatched"]["us"] == pytest.approx(times[place], abs=1e-3)
        assert row["raced"] == 8 and len(row["finals"]) <= FASTEST + 2
    assert found["worst"] == max(row["regret"] for row in found["rows"])
    json.dumps(found)
    regret.show({**found, "seed": 0})


def wrong_at_first(where: str, device: Device, routes: object) -> Callable[[Job], Answer]:
    """The fastest candidate of each launch is wrong."""
    answer = standin.without_torch(where, device, {})

    def check(job: Job) -> Answer:
        if isinstance(job, CheckJob):
            fastest = min(candidates(job.task)[:8], key=lambda candidate: microseconds(candidate.name))
            if job.candidate == fastest:
                return Checked(0.5, 1e-5, "out: relative error 5.0e-01")
        return answer(job)

    return check


def test_what_runs_and_is_wrong_has_no_regret(how: Settings) -> None:
    """A wrong kernel that the plan runs drops out of the finals, and out of the result."""
    found = regret.measure(drawn_as(0), DEVICE, replace(how, measurer=wrong_at_first), Progress())
    assert found["measured"] == 0 and found["median"] is None
    assert [row["failure"] for row in found["rows"]] == len(OPS) * ["check: correctness, out: relative error 5.0e-01"]


def test_time_that_is_over_is_told(how: Settings) -> None:
    """Launches that nobody measured, counted as such of no regret."""
    found = regret.measure(drawn_as(0), DEVICE, replace(how, budget_s=0.0), Progress())
    assert found["asked"] == len(OPS) and found["measured"] == len(found["rows"]) == 0
