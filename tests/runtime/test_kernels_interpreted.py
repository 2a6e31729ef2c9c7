"""Generated kernels in Triton's interpreter, on CPU tensors, against the oracle. A process of its own."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.variant import Variant

from ..cases import CASES, DETACHED, Case, cases, make_inputs, oracle
from ..kernels import as_dtype, dense_formula, pattern_case, pattern_config, run_kernels, run_ranges, variants_run
from ..tolerances import check_results

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

# The interpreter's bf16 is garbage in every version, and fp64 has no kernel.
RUNNABLE = [as_dtype(case, bf16="fp16", fp64="fp32") for case in CASES]
TILES = (LaunchConfig(16, 32, num_stages=1), LaunchConfig(32, 16, num_stages=1), None)
"""Tiles of unequal sides, so that a swapped size shows, and the untuned default."""

PATTERNS = (
    "s128_d1_snake_all_one_even",
    "s128_d2_snake_all_one",
    "s128_d4_snake_all",
    "s128_d2_all_even",
    "s128_d4_all_one_even",
    "full_d4_even",
    "full_d4",
    "full_hilbert",
    "general_snake",
)
"""One of each kind of text that the case table does not come to."""


TOOLCHAIN = ("s128_d2_snake_all_one", "s128_d2_all_even", "full_hilbert")
"""Of these, the ones that other versions of triton run too."""

RANGES = (
    Case(N=61, branches=((16, 3),), G=2, H=2),
    Case(N=61, branches=((20, 4), (99, 2)), H=2, causal=True),
    Case(N=61, branches=((20, 4),), H=2, queries="all", causal=True, order="random", mask=True),
)
"""Calls that are also made in parts."""


def check(case: Case, config: object) -> None:
    inputs = make_inputs(case)
    actual = run_kernels(case, inputs, config)  # type: ignore[arg-type]
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout, dense=dense_formula(case, inputs))


@pytest.mark.parametrize("number", range(len(RUNNABLE)), ids=[case.id for case in RUNNABLE])
def test_case_table(number: int) -> None:
    """Wrong rows, masks, offsets, merges or tails; unwritten outputs (they hold NaN); writes beside them."""
    check(RUNNABLE[number], TILES[number % len(TILES)])


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.toolchain] * (n in TOOLCHAIN)) for n in PATTERNS])
def test_specialised_text(name: str, causal: bool) -> None:
    """A specialised text whose promises (one tile, nothing ragged, computed order) are not what the plan keeps."""
    variant = Variant.from_name(name)
    case, config = pattern_case(variant, causal=causal, mask=not causal), pattern_config(variant)
    assert variants_run(case, make_inputs(case), config) == {name}
    check(case, config)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(max_length=40))
def test_drawn_cases(case: Case) -> None:
    """What nobody thought of."""
    check(case, TILES[0])


def test_expanded_gradient_is_read_in_place() -> None:
    """A dout of stride 0 in every dimension, as `out.sum().backward()` gives, read as if it were dense."""
    case = Case(N=37, branches=((10, 2),), H=2)
    inputs = make_inputs(case)
    one = inputs._replace(
        dout=torch.full((), 0.7).expand(inputs.dout.shape), dlse=torch.zeros(()).expand(inputs.dlse.shape)
    )
    check_results(run_kernels(case, one, TILES[0]), oracle(case, one), "fp32", dout=one.dout)


def test_strides_that_are_no_multiple_of_eight() -> None:
    """Wide loads of rows that are not aligned: heads cut out of a wider tensor with odd strides."""
    case = Case(N=37, branches=((10, 2),), H=2, D=16)
    inputs = make_inputs(case)
    wide = torch.zeros(1, 37, 2, 19)
    q = wide[..., 1:17].copy_(inputs.q)
    check_results(run_kernels(case, inputs._replace(q=q), TILES[1]), oracle(case, inputs), "fp32", dout=inputs.dout)


@pytest.mark.toolchain
@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.id)
def test_launches_take_a_range_of_queries(case: Case) -> None:
    """A range that begins or ends inside a segment or a tile; keys that no query of a range asks."""
    inputs = make_inputs(case)
    actual = run_ranges(case, inputs, (0, 1, 23, 40, case.N), TILES[0])
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("case", DETACHED, ids=lambda case: case.id)
def test_detached_mix(case: Case) -> None:
    """A delta of the merged output where each branch's own is due."""
    inputs = make_inputs(case)
    actual = run_kernels(case, inputs, TILES[0], mix_grad="detached")
    check_results(actual, oracle(case, inputs, mix_grad="detached"), case.dtype, dout=inputs.dout)


def test_dropout_drops_the_same_pairs_in_every_tile_and_backend() -> None:
    """A mask that follows rows of a tile: a tuned kernel would train another model. v is the identity, so out is P."""
    length, branch = 40, (40, 1)
    q, k = (torch.randn(1, length, 2, length) for _ in range(2))
    v = torch.eye(length)[None, :, None].expand(1, length, 2, length).contiguous()
    patterns = []
    for config, backend in ((TILES[0], "triton"), (TILES[1], "triton"), (None, "triton"), (None, "torch")):
        torch.manual_seed(3)
        with dap.options(config=config):
            patterns.append(dap.dilated_attention(q, k, v, *branch, dropout_p=0.5, backend=backend) > 0)
    assert 0.4 < patterns[0].float().mean() < 0.6
    assert all(torch.equal(pattern, patterns[0]) for pattern in patterns)
