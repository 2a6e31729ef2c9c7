"""Texts in Gluon: which calls run them, on which GPUs and versions of Triton, and what runs in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import LaunchConfig, Problem
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import Toolchain
from dilated_attention_pytorch.errors import ConfigError
from dilated_attention_pytorch.runtime import launch
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Choice, Plan, plan
from dilated_attention_pytorch.tuning import screen
from dilated_attention_pytorch.variant import Variant

from ..cases import make_inputs
from ..gpu.memcheck import KINDS, kind
from ..kernels import variants_run
from ..measurements import TOOLCHAIN, database_at, entry

EVEN = Problem("bf16", 1, 8192, 8, 8, 64, ((2048, 2),))
WIDE = replace(EVEN, head_dim=128)
RING = LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring")
PRODUCER = LaunchConfig(128, 128, num_warps=8, num_stages=2, loads="producer")
TEXT = {"0123456789ab": ("general_even_ring",)}


def untuned(tmp_path: Path, problem: Problem, gpu: str = "h100", triton: str = "3.6.0") -> list[Choice]:
    """The launches of a call that nobody has measured."""
    return list(
        plan(problem, device.simulated(gpu), toolchain=Toolchain(triton), committed=Database(tmp_path)).launches
    )


@pytest.mark.parametrize(
    ("head_dim", "causal", "loads"), [(64, False, "ring"), (128, False, "producer"), (128, True, "ring")]
)
def test_hopper_runs_them_untuned(tmp_path: Path, head_dim: int, causal: bool, loads: str) -> None:
    """The slower texts in Triton, where nobody has measured; CTAs that stay and wait for one of them."""
    found = untuned(tmp_path, replace(EVEN, head_dim=head_dim, causal=causal))
    assert {choice.variant.name for choice in found} == {"s2048_d2_even_ring"}
    assert [choice.config.loads for choice in found] == [loads, "ring", "ring"]


@pytest.mark.parametrize(
    "change",
    [
        {"mask": True},
        {"dropout": True},
        {"queries": "all"},
        {"order": "hilbert", "length": 8000},
        {"order": "snake", "row_width": 100, "head_dim": 48},
        {"head_offset": "table"},
        {"head_dim": 72},
        {"dtype": "fp32"},
        {"query_range": (100, 8192)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_they_do_not_know_runs_in_triton(tmp_path: Path, change: dict[str, object]) -> None:
    """A mask that is not asked, a tail that is read as keys, a group's heads that keep other steps."""
    found = untuned(tmp_path, replace(EVEN, **change))  # type: ignore[arg-type]
    assert not any(choice.variant.ring or choice.config.loads in ("ring", "producer") for choice in found)


@pytest.mark.parametrize("order", ["hilbert", "snake"])
@pytest.mark.parametrize("branches", [((2048, 1),), ((2048, 2),), ((8192, 4),)], ids=str)
def test_they_follow_orders(tmp_path: Path, order: str, branches: tuple[tuple[int, int], ...]) -> None:
    """Half the speed along a curve; a producer that knows none, or one launch that gives all gradients."""
    along = replace(EVEN, order=order, row_width=100 if order == "snake" else 0, branches=branches)
    for head_dim in (64, 128):
        found = untuned(tmp_path, replace(along, head_dim=head_dim))
        assert all(choice.variant.ring and choice.variant.order == "hilbert" for choice in found)
        assert {choice.config.loads for choice in found} == {"ring"}
    assert {choice.op for choice in untuned(tmp_path, replace(along, branches=((256, 2),)))} == {"fwd", "dkdv", "dq"}


@pytest.mark.parametrize(
    ("change", "tiles"),
    [
        ({"head_dim": 48, "branches": ((128, 1),)}, (128, 64)),  # tails of columns alone look nothing up
        ({"mask": True, "length": 8101}, (64, 32)),
        ({"order": "snake", "row_width": 100, "length": 8101}, (64, 32)),
        ({"order": "hilbert", "queries": "all", "branches": ((128, 2),)}, (128, 64)),  # 64 keys: not timed otherwise
    ],
    ids=str,
)
def test_what_looks_up_or_masks_rows_takes_small_tiles(
    tmp_path: Path, change: dict[str, object], tiles: tuple[int, int]
) -> None:
    """Tiles that are 1.17 times as slow as the best where rows are masked; or small ones where none are."""
    forward = next(choice for choice in untuned(tmp_path, replace(EVEN, **change)) if choice.op == "fwd")
    assert (forward.config.loads, forward.config.block_m, forward.config.block_n) == ("pointer", *tiles)


