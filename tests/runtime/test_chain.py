"""Several branches in one pass: which branches share it, and what the kernels then compute.

The kernels run in Triton's interpreter, from a text for segments that are small enough for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch as dap
from codegen.render import render
from dilated_attention_pytorch import database, generated
from dilated_attention_pytorch.config import OPS, LaunchConfig, Problem, ProblemKey
from dilated_attention_pytorch.device import INTERPRETER, Toolchain, simulated
from dilated_attention_pytorch.runtime import launch, variants
from dilated_attention_pytorch.runtime import plan as plans
from dilated_attention_pytorch.runtime.variants import chain, text_for
from dilated_attention_pytorch.tuning.measure import Bench, CheckJob
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.tuning.routes import ROUTES
from dilated_attention_pytorch.tuning.space import Candidate
from dilated_attention_pytorch.variant import Variant

from ..cases import Case, make_inputs, oracle
from ..kernels import run_kernels, variants_run
from ..measurements import KERNELS, entry
from ..tolerances import check_results

LONGNET = Problem("bf16", 1, 32768, 12, 12, 64, ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12)))
SMALL = Variant(32, 1, wider=((64, 2),))
NAMES = frozenset({"general", "full", "s2048_4096_8192_d1_2_4", "s2048_4096_8192_d1_2_4_even", "s2048_4096_d1_2"})


def test_nested_branches_share_a_pass() -> None:
    """LongNet's first three: a rate that the next one is no multiple of ends a chain, and no branch is lost."""
    assert chain(LONGNET, NAMES) == (0, 1, 2)
    assert plans.launch_order(LONGNET, NAMES) == [(0, 1, 2), (3,), (4,)]
    turned = replace(LONGNET, branches=LONGNET.branches[::-1])
    assert plans.launch_order(turned, NAMES) == [(4, 3, 2), (1,), (0,)]


def test_without_a_text_fewer_branches_share() -> None:
    """A chain that nobody rendered must not stop the call, nor the part of it that is there."""
    assert chain(LONGNET, frozenset({"general", "s2048_4096_d1_2"})) == (0, 1)
    assert chain(LONGNET, frozenset({"general"})) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"queries": "all"},
        {"order": "hilbert"},
        {"dropout": True},
        {"mix_grad": "detached"},
        {"head_offset": "table"},
        {"head_offset": "blocked", "heads": 12},
        {"query_range": (0, 4096)},
        {"length": 30000, "padding": "zeros"},
        {"branches": ((2048, 1), (5000, 2))},
        {"branches": ((2048, 2), (4096, 3))},
        {"branches": ((96, 1), (192, 2))},
    ],
    ids=str,
)
def test_what_forbids_a_pass(change: dict[str, object]) -> None:
    """Copies of a key that dropout tells apart, phantoms, steps that are not nested, rows that no tile divides."""
    texts = NAMES | {"s2048_5000_d1_2", "s96_192_d1_2"}
    found = chain(replace(LONGNET, **change), texts)  # type: ignore[arg-type]
    assert found == ((0, 1) if change == {"head_offset": "blocked", "heads": 12} else ())


def test_classes_have_rows_for_many_tiles() -> None:
    """A chain of five would be slower than its first three and the others alone."""
    wide = replace(LONGNET, branches=tuple((2048 << level, 1 << level) for level in range(5)))
    texts = NAMES | {"s2048_4096_8192_16384_32768_d1_2_4_8_16"}
    assert chain(wide, texts) == (0, 1, 2)


def test_the_story_tells_of_a_pass() -> None:
    """Three branches that seem to have vanished, or a text that nobody knows could be had."""
    told = plans.plan(LONGNET, simulated("h100"), "triton", toolchain=Toolchain("3.6.0")).explain()
    assert "launch 1: branches 0, 1, 2 in one pass, segment/dilation 2048/1, 4096/2, 8192/4" in told
    assert "--add" not in told
    other = replace(LONGNET, branches=((512, 1), (1024, 1)))
    told = plans.plan(other, simulated("h100"), "triton", toolchain=Toolchain("3.6.0")).explain()
    assert "branches 0, 1 could share a pass: in a checkout, `python -m codegen --add 512:1+1024:1`" in told


def test_tiles_divide_a_class() -> None:
    """A tile with rows of two segments would attend across them, one behind a cut segment's end write there."""
    texts = frozenset({"s2048_4096_8192_d1_2_4", "s2048_4096_8192_d1_2_4_even"})
    found = text_for(LONGNET, (0, 1, 2), "fwd", LaunchConfig(128, 64), texts)
    assert found is not None
    assert found.even
    assert text_for(LONGNET, (0, 1, 2), "fwd", LaunchConfig(1024, 64), texts) is None
    for length in (32768 - 4, 20480):
        ragged = text_for(replace(LONGNET, length=length), (0, 1, 2), "fwd", LaunchConfig(128, 64), texts)
        assert ragged is not None
        assert not ragged.even


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "tiles", [LaunchConfig(64, 64), LaunchConfig(128, 64), LaunchConfig(64, 256)], ids=lambda x: x.name
)
def test_tiles_of_a_text_without_tails_are_as_many_as_the_rows_fill(op: str, tiles: LaunchConfig) -> None:
    """A launch whose last tiles lie outside of the tensors that they write to."""
    evens = 0
    for length in range(1024, 40960, 1024):
        problem = replace(LONGNET, length=length, batch=2)
        variant = text_for(problem, (0, 1, 2), op, tiles, NAMES)
        assert variant is not None
        choice = plans.Choice.of(op, (0, 1, 2), variant, tiles, "test", "")
        sizes = {"N": length, "H": 12, "G": 12, "p_q": torch.empty(2, length, 12, 64, device="meta")}
        covered = launch._sizes_of_chain(choice, sizes)[1] * (tiles.block_n if op == "dkdv" else tiles.block_m)
        evens += variant.even
        assert covered == 2 * 12 * length if variant.even else covered >= 2 * 12 * length
    assert evens > 3


