"""What happens when a launch fails that the plan believed in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import device, heuristics
from dilated_attention_pytorch.config import LaunchConfig, Problem
from dilated_attention_pytorch.runtime import launch
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Choice, plan

PROBLEM = Problem("bf16", 1, 4096, 4, 4, 64, ((2048, 2),))


class OutOfResources(Exception):
    """Named like Triton's, which a machine without Triton does not have."""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU on which nothing but the smallest tiles fits: the names of the configurations that were launched."""
    names: list[str] = []

    def fails(prepared: Choice, config: Any) -> None:
        names.append(config.name)
        if config != heuristics.FLOOR[-1]:
            raise OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448.")

    monkeypatch.setattr(launch, "run_kernel", fails)
    monkeypatch.setattr(launch, "prepared", lambda choice, values: choice)
    monkeypatch.setattr(launch, "_STEPPED_DOWN", {})
    return names


def choice() -> Choice:
    return plan(PROBLEM, device.simulated("h100"), "triton").fwd[0]


def test_a_launch_that_does_not_fit_steps_down_once(tried: list[str]) -> None:
    """Training that ends because an entry does not fit; a warning, or a failing launch, at every step."""
    wanted = choice()
    with pytest.warns(UserWarning, match=f"{wanted.variant.name} fwd with {wanted.config.name} .*Required: 300000"):
        launch._run(PROBLEM, wanted, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch._run(PROBLEM, wanted, {})
    smallest = heuristics.FLOOR[-1].name
    assert tried == [wanted.config.name, smallest, smallest]


def test_what_was_asked_for_is_not_replaced(tried: list[str]) -> None:
    """A tuner or a user whose configuration silently becomes another."""
    with pytest.raises(OutOfResources):
        launch._run(PROBLEM, replace(choice(), rung="config"), {})
    assert len(tried) == 1


def test_other_errors_are_not_swallowed(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails for another reason, tried again with other tiles."""

    def broken(prepared: Choice, config: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(launch, "run_kernel", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch._run(PROBLEM, choice(), {})


def test_all_gradients_that_do_not_fit_at_once_come_apart(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that ends because an entry does not fit; dk and dv merged into memory that nobody wrote."""
    monkeypatch.setattr(launch, "_STEPPED_APART", {})
    tiles = (("bwd", LaunchConfig(64, 64)),)
    asked = plan(replace(PROBLEM, branches=((64, 1),)), device.simulated("h100"), "triton", Options(tiles))
    found = replace(asked, launches=tuple(replace(choice, rung="nearest") for choice in asked.launches))
    q = torch.zeros(1, 4096, 4, 64, dtype=torch.bfloat16)
    given = (q, q, q, q, torch.zeros(1, 4, 4096), q, None)
    sides = {"scale": 1.0, "index": None, "mask": None, "offsets": HeadOffsets(((0, 0, 0, 0),))}
    monkeypatch.setattr(launch.replay, "run", lambda key, owners, names, tensors, first: [*first()])
    monkeypatch.setattr(launch, "prepared_delta", lambda *_: None)
    monkeypatch.setattr(launch, "DELTA", heuristics.FLOOR[-1])
    with pytest.warns(UserWarning, match="bwd with 64x64_w4_s2"):
        launch.backward(found, *given, **sides)
    smallest = heuristics.FLOOR[-1].name
    assert tried == [smallest, "64x64_w4_s2", smallest, smallest, smallest]
    (apart,) = launch._STEPPED_APART.values()
    assert [(choice.op, choice.merge) for choice in apart.backward] == [("dkdv", False), ("dq", False)]
    launch.backward(found, *given, **sides)
    assert tried[5:] == [smallest] * 3


@pytest.mark.parametrize(
    ("branches", "described", "ran"),
    [
        (((2048, 2),), True, ["dq", "dkdv"]),
        (((128, 1),), True, ["bwd"]),
        (((2048, 2),), False, ["dq", "delta", "dkdv", "dq"]),
        (((300, 1), (2048, 2)), True, ["delta", "dkdv", "dq", "dkdv", "dq"]),
    ],
)
def test_who_computes_delta(
    branches: tuple[tuple[int, int], ...], described: bool, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delta that is read before it is there: from the text in Triton that takes a ring's place, or of other rows."""
    found = plan(replace(PROBLEM, branches=branches), device.simulated("h100"), "triton")
    q, row = torch.zeros(1, 4096, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 4, 4096)
    names: list[str] = []

    def prepared(choice: Choice, values: Mapping[str, Any]) -> tuple[str, dict[str, Any], int]:
        return choice.op, {"p_out": values["p_out"]} if described and choice.op in ("dq", "bwd") else {}, 1

    def run_kernel(prepared: tuple[str, dict[str, Any], int], config: LaunchConfig) -> launch.Launch:
        names.append(prepared[0])
        return launch.Launch(None, *prepared[1:])

    monkeypatch.setattr(launch, "prepared", prepared)
    monkeypatch.setattr(launch, "prepared_delta", lambda *_: ("delta", {}, 1))
    monkeypatch.setattr(launch, "run_kernel", run_kernel)
    monkeypatch.setattr(launch.replay, "run", lambda key, owners, names, tensors, first: [*first()])
    sides = {"scale": 1.0, "index": None, "mask": None, "offsets": HeadOffsets(((0, 0, 0, 0),))}
    launch.backward(found, q, q, q, q, row, q, row, **sides)
    assert names == ran


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        ({"branches": ((64, 4),)}, 4),
        ({"branches": ((64, 2), (128, 4))}, 2),
        ({"branches": ((64, 2), (128, 4)), "head_offset": "zero"}, 2),
        ({"branches": ((64, 2), (128, 4)), "head_offset": "blocked"}, 1),
        ({"branches": ((64, 4),), "head_offset": "blocked"}, 4),
        ({"branches": ((64, 4),), "head_offset": "table"}, 1),
        ({"branches": ((64, 1), (128, 4))}, 1),
        ({"branches": ((66, 4),)}, 1),
        ({"branches": ((4098, 4),)}, 4),
        ({"branches": ((64, 4),), "queries": "all"}, 1),
        ({"branches": ((64, 4),), "order": "hilbert"}, 1),
        ({"branches": ((64, 4),), "query_range": (8, 40)}, 4),
        ({"branches": ((64, 4),), "query_range": (6, 40)}, 1),
    ],
)
def test_delta_goes_over_the_rows_that_are_read(change: dict[str, Any], apart: int) -> None:
    """A delta that a kernel reads and nobody wrote, or all rows gone over where one in four has keys."""
    problem = replace(PROBLEM, **change)
    assert launch._rows_apart(problem, problem.branches) == apart
    if apart > 1:
        for head in range(problem.heads):
            kept = (_kept(problem, branch, head) for branch in range(len(problem.branches)))
            assert len({step % apart for steps in kept for step in steps}) == 1


def _kept(problem: Problem, branch: int, head: int) -> list[int]:
    """Steps of a head that a branch keeps, counted from the range's first."""
    segment, rate = problem.branches[branch]
    offset = {"cyclic": head % rate, "blocked": head // -(-problem.heads // rate), "zero": 0}[problem.head_offset]
    first, last = problem.query_range or (0, problem.length)
    return [step - first for step in range(first, last) if step % segment % rate == offset]
