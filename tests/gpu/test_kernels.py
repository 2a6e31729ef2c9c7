"""Every generated kernel on this machine's GPU, against the float64 oracle on the same rounded inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dilated_attention_pytorch as dap
from codegen.matrix import VARIANTS
from dilated_attention_pytorch import database, device, heuristics, reference
from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.runtime import decide
from dilated_attention_pytorch.variant import Variant

from ..cases import CASES, DETACHED, Case, make_inputs, oracle
from ..kernels import (
    ALONG_ORDERS,
    CHAIN_RINGS,
    CHAINS,
    ORDER_RINGS,
    RINGS,
    as_dtype,
    chosen_config,
    dense_formula,
    pattern_case,
    pattern_config,
    run_kernels,
    run_ranges,
    variants_run,
)
from ..tolerances import Results, check_results

pytestmark = pytest.mark.gpu
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="these texts are for Hopper"
)

PRECISIONS = ("bf16", "fp16", "fp32", "tf32")
HEAD_DIMS = (64, 128, 24, 96, 16, 48, 80, 8, 40, 256)
"""Classes of head dims: powers of two, padded ones, the least and the greatest."""
ONE_TILE_HEAD_DIMS = (64, 48, 24, 16)
"""A tile that holds a segment leaves less room."""


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Checks results, and notes the errors for the report."""

    def note(actual: Results, wanted: Results, precision: str, **more: Any) -> None:
        for name in ("out", "dq", "dk", "dv"):
            error = (getattr(actual, name).double() - getattr(wanted, name)).norm()
            record_property(name, f"{(error / getattr(wanted, name).norm().clamp_min(1e-300)).item():.1e}")
        check_results(actual, wanted, precision, **more)

    return note


def _run(case: Case, precision: str, record: Callable[..., None], config: Any = None, *, dense: bool = False) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        inputs = make_inputs(case, "cuda")
        actual = run_kernels(case, inputs, config)
        rough = dense_formula(case, inputs) if dense else None
        record(actual, oracle(case, inputs), precision, dout=inputs.dout, dense=rough)
    finally:
        torch.set_float32_matmul_precision("highest")


def _dtype(precision: str) -> str:
    return "fp32" if precision == "tf32" else precision


def _fit(config: dict[str, LaunchConfig] | None, head_dim: int, precision: str) -> bool:
    """Tiles that a test asks for and a caller could."""
    if config is None:
        return True
    gpu = device.current()
    assert gpu is not None
    sizes = (heuristics.shared_bytes(op, head_dim, _dtype(precision), tiles, gpu.arch) for op, tiles in config.items())
    return max(sizes) <= gpu.shared_bytes


@pytest.fixture
def untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is empty: which text a call runs is the heuristics' choice, whatever was measured since."""
    empty = database.Database(tmp_path)
    monkeypatch.setattr(database, "load", lambda *folders: empty)
    monkeypatch.setattr(decide, "_KNOWN", {})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if not variant.ring])
