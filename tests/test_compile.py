"""Generated kernels compiled for GPUs that are not here. A process of its own: no interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from codegen.matrix import VARIANTS
from dilated_attention_pytorch import device, generated, heuristics
from dilated_attention_pytorch.config import IN_GLUON, OPS, LaunchConfig, Problem
from dilated_attention_pytorch.errors import ConfigError
from dilated_attention_pytorch.heuristics import FLOOR
from dilated_attention_pytorch.runtime.plan import Choice, untuned
from dilated_attention_pytorch.runtime.variants import refuses_ring
from dilated_attention_pytorch.tuning import screen
from dilated_attention_pytorch.tuning.screen import Resources, compile_delta, compile_offline
from dilated_attention_pytorch.variant import Variant

from .kernels import ops_of, pattern_case, pattern_config

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

EVERYWHERE = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KINDS = ("general_hilbert", "s2048_d2_even", "s128_d2_snake_all_one", "s1024_2048_d1_2")
"""One of each kind of text: ragged loops over an index, even loops, one tile with a computed order, a chain."""
LOOPS = ("general", "general_hilbert_all")
"""The texts that hold every feature's branches: rows in place, dilated; rows through an index, all asking."""
CHAIN = "s2048_4096_8192_d1_2_4"
CHAIN_FEATURES = ("causal-mask", "grouped", "D96-fp16", "fp32-tf32")
TOOLCHAIN = ("sm_90", "gfx942")
ALL = os.environ.get("PROVE") == "all"

LARGE = {*((kind, "sm_90") for kind in KINDS), *(("s2048_d2_even", arch) for arch in EVERYWHERE)}
"""Texts and GPUs that are compiled with the untuned default: the others with tiles that compile in half the time."""
CELLS = [
    (variant.name, arch)
    for variant in VARIANTS
    for arch in EVERYWHERE
    if arch == "sm_90" or not variant.ring
    if ALL or variant.name in KINDS or arch == "sm_90"
]
"""Every variant is compiled for every GPU by `make prove`."""


def compiled(
    variant: Variant, op: str, arch: str, problem: Problem, *, merge: bool = False, quick: bool = False
) -> tuple[Resources, int]:
    """What the launch takes, and what the plan believes that it takes; `quick` is with tiles that compile soon."""
    config = (
        FLOOR[0] if quick and not (ALL or variant.one_tile or variant.ring) else _config(variant, op, arch, problem)
    )
    choice = Choice.of(op, tuple(range(len(problem.branches))), variant, config, "test", "", merge=merge)
    estimate = heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, arch)
    return compile_offline(problem, choice, arch), estimate


def _config(variant: Variant, op: str, arch: str, problem: Problem) -> LaunchConfig:
    """The untuned default that fits; for a text of one tile, the tile."""
    if variant.one_tile:
        config = pattern_config(variant)
        assert config is not None
        return config[op]
    configs = untuned(problem, tuple(range(len(problem.branches))), op, arch, generated.names())
    configs = [config for config in configs if (config.loads in IN_GLUON) == variant.ring]
    limit = device.SHARED_BYTES[arch]
    fitting = [c for c in configs if heuristics.shared_bytes(op, problem.head_dim, problem.dtype, c, arch) <= limit]
    return (fitting or list(FLOOR))[0]


def case_problem(variant: Variant, **changes: object) -> Problem:
    """The problem of the variant's case, at a size that people run."""
    case = pattern_case(variant, heads=16, D=64, dtype="bf16")
    snake = {"order": "snake", "row_width": 37} if variant.order == "snake" else {}
    return replace(case.problem, **{"kv_heads": 16, **snake, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=[pytest.mark.toolchain] * (name in KINDS and arch in TOOLCHAIN))
        for name, arch in CELLS
    ],
)
def test_variant_compiles_and_fits(name: str, arch: str) -> None:
    """A text that the compiler refuses, outgrows the GPU, or takes more shared memory than the plan reckons with."""
    variant = Variant.from_name(name)
    ops = ops_of(variant)
    if variant.ring and variant.dilation is not None and not ALL:  # the general ring's text, but for two constants
        ops = (OPS[list(VARIANTS).index(variant) % len(OPS)],)
    for op in ops:
        resources, estimate = compiled(variant, op, arch, case_problem(variant), quick=(name, arch) not in LARGE)
        assert resources.shared_bytes <= estimate, f"{op}: the plan reckons with {estimate}"
        assert resources.shared_bytes <= device.SHARED_BYTES[arch], op


@pytest.mark.toolchain
@pytest.mark.parametrize("arch", EVERYWHERE)
def test_delta_compiles(arch: str) -> None:
    """The one kernel that no variant owns."""
    assert compile_delta(case_problem(Variant.from_name("general")), arch).shared_bytes <= 4096


