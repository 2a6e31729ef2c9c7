"""The ways to run a task, each from a scene to a function that launches it: our kernels, and what they must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import generated
from ..config import Problem
from ..device import Device
from ..runtime import torch_backend
from ..runtime.arguments import HeadOffsets
from ..runtime.dropout import Dropout
from ..runtime.launch import branch_values, compile_options, prepared, shared_values
from ..runtime.plan import Plan
from .problems import planned
from .space import CUDNN, KERNEL, TORCH, Candidate

Outputs = dict[str, Tensor]


@dataclass
class Scene:
    """The tensors of one task, and what must come out.

    Attributes:
        problem: A call of one branch.
        op: "fwd", "dkdv" or "dq".
        merge: Outputs hold what an earlier branch wrote.
        device: What it runs on.
        q: (B, N, H, D); k and v (B, N, G, D), dout like q.
        k: See there.
        v: See there.
        dout: See there.
        index: Steps -> tokens, int32 (N,), or None.
        mask: (B, N) bool, or None.
        offsets: First kept steps.
        dropout: What drops probabilities, or None.
        out: Of the forward, like q: what a backward reads, with
        lse: float32 (B, H, N) and
        delta: rowsum(dout ⊙ out), float32 (B, H, N).
        before: What the outputs hold before a launch, by name; NaN where there is none.
        expected: What they must hold after it.
    """

    problem: Problem
    op: str
    merge: bool
    device: Device
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    index: Tensor | None
    mask: Tensor | None
    offsets: HeadOffsets
    dropout: Dropout | None
    out: Tensor
    lse: Tensor
    delta: Tensor
    before: Outputs
    expected: Outputs

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1.0 / math.sqrt(self.problem.head_dim)


Launch = Callable[[], Outputs | None]
"""Runs once; gives its results where it allocated them itself."""
Launcher = Callable[[Outputs], Launch]
"""Takes outputs; what it returns launches into them as often as it is called."""
Route = Callable[[Scene, Candidate], Launcher]


def kernel(scene: Scene, candidate: Candidate) -> Launcher:
    """One of our kernels."""
    branch = planned(scene.problem, candidate.config, scene.device, generated.names()).branches[0]
    choice = getattr(branch, scene.op)
    strided = {"q": scene.q, "k": scene.k, "v": scene.v}
    if scene.op != "fwd":
        strided["dout"] = scene.dout
    shared = shared_values(
        scene.problem, scene.device.arch, scene.scale, scene.index, scene.mask, scene.dropout, **strided
    )
    shared.update(p_lse=scene.lse, p_delta=scene.delta, p_dq=None, p_dk=None, p_dv=None, p_out=None, dout_d=1)

    def launcher(outputs: Outputs) -> Launch:
        given = {**shared, **{f"p_{name}": tensor for name, tensor in outputs.items()}}
        values = branch_values(scene.problem, branch, int(scene.merge), scene.offsets, given)
        function, arguments, programs = prepared(choice, values)
        options = compile_options(choice.config)

        def launch() -> None:
            function[(programs,)](*arguments.values(), **options)  # on a GPU it returns the compiled kernel

        return launch

    return launcher


def torch_route(scene: Scene, candidate: Candidate) -> Launcher:
    """The torch backend. It allocates its results itself, as it does for a user."""
    plan = Plan(scene.problem, None, "torch", (), (), "torch")
    sides: dict[str, Any] = {
        "scale": scene.scale,
        "index": scene.index,
        "mask": scene.mask,
        "offsets": scene.offsets,
        "dropout": scene.dropout,
    }

    def run() -> Outputs:
        if scene.op == "fwd":
            return dict(
                zip(("out", "lse"), torch_backend.forward(plan, scene.q, scene.k, scene.v, **sides), strict=True)
            )
        gradients = torch_backend.backward(
            plan, scene.q, scene.k, scene.v, scene.out, scene.lse, scene.dout, None, **sides
        )
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    return lambda outputs: run


def cudnn(scene: Scene, candidate: Candidate) -> Launcher:
    """`F.scaled_dot_product_attention` by cuDNN on strided views of the branch, a call for each offset."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    problem = scene.problem
    segment, rate = problem.segment(0), problem.branches[0][1]
    views = [_views(scene, offset, segment, rate) for offset in sorted(set(scene.offsets.rows[0]) - {-1})]
    grouped = problem.heads != problem.kv_heads

    def run() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for q, k, v in views:
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=problem.causal, scale=scene.scale, enable_gqa=grouped
                )

    return lambda outputs: run


def _views(scene: Scene, offset: int, segment: int, rate: int) -> tuple[Tensor, ...]:
    """q, k and v of the heads of one offset as (B·segments, heads, rows, D), without a copy."""
    heads = [head for head, own in enumerate(scene.offsets.rows[0]) if own == offset]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    found = []
    for x in (scene.q, scene.k, scene.v):
        group = scene.q.shape[2] // x.shape[2]
        own = slice(heads[0] // group, heads[-1] // group + 1, max(step // group, 1))
        cut = x[:, :, own].view(x.shape[0], -1, segment, *x[:, :, own].shape[2:])[:, :, offset::rate]
        found.append(cut.flatten(0, 1).transpose(1, 2))
    return tuple(found)


ROUTES: Mapping[str, Route] = {KERNEL: kernel, TORCH: torch_route, CUDNN: cudnn}
