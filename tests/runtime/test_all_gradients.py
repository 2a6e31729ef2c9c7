"""One launch that gives dq, dk and dv: when a call makes it, and what it then computes; tiles by descriptor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import EVERY_OP, OPS, LaunchConfig, Problem, ProblemKey
from dilated_attention_pytorch.database import Entry
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Plan, plan
from dilated_attention_pytorch.tuning.measure import Bench, CheckJob
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.routes import ROUTES
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.variant import Variant

from ..cases import Case, make_inputs, oracle
from ..kernels import chosen_config, pattern_case, run_kernels, run_ranges, variants_run
from ..measurements import PROBLEM, TOOLCHAIN, database_at, entry
from ..tolerances import check_results

H100 = device.simulated("h100")
EVEN = replace(PROBLEM, length=8192)
"""Its segments fill the sequence: dq can be added up."""
TILE = LaunchConfig(16, 16, num_warps=4, num_stages=1)
SQUARE = LaunchConfig(64, 64)


def backward(tmp_path: Path, asked: Problem, *entries: Entry) -> Plan:
    """The plan of a call, by a database of these entries of an H100."""
    committed = database_at(tmp_path / "db", {"h100": [*entries]})
    return plan(asked, H100, toolchain=TOOLCHAIN, committed=committed)


def ops(found: Plan) -> list[str]:
    return [choice.op for choice in found.backward]


# ---- When a call makes it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("apart", "launches"), [(125.0, ["bwd"]), (80.0, ["dkdv", "dq"]), (None, ["bwd"])])
def test_the_backward_is_as_measured(tmp_path: Path, apart: float | None, launches: list[str]) -> None:
    """All gradients at once where two launches are faster, or two where one is."""
    found = backward(tmp_path, EVEN, entry("bwd", EVEN, apart=apart))
    assert ops(found) == launches
    assert [choice.op for choice in found.beaten] == (["bwd"] if len(launches) == 2 else [])
    assert ("not bwd of branch 0 in one launch: faster apart; " in found.explain()) == bool(found.beaten)


def test_nobody_guesses(tmp_path: Path) -> None:
    """A launch whose gain depends on the GPU, made where nobody has measured it."""
    assert ops(backward(tmp_path, EVEN, entry("dkdv", EVEN))) == ["dkdv", "dq"]


def test_what_was_not_measured_is_not_asked_for(tmp_path: Path) -> None:
    """A call that is refused for want of a measurement of one launch, with both that it stands in for measured."""
    near = entry("bwd", EVEN, branches=((256, 1),))
    every = [entry(op, EVEN) for op in OPS]
    committed = database_at(tmp_path / "db", {"h100": [near, *every]})
    strict = Options(on_miss="error")
    assert ops(plan(EVEN, H100, options=strict, toolchain=TOOLCHAIN, committed=committed)) == ["dkdv", "dq"]
    assert ops(plan(EVEN, H100, toolchain=TOOLCHAIN, committed=committed)) == ["bwd"]


@pytest.mark.parametrize(
    "change",
    [{"deterministic": True}, {"head_offset": "table"}, {"length": 8765}, {"order": "hilbert"}],
    ids=str,
)
def test_what_forbids_it(tmp_path: Path, change: dict[str, Any]) -> None:
    """Sums in no order where the call asks for one; rows of absent heads that nobody clears; tails without a mask."""
    asked = replace(EVEN, **change)
    assert ops(backward(tmp_path, asked, entry("bwd", asked))) == ["dkdv", "dq"]


@pytest.mark.parametrize("block_m", [16, 64])
def test_one_tile_of_keys_is_deterministic(block_m: int) -> None:
    """A launch that adds nothing up, refused because another of its name does."""
    found = asking_for_it(replace(EVEN, branches=((64, 1),), deterministic=True), LaunchConfig(block_m, 64))
    assert ops(found) == ["bwd"] and not found.adds_up_dq and found.stores_dq


def test_a_measurement_of_one_tile_says_nothing_of_many(tmp_path: Path) -> None:
    """Segments of two tiles, whose dq is added up because it was fast to store it."""
    measured = entry("bwd", replace(EVEN, branches=((128, 2),)), config=LaunchConfig(32, 64))
    for rows, expected in ((64, ["bwd"]), (128, ["dkdv", "dq"])):
        assert ops(backward(tmp_path, replace(EVEN, branches=((2 * rows, 2),)), measured)) == expected


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        (((64, 1), (512, 2)), [("bwd", False), ("bwd", True)]),
        (((512, 1), (128, 2)), [("bwd", False), ("bwd", True)]),
        (((512, 1), (500, 3)), [("bwd", False), ("dkdv", True), ("dq", False)]),
        (((64, 1), (500, 3)), [("bwd", False), ("dkdv", True), ("dq", True)]),
    ],
)
def test_what_is_merged(branches: tuple[tuple[int, int], ...], expected: list[tuple[str, bool]]) -> None:
    """dk and dv written over another's; dq merged into memory that nobody wrote."""
    found = asking_for_it(replace(EVEN, branches=branches))
    assert [(choice.op, choice.merge) for choice in found.backward] == expected


