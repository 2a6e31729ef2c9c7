"""cuDNN in the place of our kernels: when a plan hands it an operation, and that it gets the right rows back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import device, reference
from dilated_attention_pytorch.config import LaunchConfig, Problem
from dilated_attention_pytorch.database import Entry
from dilated_attention_pytorch.runtime import launch, library
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Plan, plan
from dilated_attention_pytorch.runtime.refusals import cudnn_takes

from ..measurements import TOOLCHAIN, database_at, entry

H100 = device.simulated("h100")
LOCAL = Problem("bf16", 4, 8192, 4, 4, 64, ((512, 1),))


def timed(op: str, us: float, cudnn: float | None, problem: Problem = LOCAL) -> Entry:
    measured = entry(op, problem, median=us)
    return replace(measured, time_us=replace(measured.time_us, cudnn=cudnn))


def planned(folder: Path, *entries: Entry, root: str = "db", problem: Problem = LOCAL, **how: Any) -> Plan:
    return plan(problem, H100, toolchain=TOOLCHAIN, committed=database_at(folder / root, {"h100": [*entries]}), **how)


FASTER = timed("fwd", 1000.0, 900.0), timed("dkdv", 2000.0, 2500.0), timed("dq", 1000.0, None)


@pytest.mark.parametrize(
    ("fwd", "backward", "external"),
    [
        (900.0, 2500.0, ["fwd", "bwd"]),
        (900.0, 3500.0, ["fwd"]),
        (980.0, 2500.0, ["bwd"]),
        (980.0, 3500.0, []),
        (190.0, 195.0, []),
        (None, None, []),
    ],
)
def test_who_was_faster_takes_it(
    tmp_path: Path, fwd: float | None, backward: float | None, external: list[str]
) -> None:
    """A user who is slower than what they would have written; or a hair that decides, of times not taken in turn; or a
    GPU that waits for a host which takes longer to queue cuDNN's kernel than it saves."""
    entries = timed("fwd", 1000.0, fwd), timed("dkdv", 2000.0, backward), timed("dq", 1000.0, None)
    found = planned(tmp_path, *entries)
    assert [op for op, _ in found.external] == external
    assert found.backend == ("cudnn" if external else "triton") and len(found.launches) == 3
    assert ("forward by cuDNN on views of the segments: 900 us beside 1000 us of ours" in found.explain()) == (
        fwd == 900.0
    )
    assert "backward by" not in found.explain(backward=False)


def test_nobody_guesses_and_nobody_is_overruled(tmp_path: Path) -> None:
    """A part that nobody timed taken for nothing, or another problem's; kernels that the caller asked for, not run."""
    assert planned(tmp_path, *FASTER).backend == "cudnn"
    assert [op for op, _ in planned(tmp_path, *FASTER[:2], root="half").external] == ["fwd"]
    assert planned(tmp_path, *FASTER, backend="triton").backend == "triton"
    tiles = Options(config=(("fwd", LaunchConfig(64, 64)),))
    assert not planned(tmp_path, *FASTER, options=tiles).hands_over("fwd")
    assert not planned(tmp_path, *FASTER, problem=replace(LOCAL, deterministic=True)).hands_over("bwd")
    assert [op for op, _ in planned(tmp_path, *FASTER, backward=False).external] == ["fwd"]
    near = replace(LOCAL, branches=((1024, 1),))
    assert {choice.rung for choice in planned(tmp_path, *FASTER, problem=near).launches} == {"nearest"}
    assert planned(tmp_path, *FASTER, problem=near).external == ()


@pytest.mark.parametrize(
    "change",
    [
        {"branches": ((512, 2),)},
        {"branches": ((512, 1), (2048, 4))},
        {"branches": ((500, 1),)},
        {"mask": True},
        {"dropout": True},
        {"kv_heads": 2},
        {"dtype": "fp32"},
        {"head_dim": 160},
        {"head_dim": 12},
        {"query_range": (0, 512)},
        {"head_offset": "table"},
        {"order": "hilbert"},
    ],
    ids=str,
)
def test_what_it_does_not_compute(change: dict[str, Any]) -> None:
    """Plain attention in the place of something else."""
    assert cudnn_takes(LOCAL, H100)
    assert not cudnn_takes(replace(LOCAL, **change), H100)
    assert not cudnn_takes(LOCAL, device.simulated("t4")) and not cudnn_takes(LOCAL, device.simulated("mi300x"))


# ---- What it computes ------------------------------------------------------------------------------------------------


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What cuDNN computes, of (segments, H, n, D), with lse's last axis of one."""
    scores = _scores(q, k, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True).float()


def exact_backward(
    dout: Tensor, saved: tuple[Tensor, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Likewise, from the out and lse that it is handed and from nothing else of the forward."""
    q, k, v, out, lse = saved
    p = (_scores(q, k, causal, scale) - lse.double().unsqueeze(-1)).exp()
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf) if causal else scores


@pytest.mark.parametrize("segment", [24, 96])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_go_there_and_back(segment: int, causal: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one batch element for those of another, lse of another head, gradients that are no tensors' own."""
    monkeypatch.setattr(library, "attend", exact)
    monkeypatch.setattr(library, "attend_backward", exact_backward)
    problem = Problem("fp64", 2, 96, 3, 3, 8, ((segment, 1),), causal=causal)
    whole = torch.randn(2, 96, 3, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(segment))
    q, k, v = (x.clone() if not packed else x for x in whole.unbind(2))
    dout = torch.ones((), dtype=torch.float64).expand(q.shape) if packed else torch.randn_like(q)
    found = Plan(problem, H100, "cudnn", (), (), "exact", external=(("fwd", ""), ("bwd", "")))
    sides = {"scale": 0.3, "index": None, "mask": None, "offsets": HeadOffsets(((0, 0, 0),))}
    out, lse = library.forward(found, q, k, v, **sides)  # type: ignore[arg-type]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = reference.dilated_attention(*leaves, [segment], [1], is_causal=causal, scale=0.3)
    assert out.is_contiguous() and torch.allclose(out, wanted) and torch.allclose(lse.double(), wanted_lse, atol=1e-5)
    gradients = library.backward(found, q, k, v, out, lse, dout, None, **sides)  # type: ignore[arg-type]
    for gradient, expected in zip(gradients, torch.autograd.grad(wanted, leaves, dout), strict=True):
        assert gradient.is_contiguous() and torch.allclose(gradient, expected, atol=1e-5)


def test_what_it_is_not_handed_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of lse that is lost; a forward of ours that cuDNN runs because it takes the backward."""
    launched: list[str] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, lambda *given, name=name, **sides: launched.append(name))
    monkeypatch.setattr(library, "attend", exact)
    x = torch.zeros(1, 64, 1, 8)
    sides = {"scale": 1.0, "index": None, "mask": None, "offsets": HeadOffsets(((0,),))}
    problem = Problem("fp32", 1, 64, 1, 1, 8, ((64, 1),))
    both, second = (
        Plan(problem, H100, "cudnn", (), (), "exact", external=external)
        for external in ((("fwd", ""), ("bwd", "")), (("bwd", ""),))
    )
    library.backward(both, x, x, x, x, torch.zeros(1, 1, 64), x, torch.zeros(1, 1, 64), **sides)  # type: ignore[arg-type]
    library.forward(second, x, x, x, **sides)  # type: ignore[arg-type]
    assert launched == ["backward", "forward"]