@pytest.mark.usefixtures("untuned")
def test_variant(name: str, precision: str, record: Callable[..., None]) -> None:
    """A text that is wrong in one dtype or width, writes beside its outputs or leaves some unwritten."""
    variant = Variant.from_name(name)
    number = list(VARIANTS).index(variant) + 3 * PRECISIONS.index(precision)
    # The untuned tiles would hold the few rows of a general text's case.
    config = pattern_config(variant) if variant.one_tile or variant.segment is None else None
    widths = [D for D in (ONE_TILE_HEAD_DIMS if variant.one_tile else HEAD_DIMS) if _fit(config, D, precision)]
    case = pattern_case(
        variant,
        heads=4,
        D=widths[number % len(widths)],
        dtype=_dtype(precision),
        causal=number % 3 == 0,
        mask=number % 3 == 1,
    )
    inputs = make_inputs(case, "cuda")
    if name not in variants_run(case, inputs, config):  # all three untuned tiles hold a segment, or are rings
        config = pattern_config(variant)
    assert name in variants_run(case, inputs, config)
    _run(case, precision, record, config)


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if variant.joinable and not variant.ring])
def test_what_a_measurement_may_choose(name: str, record: Callable[..., None]) -> None:
    """A descriptor of other rows or columns; dq of masked keys, or of other rows."""
    variant = Variant.from_name(name)
    number = list(VARIANTS).index(variant)
    case = pattern_case(
        variant,
        heads=4,
        D=64 if variant.one_tile else (64, 128)[number % 2],
        dtype=("bf16", "fp16")[number // 2 % 2],
        causal=number % 3 == 0,
        mask=number % 3 == 1,
    )
    config, inputs = chosen_config(variant), make_inputs(replace(case, B=2), "cuda")
    assert variants_run(replace(case, B=2), inputs, config) == {name}
    _run(replace(case, B=2), case.dtype, record, config)


@hopper
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if variant.ring and not variant.one_tile])
def test_ring_of_tiles(name: str, causal: bool, record: Callable[..., None]) -> None:
    """A tile that is overwritten while it is read, or read before it is there; a wrong diagonal, row or column."""
    variant = Variant.from_name(name)
    number = list(VARIANTS).index(variant) + causal
    case = pattern_case(
        variant,
        heads=4,
        D=((64, 128) if variant.even else (48, 96))[number % 2],
        dtype=("bf16", "fp16")[number // 2 % 2],
        causal=causal,
    )
    rings = CHAIN_RINGS if variant.wider else RINGS if variant.order == "none" else ORDER_RINGS
    case, config = replace(case, B=2), rings[number % len(rings)]
    assert variants_run(case, make_inputs(case, "cuda"), config) == {name}
    _run(case, case.dtype, record, config)


RING_CASES = {
    "merged": Case(N=2048, branches=((512, 1), (1024, 2), (2048, 4)), B=2, D=64, dtype="bf16"),
    "merged-causal": Case(N=2048, branches=((512, 1), (1024, 2), (2048, 4)), D=128, causal=True, dtype="bf16"),
    "grouped": Case(N=1024, branches=((512, 1),), H=6, G=2, D=64, causal=True, dtype="fp16"),
    "blocked": Case(N=1024, branches=((512, 2),), H=6, D=128, head_offset="blocked", dtype="bf16"),
    "zero": Case(N=1024, branches=((512, 4),), D=64, head_offset="zero", padding="zeros", dtype="fp16"),
    "grouped-offsets": Case(N=2048, branches=((512, 1), (2048, 4)), B=2, H=6, G=2, D=64, dtype="bf16"),
    "grouped-blocked": Case(
        N=1024, branches=((512, 2),), H=8, G=2, D=128, causal=True, head_offset="blocked", dtype="bf16"
    ),
}


@hopper
@pytest.mark.parametrize("tiles", range(len(RINGS)))
@pytest.mark.parametrize("case", RING_CASES.values(), ids=RING_CASES)
def test_what_a_ring_shares_with_others(case: Case, tiles: int, record: Callable[..., None]) -> None:
    """What earlier branches wrote, lost or taken twice; places of a ring that go on from one head to the next."""
    assert all(name.endswith("_ring") for name in variants_run(case, make_inputs(case, "cuda"), RINGS[tiles]))
    _run(case, case.dtype, record, RINGS[tiles])


@hopper
@pytest.mark.parametrize("tiles", range(len(ORDER_RINGS)))
@pytest.mark.parametrize("case", ALONG_ORDERS.values(), ids=ALONG_ORDERS)
def test_a_ring_along_an_order(case: Case, tiles: int, record: Callable[..., None]) -> None:
    """Rows that are read before their copies are there, or overwritten while tensor cores read them."""
    assert any("hilbert" in name for name in variants_run(case, make_inputs(case, "cuda"), ORDER_RINGS[tiles]))
    _run(case, case.dtype, record, ORDER_RINGS[tiles])


@hopper
@pytest.mark.parametrize("tiles", range(len(CHAIN_RINGS)))
@pytest.mark.parametrize("case", CHAINS.values(), ids=CHAINS)
def test_several_branches_in_a_ring(case: Case, tiles: int, record: Callable[..., None]) -> None:
    """A tile of another class, level or count; what is looked up ahead taken for what is at hand."""
    (name,) = variants_run(case, make_inputs(case, "cuda"), CHAIN_RINGS[tiles])
    assert name.endswith("_even_ring")
    _run(case, case.dtype, record, CHAIN_RINGS[tiles])


RAGGED = {
    "tail": Case(N=2000, branches=((768, 1),), B=2, H=4, G=2, D=64, dtype="bf16"),
    "causal": Case(N=2001, branches=((1000, 2),), B=2, H=4, D=128, causal=True, head_offset="blocked", dtype="fp16"),
    "short-head": Case(N=1020, branches=((509, 4),), B=2, H=6, D=64, dtype="bf16"),
    "short-head-causal": Case(N=1020, branches=((509, 4),), H=8, G=2, D=96, causal=True, dtype="bf16"),
    "gigapath": Case(N=1203, branches=((256, 1), (580, 2), (2000, 4), (9000, 8)), H=16, D=48, dtype="bf16"),
    "sixth": Case(N=1210, branches=((604, 6),), H=6, D=64, causal=True, dtype="bf16"),
    "columns": Case(N=1024, branches=((512, 1),), B=2, H=5, D=112, causal=True, dtype="fp16"),
    "rows-and-columns": Case(N=1501, branches=((700, 3),), B=3, H=3, D=80, head_offset="zero", dtype="bf16"),
    "steps": Case(N=1027, branches=((512, 4), (2048, 16)), B=2, H=16, D=64, dtype="bf16"),
    "phantoms": Case(
        N=1203,
        branches=((256, 1), (580, 2), (2000, 4), (9000, 8)),
        H=16,
        D=48,
        head_offset="blocked",
        padding="zeros",
        dtype="fp16",
    ),
    "many-phantoms": Case(N=1030, branches=((1000, 1), (510, 4)), B=2, H=6, D=128, padding="zeros", dtype="bf16"),
    "no-phantoms": Case(N=800, branches=((400, 2),), B=2, G=2, D=64, padding="zeros", dtype="bf16"),
}


@hopper
@pytest.mark.parametrize("tiles", range(len(RINGS)))
@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED)
def test_a_ragged_ring(case: Case, tiles: int, record: Callable[..., None]) -> None:
    """Keys behind a tail, columns of the next head, or steps of the next segment."""
    assert variants_run(case, make_inputs(case, "cuda"), RINGS[tiles]) <= {"general_ring", "full_ring"}
    _run(case, case.dtype, record, RINGS[tiles])


