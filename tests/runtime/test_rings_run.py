"""The texts in Gluon against the oracle, on a CPU: `tests/gluon.py` stands in for the GPU's side of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import device, generated
from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.device import Toolchain
from dilated_attention_pytorch.errors import ConfigError
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.runtime import launch
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Plan, plan
from dilated_attention_pytorch.variant import Variant

from .. import gluon, kernels
from ..cases import Case, Inputs, make_inputs, oracle
from ..kernels import ALONG_ORDERS, CHAIN_RINGS, CHAINS, ORDER_RINGS, RINGS, poisoned_outputs
from ..tolerances import Results, check_results

pytest.importorskip("triton", reason="its descriptors say where rows lie")

Tiles = Mapping[str, LaunchConfig]
CASES = {
    "merged": Case(N=512, branches=((256, 1), (512, 2)), H=2, D=64, dtype="bf16"),
    "grouped-causal": Case(N=512, branches=((256, 1),), H=4, G=2, D=128, causal=True, dtype="fp16"),
    "grouped-offsets": Case(N=512, branches=((512, 2),), B=2, G=2, D=64, head_offset="blocked", dtype="bf16"),
    "tail": Case(N=450, branches=((300, 1),), B=2, H=2, G=1, D=64, dtype="bf16"),
    "short-head": Case(N=615, branches=((305, 4),), H=4, D=96, causal=True, dtype="bf16"),
    "last-row": Case(N=811, branches=((402, 3),), B=2, H=3, D=80, head_offset="zero", dtype="bf16"),
    "merged-tails": Case(N=613, branches=((256, 1), (406, 2), (900, 4)), D=48, head_offset="blocked", dtype="fp16"),
    "phantoms": Case(N=613, branches=((256, 1), (406, 2), (900, 4)), D=48, padding="zeros", dtype="fp16"),
}


class _Delta:
    """rowsum(dout ⊙ out) − dlse, which is Triton's."""

    arg_names = ("p_out", "p_dout", "p_dlse", "p_delta")

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor, **_: object) -> None:
            found = (out.float() * dout.float()).sum(3).transpose(1, 2)
            delta.copy_(found if dlse is None else found - dlse)

        return run


def _load(name: str) -> Any:
    return SimpleNamespace(delta=_Delta()) if name == "delta" else gluon.load(name)


def planned(case: Case, tiles: Tiles) -> Plan:
    problem = case.problem
    if case.order == "snake":
        problem = replace(problem, order="snake", row_width=TokenOrder("snake").row_width(case.N) or 0)
    return plan(
        problem,
        device.simulated("h100"),
        "triton",
        Options((*tiles.items(),)),
        toolchain=Toolchain("3.6.0"),
    )


def run(case: Case, inputs: Inputs, tiles: Tiles) -> tuple[Results, set[str]]:
    """Forward and backward of a case in Gluon, and the texts that ran."""
    chosen = planned(case, tiles)
    given: dict[str, Any] = {"scale": case.D**-0.5, "mask": None, "offsets": HeadOffsets(case.offsets)}
    given["index"] = None if inputs.order is None else inputs.order.int()
    with mock.patch.object(generated, "load", _load), poisoned_outputs():
        out, lse = launch.forward(chosen, *inputs[:3], **given)
        gradients = launch.backward(chosen, *inputs[:3], out, lse, inputs.dout, inputs.dlse, **given)
    return Results(out, lse, *gradients), {choice.variant.name for choice in chosen.launches}