def asking_for_it(asked: Problem, tiles: LaunchConfig = SQUARE) -> Plan:
    """The plan of a call with tiles for all gradients at once."""
    return plan(asked, H100, options=Options(config=(("bwd", tiles),)), toolchain=TOOLCHAIN)


# ---- What it computes ------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.usefixtures("adding_descriptors")
@pytest.mark.parametrize(
    ("name", "loads", "features"),
    [
        ("general_one_even", "descriptor", "causal mask"),
        ("s128_d4_all_one_even", "descriptor", "mask"),
        ("s128_d2_snake_all_one", "pointer", "mask"),
        ("general_one", "pointer", "causal"),
        ("general_one", "pointer", ""),
        ("full_d4_even", "descriptor", ""),
        ("full_d4_even", "descriptor", "causal"),
        ("full_d4_even", "pointer", "mask"),
        ("s128_d2_all_even", "descriptor", ""),
        ("s128_d2_all_even", "descriptor", "causal mask"),
    ],
)
def test_each_kind_of_text(name: str, loads: str, features: str) -> None:
    """A wrong row or column of a descriptor, carried P·V of another tile, dq of masked keys or of other rows."""
    variant = Variant.from_name(name)
    case = pattern_case(variant, heads=2, dtype="fp16", causal="causal" in features, mask="mask" in features)
    tiles = {op: replace(config, loads=loads) for op, config in chosen_config(variant).items()}
    inputs = make_inputs(case)
    assert variants_run(case, inputs, tiles) == {name}
    check_results(run_kernels(case, inputs, tiles), oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(N=96, branches=((16, 1), (48, 1)), H=2), id="stored-then-added"),
        pytest.param(Case(N=96, branches=((48, 1), (16, 1)), H=2), id="added-then-stored"),
        pytest.param(Case(N=96, branches=((48, 1), (40, 3)), H=4, G=2), id="added-then-ragged"),
        pytest.param(Case(N=61, branches=((20, 3), (30, 2)), H=4, G=2, causal=True, dropout=0.2), id="grouped-dropout"),
        pytest.param(Case(N=96, branches=((32, 2), (48, 1)), H=4, causal=True, D=24), id="held-then-added"),
    ],
)
def test_launches_of_both_kinds(case: Case) -> None:
    """What is added up and what is stored, of which one is lost or taken twice."""
    inputs = make_inputs(case)
    with dap.options(config=dict.fromkeys(EVERY_OP, TILE)):
        chosen = dap.explain(inputs.q, inputs.k, inputs.v, *zip(*case.branches, strict=True), backend="triton")
    assert "bwd" in {choice.op for choice in chosen.launches} or case.dropout
    found = run_kernels(case, inputs, dict.fromkeys(EVERY_OP, TILE))
    check_results(found, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(N=128, branches=((64, 2),), H=2, dtype="fp16"), id="plain"),
        pytest.param(Case(N=128, branches=((64, 2),), B=2, H=4, G=2, mask=True), id="grouped-mask"),
        pytest.param(Case(N=64, branches=((32, 1), (64, 2)), H=2, causal=True), id="two-branches-causal"),
    ],
)
def test_one_tile_of_keys_and_many_of_queries(case: Case) -> None:
    """dq of tiles that are stored twice or never, zero rows between them, what a later branch merges."""
    loads = "descriptor" if case.dtype == "fp16" else "pointer"
    tall = LaunchConfig(16, 32, num_warps=4, num_stages=1, loads=loads)
    inputs = make_inputs(case)
    found = run_kernels(case, inputs, {"bwd": tall})
    check_results(found, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
def test_ranges_of_queries() -> None:
    """dq of steps that are not asked, or zero rows that a range leaves to nobody."""
    case = Case(N=61, branches=((20, 4),), H=2)
    inputs = make_inputs(case)
    actual = run_ranges(case, inputs, (0, 1, 23, 40, case.N), TILE, ops=EVERY_OP)
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize(("segment", "merge"), [(16, False), (16, True), (48, False), (48, True)])
def test_the_tuner_runs_it(segment: int, merge: bool) -> None:
    """A time without the memory that dq is added up in, or results that are not those that it is timed for."""
    problem = Problem("fp32", 1, 96, 2, 2, 16, ((segment, 1),))
    task = Task(ProblemKey.of(problem, "bwd", 0), problem, "bwd", merge, "test")
    bench = Bench(torch.device("cpu"), device.INTERPRETER, ROUTES)
    assert not bench(CheckJob(task, Candidate.of(TILE))).wrong  # type: ignore[union-attr]
    half = Candidate.apart([("dkdv", (0,), TILE)])
    assert bench(CheckJob(task, half)).wrong  # type: ignore[union-attr]