@hopper
@pytest.mark.parametrize("tiles", range(len(RINGS)))
def test_phantom_keys_beside_low_scores(tiles: int, record: Callable[..., None]) -> None:
    """Sums that overflow or vanish where every score is far below a phantom key's 0, with phantom keys and without."""
    case = Case(N=1000, branches=((400, 2),), D=64, padding="zeros", dtype="bf16")
    inputs = make_inputs(case, "cuda")
    inputs = inputs._replace(q=inputs.q * 0.1 + 5, k=inputs.k * 0.1 - 5)
    actual = run_kernels(case, inputs, RINGS[tiles])
    rough = dense_formula(case, inputs)  # where all keys are nearly one, gradients cancel
    record(actual, oracle(case, inputs), "bf16", dout=inputs.dout, dense=rough)


@hopper
@pytest.mark.parametrize("tiles", range(len(RINGS)))
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_a_nan_stays_in_its_segment_and_head(tiles: int, head_dim: int) -> None:
    """0 times NaN: tiles are loaded with rows of the next segment and columns of the next head."""
    case = Case(N=803, branches=((400, 2),), B=2, H=4, D=head_dim, dtype="bf16")
    inputs = make_inputs(case, "cuda")
    clean = run_kernels(case, inputs, RINGS[tiles])
    for name in ("q", "k", "v", "dout"):
        spoiled = getattr(inputs, name).clone()
        spoiled[:, 400:] = torch.nan
        spoiled[:, :400, 2] = torch.nan
        actual = run_kernels(case, inputs._replace(**{name: spoiled}), RINGS[tiles])
        for result, expected in zip(actual, clean, strict=True):
            per_head = result.transpose(1, 2) if result.dim() == 4 else result
            expected = expected.transpose(1, 2) if expected.dim() == 4 else expected
            kept = [0, 1, 3]
            assert torch.equal(per_head[:, kept, :400], expected[:, kept, :400]), name


HELD = (
    LaunchConfig(64, 128, num_warps=8, num_stages=1, loads="ring"),
    LaunchConfig(64, 128, num_warps=8, num_stages=2, loads="ring"),
    LaunchConfig(128, 128, num_warps=8, num_stages=1, loads="ring"),
    LaunchConfig(64, 64, num_warps=4, num_stages=2, maxnreg=168, loads="ring"),
    LaunchConfig(64, 64, num_warps=4, num_stages=3, loads="ring"),
)
HELD_CASES = {
    "plain": Case(N=2048, branches=((512, 4),), B=2, H=6, D=64, dtype="bf16"),
    "causal": Case(N=4096, branches=((256, 2),), B=2, H=8, D=64, causal=True, head_offset="blocked", dtype="fp16"),
    "wide": Case(N=1024, branches=((128, 1),), H=3, D=128, causal=True, dtype="bf16"),
    "more-than-ctas": Case(N=32768, branches=((128, 1),), B=3, H=5, D=64, head_offset="zero", dtype="bf16"),
    "merged": Case(N=2048, branches=((128, 1), (512, 4), (2048, 16)), B=2, D=64, dtype="bf16"),
}
"""Segments of 128 rows; those of 64 have half the length."""