@pytest.mark.parametrize("tiles", range(len(RINGS)))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_ring_computes_attention(case: Case, tiles: int) -> None:
    """A wrong row, column, tail or diagonal; a tile that nobody sends, or that is overwritten; a lost merge."""
    inputs = make_inputs(case, "cpu")
    actual, texts = run(case, inputs, RINGS[tiles])
    assert all(name.endswith("_ring") for name in texts)
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("tiles", range(len(RINGS)))
def test_a_part_of_a_segment_asks(tiles: int, causal: bool) -> None:
    """Rows counted from the segment's first, not from the first that asks; another batch element's before them."""
    # Of one branch alone dQ computes delta too.
    branches = ((300, 1), (900, 1)) if tiles % 2 else ((300, 1),)
    case = Case(N=700, branches=branches, B=2, H=2, G=1, D=64, causal=causal, dtype="bf16")
    inputs, gpu = make_inputs(case, "cpu"), device.simulated("h100")
    with mock.patch.object(generated, "load", _load), mock.patch.object(kernels, "current", lambda where: gpu):
        actual = kernels.run_ranges(case, inputs, (0, 100, 350, 677, 700), RINGS[tiles])
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize(("case", "tiles"), list(zip(CHAINS.values(), (1, 2, 0, 4), strict=True)), ids=CHAINS)
def test_a_ring_computes_several_branches(case: Case, tiles: int) -> None:
    """A tile of another class, level or count; what is looked up ahead taken for what is at hand."""
    inputs = make_inputs(case, "cpu")
    actual, texts = run(case, inputs, CHAIN_RINGS[tiles])
    assert len(texts) == 1
    assert Variant.from_name(texts.pop()).wider
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("branches", [((128, 1), (256, 2)), ((256, 2),)], ids=["merged", "alone"])
@pytest.mark.parametrize("places", [1, 2])
def test_all_gradients_come_from_one_launch(places: int, branches: tuple[tuple[int, int], ...]) -> None:
    """A segment whose tiles take the places of another's too early, or dS that is summed up before it is there.

    Of one branch alone: a delta of another segment's outputs.
    """
    case = Case(N=1024, branches=branches, H=2, D=64, causal=True, dtype="bf16")
    inputs = make_inputs(case, "cpu")
    tiles = {"fwd": RINGS[0]["fwd"], "bwd": LaunchConfig(64, 128, num_warps=8, num_stages=places, loads="ring")}
    actual, texts = run(case, inputs, tiles)
    assert "general_one_even_ring" in texts
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("tiles", range(len(ORDER_RINGS)))
@pytest.mark.parametrize("case", ALONG_ORDERS.values(), ids=ALONG_ORDERS)
def test_a_ring_follows_an_order(case: Case, tiles: int) -> None:
    """Rows of other tokens, looked up a turn too early or late; a group of copies that is waited for too late."""
    inputs = make_inputs(case, "cpu")
    actual, texts = run(case, inputs, ORDER_RINGS[tiles])
    assert all(name.endswith("_ring") for name in texts)
    assert any("hilbert" in name for name in texts)
    check_results(actual, oracle(case, inputs), case.dtype, dout=inputs.dout)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, Tiles]:
    """A call that rings may compute, with the tiles of some: whole segments as often as tails."""
    groups = draw(st.sampled_from((1, 2)))
    rate = st.sampled_from((1, 2, 3, 4, 6))
    segment = st.integers(64, 900) | st.sampled_from((128, 256, 384, 512, 768))
    case = Case(
        N=draw(st.integers(64, 900) | st.sampled_from((512, 768, 1024))),
        branches=tuple(draw(st.lists(st.tuples(segment, rate), min_size=1, max_size=3))),
        B=draw(st.sampled_from((1, 2))),
        H=groups * draw(st.sampled_from((1, 2, 3))),
        G=groups,
        D=draw(st.sampled_from((64, 128, 48, 96))),
        head_offset=draw(st.sampled_from(("cyclic", "blocked", "zero"))),
        causal=draw(st.booleans()),
        padding=draw(st.sampled_from(("none", "none", "zeros"))),
        order=draw(st.sampled_from(("none", "none", "none", "random", "snake"))),
        dtype=draw(st.sampled_from(("bf16", "fp16"))),
    )
    tiles = dict(draw(st.sampled_from(RINGS + CHAIN_RINGS)))
    if draw(st.booleans()):
        tiles["bwd"] = LaunchConfig(64, 128, num_warps=8, num_stages=draw(st.sampled_from((1, 2))), loads="ring")
    return case, tiles


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_drawn_calls(call: tuple[Case, Tiles]) -> None:
    """What nobody thought of."""
    case, tiles = call
    try:
        assume(all(choice.variant.ring for choice in planned(case, tiles).launches))
    except ConfigError:  # tiles that no text takes for this call
        assume(False)
    inputs = make_inputs(case, "cpu")
    check_results(run(case, inputs, tiles)[0], oracle(case, inputs), case.dtype, dout=inputs.dout)


def test_the_stand_in_finds_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in under which nothing fails: a tile never sent, or taken for another; a row read before it is there."""
    case = CASES["tail"]
    inputs = make_inputs(case, "cpu")
    text = gluon.load("general_ring")
    copy = text._copy

    def forgetful(*given: Any) -> None:
        copy(*given[:-2], given[-2] and given[-3] != 1, given[-1])

    monkeypatch.setattr(text, "_copy", forgetful)
    with pytest.raises(AssertionError, match="nobody sends"):
        run(case, inputs, RINGS[0])
    monkeypatch.setattr(text, "_copy", lambda *given: copy(*given[:-5], given[-5] + 1, *given[-4:]))
    with pytest.raises(AssertionError, match="error norm"):
        check_results(run(case, inputs, RINGS[0])[0], oracle(case, inputs), case.dtype, dout=inputs.dout)
    monkeypatch.setattr(text, "_copy", copy)
    wait = text.async_copy.wait_group
    monkeypatch.setattr(text.async_copy, "wait_group", lambda pending: wait(pending + (pending > 0)))
    with pytest.raises(AssertionError, match="NaN or inf"):
        check_results(run(case, inputs, RINGS[0])[0], oracle(case, inputs), case.dtype, dout=inputs.dout)
    assert torch.isfinite(inputs.q).all()