@pytest.fixture
def small_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A text for segments of 32 and 64 steps, and plans that take it."""
    for variant in (SMALL, replace(SMALL, even=True)):
        (tmp_path / f"{variant.name}.py").write_text(render(variant), encoding="utf-8")
    names = generated.names() | {SMALL.name, replace(SMALL, even=True).name}
    monkeypatch.setattr(generated, "__path__", [*generated.__path__, str(tmp_path)])
    monkeypatch.setattr(plans, "_rendered", lambda: names)
    monkeypatch.setattr(variants, "CHAIN_ROWS", 16)
    plans._plan.cache_clear()
    yield
    plans._plan.cache_clear()


@pytest.mark.interpreter
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("case", "loads"),
    [
        pytest.param(Case(N=64, branches=SMALL.levels, H=2, dtype="fp16"), "descriptor", id="even-descriptor"),
        pytest.param(Case(N=101, branches=SMALL.levels, H=3), "pointer", id="ragged"),
        pytest.param(Case(N=96, branches=SMALL.levels, B=2, H=2), "pointer", id="cut-segment"),
        pytest.param(
            Case(N=75, branches=SMALL.levels, H=4, G=2, D=24, causal=True, mask=True, head_offset="zero"),
            "pointer",
            id="causal-mask-grouped",
        ),
    ],
)
@pytest.mark.usefixtures("small_text")
def test_one_pass_is_the_softmax_of_all_branches(case: Case, loads: str) -> None:
    """A pair counted once or thrice instead of twice, a gap that is met again, a class that is read as another."""
    config = LaunchConfig(16, 16, num_warps=4, num_stages=1, loads=loads)
    inputs = make_inputs(case)
    even = loads == "descriptor"
    assert variants_run(case, inputs, config) == {replace(SMALL, even=even).name}
    check_results(run_kernels(case, inputs, config), oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("case", "loads"),
    [
        pytest.param(Case(N=64, branches=SMALL.levels, H=2, dtype="fp16"), "descriptor", id="even-descriptor"),
        pytest.param(Case(N=64, branches=SMALL.levels, H=2, G=1, mask=True), "pointer", id="even-mask-grouped"),
        pytest.param(Case(N=75, branches=(*SMALL.levels, (75, 4)), H=2, causal=True), "pointer", id="ragged-and-more"),
    ],
)
@pytest.mark.usefixtures("small_text")
def test_tiles_of_a_pass(case: Case, loads: str) -> None:
    """A descriptor of another class or batch; what a branch beside the pass merges."""
    config = LaunchConfig(16, 16, num_warps=4, num_stages=1, loads=loads)
    inputs = make_inputs(case)
    found = run_kernels(case, inputs, dict.fromkeys(OPS, config))
    check_results(found, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_text")
def test_operations_need_not_agree_about_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that merges into what another operation wrote, or writes over what its own did."""
    case = Case(N=75, branches=(*SMALL.levels, (75, 4)), H=2)
    inputs = make_inputs(case)
    apart = entry("dq", case.problem, branch=(0, 1), apart=90.0, config=LaunchConfig(16, 16, num_stages=1))
    database.save(INTERPRETER, [apart], tmp_path)
    monkeypatch.setattr(database, "rendered_kernels", lambda: KERNELS)
    with dap.options(database=tmp_path) as chosen:
        planned = plans.plan(case.problem, INTERPRETER, "triton", chosen)
        assert [[choice.branches for choice in planned.of(op)] for op in ("fwd", "dq")] == [
            [(0, 1), (2,)],
            [(0,), (1,), (2,)],
        ]
        found = run_kernels(case, inputs)
    check_results(found, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_text")
@pytest.mark.parametrize("op", OPS)
def test_the_tuner_runs_branches_apart(op: str) -> None:
    """A time beside a pass of launches that leave a branch out, or write over what the one before them wrote."""
    problem = Problem("fp32", 1, 64, 1, 1, 16, SMALL.levels)
    task = Task(ProblemKey.of(problem, op, 0, 1), problem, op, False, "test")
    config = LaunchConfig(32, 32, num_warps=4, num_stages=1)
    bench = Bench(torch.device("cpu"), INTERPRETER, ROUTES)
    both = Candidate.apart((op, (branch,), config) for branch in (0, 1))
    assert not bench(CheckJob(task, both)).wrong
    half = Candidate.apart([(op, (1,), config)])
    assert bench(CheckJob(task, half)).wrong


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_text")
def test_branches_that_coincide_are_computed_once() -> None:
    """A sequence shorter than every segment: each pair is met once, with its number, and not once a branch."""
    case = Case(N=21, branches=SMALL.levels, H=2)
    inputs = make_inputs(case)
    config = LaunchConfig(16, 16, num_warps=4, num_stages=1)
    check_results(run_kernels(case, inputs, config), oracle(case, inputs), case.dtype, dout=inputs.dout)