@hopper
@pytest.mark.parametrize("config", HELD, ids=lambda config: config.name)
@pytest.mark.parametrize("case", HELD_CASES.values(), ids=HELD_CASES)
def test_all_gradients_in_ctas_that_stay(case: Case, config: LaunchConfig, record: Callable[..., None]) -> None:
    """A segment whose tiles lie where another's are still read, a part of dS that is summed up before it is there, a
    merge that counts one branch twice."""
    if config.block_n == 64:
        case = replace(case, branches=tuple((segment // 2, rate) for segment, rate in case.branches))
    if case.D == 128 and config.num_stages > 1 and config.block_n == 128:
        case = replace(case, D=64)
    chosen = {"bwd": config}
    assert "general_one_even_ring" in variants_run(case, make_inputs(case, "cuda"), chosen)
    _run(case, case.dtype, record, chosen)


@hopper
@pytest.mark.parametrize("length", [2048, 2001])
@pytest.mark.parametrize("tiles", [0, 3])
def test_ranges_of_whole_segments_in_a_ring(tiles: int, length: int, record: Callable[..., None]) -> None:
    """Rows of a range counted from the sequence's start; keys of segments that no query of it asks."""
    case = Case(N=length, branches=((512, 2),), D=64, causal=True, dtype="bf16")
    inputs = make_inputs(case, "cuda")
    actual = run_ranges(case, inputs, (0, 512, 1536, length), {"fwd": RINGS[tiles]["fwd"]})
    record(actual, oracle(case, inputs), "bf16", dout=inputs.dout)


@hopper
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("tiles", range(len(RINGS)))
def test_ranges_of_parts_of_segments_in_a_ring(tiles: int, causal: bool, record: Callable[..., None]) -> None:
    """Rows counted from the first that asks, not from the segment's; a tile of queries that begins before the range."""
    head_dim = (64, 128, 48, 96, 80)[tiles]
    branches = ((600, 1), (2000, 1)) if tiles % 2 else ((600, 1),)  # of one alone dQ computes delta too
    case = Case(N=1500, branches=branches, B=2, H=4, G=2, D=head_dim, causal=causal, dtype="bf16")
    inputs = make_inputs(case, "cuda")
    actual = run_ranges(case, inputs, (0, 100, 650, 1377, 1500), RINGS[tiles])
    record(actual, oracle(case, inputs), "bf16", dout=inputs.dout)


@hopper
def test_more_tiles_than_ctas_that_stay(record: Callable[..., None]) -> None:
    """A place of a ring, or a tile of queries, that is taken for the one of the tile before."""
    case = Case(N=8192, branches=((1024, 2),), B=2, H=10, D=128, causal=True, dtype="bf16")
    assert case.B * case.H * case.N // 2 // 128 > 3 * 132
    inputs = make_inputs(case, "cuda")
    record(run_kernels(case, inputs, RINGS[3]), oracle(case, inputs), "bf16", dout=inputs.dout)


def test_several_branches_whose_last_segment_is_cut(record: Callable[..., None]) -> None:
    """Tiles of a span behind the sequence's end, which are another batch element's, or nobody's memory."""
    case = Case(N=3072, branches=((1024, 1), (2048, 2)), B=2, H=2, D=64, dtype="bf16")
    _run(case, "bf16", record)
    assert "s1024_2048_d1_2_even" not in variants_run(case, make_inputs(case, "cuda"))


@hopper
def test_what_no_descriptor_can_be_made_of(record: Callable[..., None]) -> None:
    """Heads behind all steps and a gradient of stride 0: the text in Triton runs in the ring's place."""
    case = Case(N=1024, branches=((512, 2),), D=64, dtype="bf16")
    inputs = make_inputs(case, "cuda")
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    moved = inputs._replace(q=apart[0], k=apart[1], v=apart[2], dout=inputs.dout[:1, :1].expand(inputs.dout.shape))
    record(run_kernels(case, moved, RINGS[0]), oracle(case, moved), "bf16", dout=moved.dout)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim(head_dim: int, precision: str, record: Callable[..., None]) -> None:
    """A width that is wrong in one dtype: tiles, padding columns or shared memory differ."""
    _run(Case(N=333, branches=((100, 3),), B=2, H=4, G=2, D=head_dim, dtype=_dtype(precision)), precision, record)


@pytest.mark.parametrize("case", [as_dtype(case, fp64="fp32") for case in CASES], ids=lambda case: case.id)
def test_case_table(case: Case, record: Callable[..., None]) -> None:
    """Wrong rows, masks, offsets, merges or tails."""
    _run(case, case.dtype, record, dense=True)


@pytest.mark.parametrize("case", DETACHED, ids=lambda case: case.id)
def test_detached_mix(case: Case, record: Callable[..., None]) -> None:
    """A delta of the merged output where each branch's own is due."""
    inputs = make_inputs(case, "cuda")
    actual = run_kernels(case, inputs, mix_grad="detached")
    record(actual, oracle(case, inputs, mix_grad="detached"), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_torch_backend(case: Case, record: Callable[..., None]) -> None:
    """A kernel of torch's that is called otherwise on a GPU than on a CPU; float64 has no other backend here."""
    inputs = make_inputs(case, "cuda")
    actual = run_kernels(case, inputs, backend="torch")
    record(actual, oracle(case, inputs), case.dtype, dout=inputs.dout, dense=dense_formula(case, inputs))


@pytest.mark.parametrize("order", ["none", "random"])
def test_ranges_of_queries(order: str, record: Callable[..., None]) -> None:
    """A range that begins or ends inside a segment or a tile."""
    case = Case(N=333, branches=((100, 3), (999, 5)), H=4, G=2, D=64, causal=True, order=order, dtype="fp16")
    inputs = make_inputs(case, "cuda")
    actual = run_ranges(case, inputs, (0, 1, 150, 207, 333), LaunchConfig(32, 32, num_warps=4, num_stages=2))
    record(actual, oracle(case, inputs), "fp16", dout=inputs.dout)


def test_runs_repeat_bit_for_bit() -> None:
    """A race, or a sum in the order in which programs come, where the call asks for a deterministic backward."""
    case = Case(N=2048, branches=((512, 2), (1024, 4)), H=8, G=4, D=64, dtype="bf16")
    inputs = make_inputs(case, "cuda")
    with dap.options(deterministic=True):
        first = run_kernels(case, inputs)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(run_kernels(case, inputs), first, strict=True))


def test_captured_in_a_cuda_graph() -> None:
    """A launch that synchronises, or memory that a replay does not find again."""
    case = Case(N=300, branches=((128, 2),), H=4, D=64, order="hilbert", dtype="bf16")
    inputs = make_inputs(case, "cuda")
    q, k, v = (tensor.clone().requires_grad_() for tensor in inputs[:3])

    def step() -> tuple[torch.Tensor, ...]:
        out = dap.dilated_attention(q, k, v, 128, 2, order="hilbert", backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), inputs.dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.large
@pytest.mark.parametrize("order", [None, "snake"])
def test_more_than_2_to_the_31_elements(order: str | None, record: Callable[..., None]) -> None:
    """An offset of 32 bits: the last segment of tensors above 2^31 elements is right, forward and backward."""
    _check_the_last_segment(order, None, record)


@hopper
@pytest.mark.large
@pytest.mark.parametrize("segment", [1024, 1000], ids=["", "tails"])
def test_more_than_2_to_the_31_elements_in_a_ring(segment: int, record: Callable[..., None]) -> None:
    """The same through descriptors, whose rows count in 32 bits, and pointers of what is written."""
    _check_the_last_segment(None, RINGS[0], record, segment)


def _check_the_last_segment(order: str | None, config: Any, record: Callable[..., None], segment: int = 1024) -> None:
    tokens, heads, width = 2**20 + 2048, 32, 64
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, tokens, heads, width)
    assert torch.Size(shape).numel() > 2**31
    q, k, v, dout = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    arrange = dap.TokenOrder("snake", (tokens // 256, 256)) if order else None
    # Every odd row of 256 runs backwards, and a segment is four rows.
    given: dict[str, Any] = {"order": arrange, "return_lse": True, "backend": "triton"}
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    with dap.options(config=config):
        out, lse = dap.dilated_attention(*leaves, segment, 16, **given)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    last = slice((tokens - 1) // segment * segment, tokens)
    steps = None if arrange is None else dap.TokenOrder("snake", (segment // 256, 256)).indices(segment).cuda()
    small = [tensor[:, last].detach().double().requires_grad_() for tensor in (q, k, v)]
    wanted, wanted_lse = reference.dilated_attention(*small, [segment], [16], order=steps)
    grads = torch.autograd.grad((wanted * dout[:, last].double()).sum(), small)
    actual = Results(out[:, last], lse[:, :, last], dq[:, last], dk[:, last], dv[:, last])
    record(actual, Results(wanted.detach(), wanted_lse.detach(), *grads), "bf16", dout=dout[:, last])


def test_memcheck_is_clean() -> None:
    """An access outside an allocation that no result shows: compute-sanitizer on a small case of each kind of text."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.fail("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.memcheck"],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ran every kind" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout
