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
EVEN = replace(PROBLEM, length=8192, branches=((64, 1),))
"""A tile holds a segment's keys."""
TILE = LaunchConfig(16, 16, num_warps=4, num_stages=1)
SQUARE = LaunchConfig(64, 64)
FLAT = LaunchConfig(16, 64)


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
    found = backward(tmp_path, EVEN, entry("bwd", EVEN, config=SQUARE, apart=apart))
    assert ops(found) == launches
    assert [choice.op for choice in found.beaten] == (["bwd"] if len(launches) == 2 else [])
    assert ("not bwd of branch 0 in one launch: faster apart; " in found.explain()) == bool(found.beaten)


def test_nobody_guesses(tmp_path: Path) -> None:
    """A launch whose gain depends on the GPU, made where nobody has measured it."""
    assert ops(backward(tmp_path, EVEN, entry("dkdv", EVEN))) == ["dkdv", "dq"]


def test_what_was_not_measured_is_not_asked_for(tmp_path: Path) -> None:
    """A call that is refused for want of a measurement of one launch, with both that it stands in for measured."""
    near = entry("bwd", EVEN, config=LaunchConfig(64, 128), branches=((128, 1),))
    every = [entry(op, EVEN, config=FLAT) for op in OPS]
    committed = database_at(tmp_path / "db", {"h100": [near, *every]})
    strict = Options(on_miss="error")
    assert ops(plan(EVEN, H100, options=strict, toolchain=TOOLCHAIN, committed=committed)) == ["dkdv", "dq"]
    assert ops(plan(EVEN, H100, toolchain=TOOLCHAIN, committed=committed)) == ["bwd"]


@pytest.mark.parametrize(
    ("change", "launches"),
    [
        ({"deterministic": True}, ["bwd"]),
        ({"order": "hilbert"}, ["dkdv", "dq"]),
        ({"length": 8765}, ["bwd"]),
        ({"head_offset": "table"}, ["dkdv", "dq"]),
        ({"branches": ((256, 1),)}, ["dkdv", "dq"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("tiles", [SQUARE, FLAT], ids=["square", "flat"])
def test_what_forbids_it(change: dict[str, Any], launches: list[str], tiles: LaunchConfig) -> None:
    """Rows of absent heads that nobody clears; dq of some of a query's keys, stored as if it were of all."""
    ragged = tiles is FLAT and "length" in change  # loops over ragged rows give dk and dv alone
    assert ops(asking_for_it(replace(EVEN, **change), tiles)) == (["dkdv", "dq"] if ragged else launches)


def test_what_is_merged() -> None:
    """dk and dv written over another's; dq merged into memory that nobody wrote."""
    found = asking_for_it(replace(EVEN, branches=((64, 1), (500, 3))))
    launched = [(choice.op, choice.merge) for choice in found.backward]
    assert launched == [("bwd", False), ("dkdv", True), ("dq", True)]


def asking_for_it(asked: Problem, tiles: LaunchConfig = SQUARE) -> Plan:
    """The plan of a call with tiles for all gradients at once."""
    return plan(asked, H100, options=Options(config=(("bwd", tiles),)), toolchain=TOOLCHAIN)


# ---- What it computes ------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "loads", "features"),
    [
        ("general_one_even", "descriptor", "causal mask"),
        ("s128_d4_all_one_even", "descriptor", "mask"),
        ("s128_d2_snake_all_one", "pointer", "mask"),
        ("general_one", "pointer", "causal"),
        ("general_one", "pointer", ""),
        ("general_even", "descriptor", ""),
        ("general_even", "descriptor", "causal mask"),
        ("general_even", "pointer", "mask"),
    ],
)
def test_each_kind_of_text(name: str, loads: str, features: str) -> None:
    """A wrong row or column of a descriptor, dq of masked keys or of other rows."""
    variant = Variant.from_name(name)
    case = pattern_case(variant, heads=2, dtype="fp16", causal="causal" in features, mask="mask" in features)
    tiles = {op: replace(config, loads=loads) for op, config in chosen_config(variant).items()}
    inputs = make_inputs(case)
    assert variants_run(case, inputs, tiles) == {name}
    check_results(run_kernels(case, inputs, tiles), oracle(case, inputs), case.dtype, dout=inputs.dout)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, each head's steps side by side in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.interpreter
def test_heads_that_lie_behind_all_steps() -> None:
    """A descriptor of a batch of one whose rows end before the second head begins: it would read zeros."""
    case = pattern_case(Variant.from_name("general_even"), heads=2, dtype="fp16")
    inputs = make_inputs(case)
    tiles = dict.fromkeys(OPS, LaunchConfig(16, 16, num_warps=4, num_stages=1, loads="descriptor"))
    moved = inputs._replace(q=heads_first(inputs.q), k=heads_first(inputs.k), v=heads_first(inputs.v))
    check_results(run_kernels(case, moved, tiles), oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(N=96, branches=((16, 1), (48, 1)), H=2), id="joint-then-apart"),
        pytest.param(Case(N=96, branches=((48, 1), (16, 1)), H=2), id="apart-then-joint"),
        pytest.param(Case(N=61, branches=((20, 3), (30, 2)), H=4, G=2, causal=True, dropout=0.2), id="grouped-dropout"),
        pytest.param(Case(N=96, branches=((32, 2), (48, 1)), H=4, causal=True, D=24), id="held-then-apart"),
    ],
)
def test_launches_of_both_kinds(case: Case) -> None:
    """dq of a branch that is lost, or taken twice, where another gives it in another launch."""
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
    actual = run_ranges(case, inputs, (0, 1, 23, 40, case.N), dict.fromkeys(EVERY_OP, TILE))
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize("merge", [False, True])
def test_the_tuner_runs_it(merge: bool) -> None:
    """Results that are not those that it is timed for."""
    problem = Problem("fp32", 1, 96, 2, 2, 16, ((16, 1),))
    task = Task(ProblemKey.of(problem, "bwd", 0), problem, "bwd", merge, "test")
    bench = Bench(torch.device("cpu"), device.INTERPRETER, ROUTES)
    assert not bench(CheckJob(task, Candidate.of(TILE))).wrong  # type: ignore[union-attr]
    half = Candidate.apart([("dkdv", (0,), TILE)])
    assert bench(CheckJob(task, half)).wrong  # type: ignore[union-attr]