FEATURES = {
    "causal-mask": {"causal": True, "mask": True},
    "grouped": {"kv_heads": 2},
    "table": {"head_offset": "table"},
    "zeros": {"padding": "zeros"},
    "D96-fp16": {"head_dim": 96, "dtype": "fp16"},
    "D24-odd-strides": {"head_dim": 24, "causal": True},
    "D256": {"head_dim": 256},
    "fp32-tf32": {"dtype": "fp32", "tf32": True, "head_dim": 128},
    "fp32-highest": {"dtype": "fp32", "head_dim": 32},
    "range": {"query_range": (50, 90)},
    "dropout": {"dropout": True},
}
TILED = {"head_dim", "dtype"}
"""What decides how large a tile is: these features are compiled with the untuned default."""


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        (name, feature)
        for place, feature in enumerate(FEATURES)
        for name in (LOOPS if ALL or feature == "dropout" else [LOOPS[place % 2]])
    ]
    + [(CHAIN, feature) for feature in CHAIN_FEATURES],
)
def test_feature_compiles(name: str, feature: str) -> None:
    """A constexpr branch that only one feature enters: in one of two texts in turn, in both with `make prove`."""
    variant = Variant.from_name(name)
    for op in OPS:
        problem, quick = case_problem(variant, **FEATURES[feature]), not TILED & FEATURES[feature].keys()
        resources, estimate = compiled(variant, op, "sm_90", problem, merge=name != CHAIN, quick=quick)
        assert resources.shared_bytes <= min(estimate, device.SHARED_BYTES["sm_90"]), op


DESCRIBED = LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="descriptor")
CHOSEN = (
    ("s2048_d2_even", "fwd", replace(DESCRIBED, block_m=128, block_n=128, num_warps=8, num_stages=2), 128),
    ("s2048_d2_even", "dq", DESCRIBED, 128),
    ("general_one_even", "bwd", LaunchConfig(64, 64, num_warps=4, num_stages=1, loads="descriptor"), 128),
    ("s128_d1_all_one_even", "bwd", LaunchConfig(128, 128, num_warps=8, num_stages=1), 64),
    ("s128_d1_all_one_even", "fwd", LaunchConfig(32, 128, num_warps=4, num_stages=1, loads="descriptor"), 128),
    ("s128_d1_all_even", "bwd", LaunchConfig(32, 128, num_warps=8, num_stages=2), 64),
    ("s128_d1_all_even", "bwd", LaunchConfig(64, 128, num_warps=8, num_stages=3, loads="descriptor"), 64),
    ("s1024_2048_d1_2_even", "fwd", DESCRIBED, 128),
    ("s2048_d2_even_ring", "fwd", LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="producer"), 128),
    ("full_even_ring", "fwd", LaunchConfig(128, 64, num_warps=8, num_stages=4, loads="producer"), 64),
    ("s2048_d1_even_ring", "dkdv", LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"), 128),
    ("general_even_ring", "dkdv", LaunchConfig(32, 64, num_warps=4, num_stages=2, loads="ring"), 128),
    ("general_one_even_ring", "bwd", LaunchConfig(64, 128, num_warps=8, num_stages=2, loads="ring"), 64),
    ("s2048_d1_even_ring", "dq", LaunchConfig(128, 64, num_warps=8, num_stages=2, loads="ring"), 128),
    ("general_hilbert_even_ring", "fwd", LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="ring"), 64),
    ("general_hilbert_even_ring", "dq", LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="ring"), 128),
    ("s1024_d2_hilbert_even_ring", "dkdv", LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"), 64),
)
"""What a measurement may choose and no default does."""


@pytest.mark.toolchain
@pytest.mark.parametrize(("name", "op", "config", "head_dim"), CHOSEN, ids=lambda value: getattr(value, "name", value))
def test_what_a_measurement_may_choose_compiles(name: str, op: str, config: LaunchConfig, head_dim: int) -> None:
    """A branch of a text that no untuned default enters: refused, spilling, or larger than the tuner reckons with."""
    variant = Variant.from_name(name)
    problem = case_problem(variant, head_dim=head_dim)
    choice = Choice.of(op, tuple(range(len(problem.branches))), variant, config, "test", "")
    found = compile_offline(problem, choice, "sm_90")
    assert found.shared_bytes <= heuristics.shared_bytes(op, head_dim, problem.dtype, config, "sm_90")
    assert found.spills == 0