def test_rows_that_cannot_be_copied_are_read_by_pointers() -> None:
    """A copy that the hardware refuses, in the middle of a training; rows too far from the first for 32 bits."""
    along = replace(EVEN, order="hilbert")
    k, v, out = (torch.empty(1, 8192, 8, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    variant = Variant.from_name("general_hilbert_even_ring")
    choice = Choice.of("fwd", (0,), variant, RING, "test", "")
    for heads, width, loads in ((8, 64, True), (8, 66, False), (30000, 64, True), (33000, 64, False)):
        x = torch.empty(1, 8192, heads, width, dtype=torch.bfloat16, device="meta")[:, :, :8, :64]
        index = torch.empty(8192, dtype=torch.int32, device="meta")
        shared = launch.shared_values(along, "sm_90", 0.125, index, None, None, q=x, k=k, v=v)
        lse = torch.empty(1, 8, 8192, device="meta")
        values = launch.branch_values(along, choice, HeadOffsets(()), {**shared, "p_out": out, "p_lse": lse})
        given = launch.prepared(choice, values)[1]
        assert ("STAGES" in given) is loads


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"length": 8101}, "general_ring"),
        ({"branches": ((8192, 1),), "query_range": (100, 5000)}, "full_ring"),
        ({"branches": ((2050, 2),)}, "general_ring"),
        ({"branches": ((2049, 2),)}, "general_ring"),
        ({"head_dim": 48}, "general_ring"),
        ({"head_dim": 112, "kv_heads": 2}, "general_ring"),
        ({"length": 1000}, "full_ring"),
    ],
    ids=str,
)
def test_tails_of_rows_and_columns_are_known(tmp_path: Path, change: dict[str, object], text: str) -> None:
    """Half the speed for every length and head_dim that is no power of two."""
    found = untuned(tmp_path, replace(EVEN, **change))  # type: ignore[arg-type]
    assert {choice.variant.name for choice in found} == {text}


@pytest.mark.parametrize(
    "change", [{"branches": ((2048, 1),), "kv_heads": 2}, {"kv_heads": 2}, {"causal": True}], ids=str
)
def test_groups_of_heads_and_causality_are_known(tmp_path: Path, change: dict[str, object]) -> None:
    """A refusal that is wider than its reason."""
    assert all(choice.variant.ring for choice in untuned(tmp_path, replace(EVEN, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "head_dim"), [(128, 64), (128, 128)])
def test_a_tile_that_is_a_segment_gives_all_gradients(tmp_path: Path, rows: int, head_dim: int) -> None:
    """Two launches that each compute the scores, where one holds all that they need."""
    problem = replace(EVEN, branches=((2 * rows, 2),), head_dim=head_dim)
    *_, last = untuned(tmp_path, problem)
    assert (last.op, last.variant.name, last.config.block_n) == ("bwd", "general_one_even_ring", rows)


@pytest.mark.parametrize(
    "change",
    [
        {"branches": ((512, 2),)},
        {"branches": ((192, 2),)},
        {"branches": ((128, 2),)},
        {"kv_heads": 2},
        {"length": 8190},
        {"mask": True},
        {"dropout": True},
        {"head_offset": "table"},
        {"queries": "all"},
    ],
    ids=str,
)
def test_other_segments_have_their_gradients_in_two(tmp_path: Path, change: dict[str, object]) -> None:
    """Keys that the tile does not hold, or that more heads ask than the launch knows of."""
    found = untuned(tmp_path, replace(EVEN, **({"branches": ((256, 2),)} | change)))  # type: ignore[arg-type]
    assert [choice.op for choice in found] == ["fwd", "dkdv", "dq"]


@pytest.mark.parametrize(("gpu", "triton"), [("a100", "3.6.0"), ("b200", "3.6.0"), ("h100", "3.10.0"), ("h100", "4.0")])
def test_other_gpus_and_versions_run_triton(tmp_path: Path, gpu: str, triton: str) -> None:
    """A text for Hopper's tensor cores elsewhere; an experimental language that has changed since."""
    assert not any(choice.variant.ring for choice in untuned(tmp_path, EVEN, gpu, triton))


def test_a_version_that_is_not_read_is_told(tmp_path: Path) -> None:
    """Half the speed after an upgrade, and `explain` that does not say why."""
    found = untuned(tmp_path, EVEN, triton="3.10.0")[0]
    assert "Triton 3.10.0 has not compiled the texts in Gluon yet: 3.6 and 3.9 have" in dict(found.passed)["heuristic"]


@pytest.mark.parametrize(
    ("op", "config", "reason"),
    [
        ("fwd", replace(RING, block_m=32), "a warpgroup of a ring takes 64 rows"),
        ("fwd", replace(RING, num_warps=8), "a warpgroup of a ring takes 64 rows"),
        ("dq", replace(RING, num_stages=1), "its ring has two places at least"),
        ("bwd", RING, "a ring gives all gradients of segments of 64 or 128 rows"),
        ("dkdv", PRODUCER, "a producer loads for two warpgroups of a forward"),
        ("fwd", replace(PRODUCER, block_m=64, num_warps=4), "a producer loads for two warpgroups of a forward"),
    ],
)
def test_tiles_that_cannot_run_are_refused(tmp_path: Path, op: str, config: LaunchConfig, reason: str) -> None:
    """A kernel that waits for ever for a tile that nobody sends."""
    asked = Options(config=((op, config),))
    with pytest.raises(ConfigError, match=reason):
        plan(EVEN, device.simulated("h100"), options=asked, toolchain=TOOLCHAIN, committed=Database(tmp_path))


@pytest.mark.parametrize(
    ("rows", "causal", "rung"),
    [
        (1024, False, "nearest"),
        (512, False, "nearest"),
        (256, False, "heuristic"),
        (2048, True, "nearest"),
        (1024, True, "heuristic"),
    ],
)
def test_ctas_that_stay_are_not_taken_over_by_small_segments(
    tmp_path: Path, rows: int, causal: bool, rung: str
) -> None:
    """A pick of 512 rows at 256, where it takes a quarter longer than the untuned default."""
    wide = replace(WIDE, batch=8, length=16384, causal=causal)
    measured = replace(wide, branches=((4096 if causal else 2048, 2),))
    database_at(tmp_path, {"h100": [entry(problem=measured, config=PRODUCER)]})
    asked = replace(wide, batch=32 if causal else 2, branches=((2 * rows, 2),))
    found = plan(asked, device.simulated("h100"), toolchain=TOOLCHAIN, committed=Database(tmp_path, lambda: TEXT))
    assert found.launches[0].rung == rung
    assert ("are too few for CTAs that stay" in dict(found.launches[0].passed).get("nearest", "")) == (
        rung == "heuristic"
    )


def test_a_measured_ring_speaks_for_tails_as_far_as_they_are_known(tmp_path: Path) -> None:
    """The same key, and a tail: where the ring has no text for it the next rung has to answer."""
    database_at(tmp_path, {"h100": [entry(problem=EVEN, config=RING)]})
    known = replace(EVEN, length=8191)
    found = plan(known, device.simulated("h100"), toolchain=TOOLCHAIN, committed=Database(tmp_path, lambda: TEXT))
    assert (found.launches[0].rung, found.launches[0].variant.name) == ("exact", "general_ring")
    ragged = replace(EVEN, length=8191, query_range=(0, 5000))
    found = plan(ragged, device.simulated("h100"), toolchain=TOOLCHAIN, committed=Database(tmp_path, lambda: TEXT))
    assert (found.launches[0].rung, found.launches[0].variant.ring) == ("heuristic", False)
    assert "no part of a segment" in dict(found.launches[0].passed)["exact"]


def prepared(config: LaunchConfig, **moved: torch.Tensor) -> tuple[object, dict[str, object], int]:
    """What a forward would launch, with tensors that have no memory."""
    [choice] = plan(WIDE, device.simulated("h100"), options=Options(config=(("fwd", config),)), toolchain=TOOLCHAIN).fwd
    values = {**screen._shared(WIDE, "none", "sm_90"), **moved}
    return launch.prepared(choice, launch.branch_values(WIDE, choice, HeadOffsets((), None), values))


@pytest.mark.parametrize("config", [RING, PRODUCER], ids=lambda config: config.loads)
def test_what_no_descriptor_can_be_made_of_runs_by_pointers(config: LaunchConfig) -> None:
    """Heads behind all steps: a ring without descriptors would have nothing to load."""
    kernel, _, _ = prepared(config)
    assert kernel.__module__.endswith("_ring")  # type: ignore[attr-defined]
    apart = torch.empty((1, 8, 8192, 128), dtype=torch.bfloat16, device="meta").transpose(1, 2)
    kernel, arguments, programs = prepared(config, p_q=apart)
    assert not kernel.__module__.endswith("_ring")  # type: ignore[attr-defined]
    assert arguments["TMA"] is False and arguments["p_q"] is apart
    assert programs == 8 * 8192 // 2 // config.block_m


@pytest.mark.parametrize(("length", "rate", "head_dim"), [(8192, 2, 128), (8191, 2, 64), (8190, 4, 48), (1001, 16, 80)])
@pytest.mark.parametrize("part", [0, 2], ids=["first", "last"])
def test_no_descriptor_reaches_behind_its_tensor(length: int, rate: int, head_dim: int, part: int) -> None:
    """A part of a fused projection: behind its last head lies another part, or memory of nobody."""
    fused = torch.empty((2, length, 3, 8, head_dim), dtype=torch.bfloat16, device="meta")
    x = fused[:, :, part]
    for last in (False, True):
        told = launch._descriptor_of_ring(x, rate, 64, 128, last=last)
        rows, columns = told.shape
        assert x.storage_offset() + (rows - 1) * told.strides[0] + columns <= fused.numel()
        tail = 2 * length % rate if last else 0
        assert rows == 2 * length // rate + (tail > 0)
        assert columns == ((tail or rate) - 1) * x.stride(1) + 8 * head_dim


def test_a_plan_of_rings_is_explained() -> None:
    """A configuration whose name does not tell which text runs it."""
    found: Plan = plan(
        WIDE, device.simulated("h100"), options=Options(config=(("fwd", PRODUCER),)), toolchain=TOOLCHAIN
    )
    assert "128x128_w8_s2_producer" in found.explain() and "_even_ring" in found.explain()


@pytest.mark.parametrize("name", KINDS)
def test_memcheck_comes_to_every_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that another text took over: of it, nothing would be checked any more, or the check would break off."""
    case, tiles = kind(name)
    monkeypatch.setattr(device, "current", lambda where: device.simulated("h100"))
    assert name in variants_run(case, make_inputs(case), tiles)
