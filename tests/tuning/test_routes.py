"""What the tuner launches is what was compiled ahead of it, and what calls launch after it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch import generated
from dilated_attention_pytorch.config import OPS, LaunchConfig, Problem
from dilated_attention_pytorch.generated import names
from dilated_attention_pytorch.runtime import launch
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.plan import Plan
from dilated_attention_pytorch.tuning import routes, scenes, screen
from dilated_attention_pytorch.tuning.problems import launched
from dilated_attention_pytorch.tuning.space import Candidate

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

H100 = devices.simulated("h100")
KINDS = {
    "dilated": Problem("bf16", 1, 2048, 4, 4, 64, ((512, 4),)),
    "one-tile": Problem("bf16", 2, 512, 4, 4, 64, ((128, 2),), "all", "zero", "snake", row_width=32),
    "held": Problem("bf16", 1, 2048, 4, 4, 64, ((128, 4),)),
    "hilbert-mask": Problem("fp16", 1, 1000, 4, 2, 48, ((256, 2),), order="hilbert", mask=True, causal=True),
    "chain": Problem("bf16", 1, 4096, 4, 4, 64, ((1024, 1), (2048, 2))),
    "ring": Problem("bf16", 1, 4096, 4, 4, 128, ((1024, 4),)),
}
Prepared = tuple[Any, Mapping[str, Any], int]


class Caught:
    """In the place of what launches: keeps what it was handed."""

    def __init__(self) -> None:
        self.prepared: list[Prepared] = []

    def __call__(self, prepared: Prepared, config: LaunchConfig) -> launch.Launch:
        self.prepared.append(prepared)
        return launch.Launch(None, prepared[1], prepared[2])


SMALL = {"block_m": 32, "block_n": 32, "num_stages": 1}
RING = {"block_m": 64, "block_n": 64, "num_stages": 2, "loads": "ring"}
PRODUCER = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2, "loads": "producer"}
LAUNCHED = [
    (
        op,
        kind,
        LaunchConfig(**{**SMALL, **({"block_m": 128, "block_n": 64} if kind == "one-tile" else {})}, loads=loads),
    )
    for op, kind in [
        *((op, kind) for op in OPS for kind in KINDS if kind != "ring"),
        ("bwd", "one-tile"),
        ("bwd", "held"),
    ]
    for loads in ("pointer", "descriptor")
] + [
    *((op, "ring", LaunchConfig(**RING)) for op in OPS),  # type: ignore[arg-type]
    ("fwd", "ring", LaunchConfig(**PRODUCER)),  # type: ignore[arg-type]
]


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("op", "kind", "config"), LAUNCHED, ids=lambda value: getattr(value, "loads", None) or str(value)
)
def test_what_is_launched_was_compiled(
    op: str, kind: str, config: LaunchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measuring process compiled each dK/dV kernel once more, for an argument that it alone left out: 50 problems
    took 178 s, not 90."""
    problem = KINDS[kind]
    choice = launched(problem, op, config, names())
    found: dict[str, Any] = {}
    ahead: list[Prepared] = []
    monkeypatch.setattr(screen, "_compiled", lambda ready, config, arch: ahead.append(ready))
    plan = Plan(problem, H100, "triton", (replace(choice, op="fwd"), choice), (), "config")
    # A call of one branch may leave delta to this launch. The tuner takes it for one of several.
    for computes_delta in (False, op != "fwd" and launch._computes_delta(plan) is not None):
        screen.compile_offline(problem, choice, H100.arch, computes_delta=computes_delta)
    scene = scenes.asked(scenes.drawn(problem, H100, torch.device("cpu"), 0, exact=False), op, False, 0)

    by_tuner, by_call = Caught(), Caught()
    monkeypatch.setattr(routes, "run_kernel", by_tuner)
    outputs, _ = scenes.fresh(scene, 512)
    routes.kernel(scene, Candidate.of(config))(outputs)()
    found["tuner"] = by_tuner.prepared[-1]

    monkeypatch.setattr(launch, "run_kernel", by_call)
    sides = {"scale": scene.scale, "index": scene.index, "mask": scene.mask, "offsets": scene.offsets}
    if op == "fwd":
        launch.forward(Plan(problem, H100, "triton", (choice,), (), "config"), scene.q, scene.k, scene.v, **sides)  # type: ignore[arg-type]
    else:
        given = scene.q, scene.k, scene.v, scene.out, scene.lse, scene.dout, None
        launch.backward(plan, *given, **sides)  # type: ignore[arg-type]
    found["call"] = by_call.prepared[-1]

    for who, ready in zip(("tuner", "call"), ahead, strict=True):
        assert found[who][0] is ready[0], who
        assert screen._specialised(*found[who][:2]) == screen._specialised(*ready[:2]), who


@pytest.mark.parametrize("first", ["fwd", "fwd_producer"])
def test_keys_of_kernels_do_not_depend_on_who_was_first(first: str) -> None:
    """A kernel that a compiling process left on disk, compiled again by the measuring one, which ran another first."""
    script = f"""
from dilated_attention_pytorch import generated
text = generated.load("s2048_d1_even_ring")
text.{first}.cache_key
print(text.fwd_producer.cache_key)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == generated.load("s2048_d1_even_ring").fwd_producer.cache_key


def test_offsets_are_not_a_reason_to_compile_again() -> None:
    """Whole problems and those that are checked differ in numbers alone."""
    whole = KINDS["dilated"]
    small = scenes.small(whole)
    assert small != whole
    config = LaunchConfig(32, 32, num_stages=1)
    found = []
    for problem in (whole, small):
        choice = launched(problem, "dkdv", config, names())
        values = launch.branch_values(problem, choice, HeadOffsets((), None), screen._shared(problem, "none", "sm_90"))
        found.append(screen._specialised(*launch.prepared(choice, values)[:2]))
    assert found[0] == found[1]