COMPUTING = (
    ("s2048_d2_even_ring", "dq", LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"), 128),
    ("general_ring", "dq", LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring"), 48),
    ("general_one_even_ring", "bwd", LaunchConfig(64, 128, num_warps=8, num_stages=2, loads="ring"), 64),
)


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("name", "op", "config", "head_dim"), COMPUTING, ids=lambda value: getattr(value, "name", value)
)
def test_a_launch_that_computes_delta_compiles(name: str, op: str, config: LaunchConfig, head_dim: int) -> None:
    """What a call of one branch runs and no candidate does: refused, spilling, or larger than the plan reckons with."""
    variant = Variant.from_name(name)
    problem = case_problem(variant, head_dim=head_dim)
    found = compile_offline(problem, Choice.of(op, (0,), variant, config, "test", ""), "sm_90", computes_delta=True)
    assert found.shared_bytes <= heuristics.shared_bytes(op, head_dim, problem.dtype, config, "sm_90")
    assert found.spills <= 128


THREES = Problem("bf16", 1, 49153, 16, 16, 64, ((24576, 3),))
"""LLVM knows that no segment has 65536 steps, and divides by 3 in 16 bits."""


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("op", "config"),
    [
        ("fwd", LaunchConfig(64, 32, num_warps=4, num_stages=1, loads="ring")),
        ("fwd", LaunchConfig(64, 64, num_warps=4, num_stages=1, loads="ring")),
        ("fwd", LaunchConfig(128, 64, num_warps=8, num_stages=3, loads="producer")),
        ("dkdv", LaunchConfig(32, 64, num_warps=4, num_stages=1, loads="ring")),
        ("dq", LaunchConfig(64, 32, num_warps=4, num_stages=2, loads="ring")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_rings_count_in_32_bits(op: str, config: LaunchConfig) -> None:
    """A loop that never ends, in somebody's training: ptxas 12.8 makes one of a count that LLVM narrows to 16 bits."""
    assert refuses_ring(THREES, (0,), op, config) is None
    compile_offline(THREES, Choice.of(op, (0,), Variant.from_name("general_ring"), config, "test", ""), "sm_90")


def test_a_count_that_ptxas_gets_wrong_is_no_candidate() -> None:
    """A rule that refuses nothing: minutes of a tuning run spent on a hang, on a GPU alone."""
    with pytest.raises(ConfigError, match="16 bits"):
        screen._refuse_miscompiled("max.u16 %rs3, %rs1, %rs2;", LaunchConfig(64, 32))
    screen._refuse_miscompiled("max.u32 %r3, %r1, %r2;", LaunchConfig(64, 32))


def test_a_difference_that_ptxas_gets_wrong_is_no_candidate() -> None:
    """A rule that refuses nothing: gradients of the first keys of a segment that are wrong, on a GPU alone."""
    ptx = """
    mul.hi.u32 %r3, %r1, 715827883;
    cvt.u64.u32 %rd2, %r3;
    cvt.u64.u32 %rd3, %r2;
    sub.s64 %rd4, %rd2, %rd3;
    """
    tiles = LaunchConfig(64, 64)
    with pytest.raises(ConfigError, match="quotient"):
        screen._refuse_miscompiled(ptx, tiles)
    screen._refuse_miscompiled(ptx.replace("%rd2, %rd3;", "%rd3, %rd2;"), tiles)  # that way round it is right


@pytest.mark.toolchain
@pytest.mark.parametrize("rate", [3, 5, 6])
def test_no_ring_takes_a_difference_that_ptxas_gets_wrong(rate: int) -> None:
    """Rows left of a segment, counted down from a first tile that may be 0, in the machine code of dK/dV."""
    problem = replace(THREES, length=32768, branches=((16384, rate),), causal=True)
    tiles = LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring")
    for name in ("general_ring", "full_ring"):
        compile_offline(problem, Choice.of("dkdv", (0,), Variant.from_name(name), tiles, "test", ""), "sm_90")
        problem = replace(problem, branches=((32768, rate),))


@pytest.mark.toolchain
@pytest.mark.parametrize("op", ["fwd", "dq", "dkdv"])
@pytest.mark.parametrize("rows", [64, 128])
def test_rings_of_few_turns_along_an_order_compile(op: str, rows: int) -> None:
    """Copies behind a condition that is known to be false, on which Triton 3.6 fails: the call ends in its error."""
    problem = replace(THREES, length=1024, branches=((2 * rows, 2),), head_dim=64, order="hilbert")
    tiles = LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring")
    variant = Variant.from_name("general_hilbert_even_ring")
    found = compile_offline(problem, Choice.of(op, (0,), variant, tiles, "test", ""), "sm_90")
    assert found.spills == 0


@pytest.mark.parametrize("rows", [128, 256])
def test_tiles_of_tf32_take_what_the_plan_reckons_with(rows: int) -> None:
    """A tile read from both sides that is counted once: the call ends with the compiler's error, not with our own."""
    variant = Variant.from_name("general_all_one_even")
    problem = case_problem(variant, head_dim=16, dtype="fp32", tf32=True)
    config = LaunchConfig(rows, 64, num_warps=8, num_stages=1)
    found = compile_offline(problem, Choice.of("dkdv", (0,), variant, config, "test", ""), "sm_90")
    assert found.shared_bytes <= heuristics.shared_bytes("dkdv", 16, "fp32", config, "sm_90")


def test_specialised_text_is_smaller_than_the_general_one() -> None:
    """An even text that still carries the tail's code: it must need no more registers than the ragged one."""
    even, ragged = (Variant.from_name(name) for name in ("s2048_d2_even", "s2048_d2"))
    problem = case_problem(even)
    used = [compiled(variant, "fwd", "sm_90", problem)[0].registers for variant in (even, ragged)]
    assert None not in used
    assert used[0] < used[1]
