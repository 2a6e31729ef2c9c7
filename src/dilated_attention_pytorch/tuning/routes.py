"""The ways to run a task, each from a scene to a function that launches it: our kernels, and what they must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import generated
from ..config import Problem
from ..device import Device
from ..runtime import torch_backend
from ..runtime.arguments import HeadOffsets
from ..runtime.dropout import Dropout
from ..runtime.launch import branch_values, prepared, run_kernel, shared_values
from ..runtime.plan import CallChoice, Choice, Plan
from .problems import launched
from .space import APART, CUDNN, KERNEL, TORCH, Candidate

Outputs = dict[str, Tensor]


@dataclass
class Scene:
    """The tensors of one task, and what must come out.

    Attributes:
        problem: A call of one branch.
        op: "fwd", "dkdv", "dq" or "bwd".
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
        alone: What the branch gives by itself, all gradients in a backward: an external route merges nothing.
        rounded: The same by the oracle's formula in the dtype of q; empty until somebody asks.
        sums: Of the bits of q, k, v and dout as they were drawn.
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
    alone: Outputs
    rounded: Outputs
    sums: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1.0 / math.sqrt(self.problem.head_dim)


Launch = Callable[[], Outputs | Callable[[], Outputs] | None]
"""Runs once; gives its results where it allocated them itself, or what puts them into the outputs' shape."""
Launcher = Callable[[Outputs], Launch]
"""Takes outputs; what it returns launches into them as often as it is called."""
Route = Callable[[Scene, Candidate], Launcher]


def kernel(scene: Scene, candidate: Candidate) -> Launcher:
    """One of our kernels."""
    return _ours(scene, [launched(scene.problem, scene.op, candidate.config, generated.names(), merge=scene.merge)])


def apart(scene: Scene, candidate: Candidate) -> Launcher:
    """Several of our kernels in the place of one, each merging into what those of its operation wrote before it."""
    choices: list[Choice] = []
    for op, branches, config in candidate.launches:
        merge = scene.merge or any(choice.op == op for choice in choices)
        choices.append(launched(scene.problem, op, config, generated.names(), branches=branches, merge=merge))
    return _ours(scene, choices)


def _ours(scene: Scene, choices: Sequence[Choice]) -> Launcher:
    """Launches in a row."""
    strided = {"q": scene.q, "k": scene.k, "v": scene.v}
    if scene.op != "fwd":
        strided["dout"] = scene.dout
    shared = shared_values(
        scene.problem, scene.device.arch, scene.scale, scene.index, scene.mask, scene.dropout, **strided
    )
    shared.update(p_lse=scene.lse, p_delta=scene.delta, p_dq=None, p_dk=None, p_dv=None, p_out=None, dout_d=1)

    def launcher(outputs: Outputs) -> Launch:
        given = {**shared, **{f"p_{name}": tensor for name, tensor in outputs.items()}}
        ready = [
            (prepared(choice, branch_values(scene.problem, choice, scene.offsets, given)), choice.config)
            for choice in choices
        ]

        def launch() -> None:
            for kernel, config in ready:
                run_kernel(kernel, config)

        return launch

    return launcher


def torch_route(scene: Scene, candidate: Candidate) -> Launcher:
    """The torch backend. It allocates its results itself, as it does for a user."""
    config = candidate.call_config
    measured = () if config is None else (CallChoice(scene.op, 0, config, "tuning"),)
    plan = Plan(scene.problem, None, "torch", (), (), "torch", measured)
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
    """cuDNN on strided views of the branch."""
    return strided_sdpa(scene, SDPBackend.CUDNN_ATTENTION)


def strided_sdpa(scene: Scene, backend: SDPBackend) -> Launcher:
    """`F.scaled_dot_product_attention` on strided views of the branch, a call for each offset.

    A backward gives all gradients at once. Its forward runs here, and the results are put in their places after the
    launch: neither is timed.
    """
    problem, offsets = scene.problem, sorted(set(scene.offsets.rows[0]))
    views = [[_rows(scene, x, offset) for x in (scene.q, scene.k, scene.v)] for offset in offsets]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = problem.heads != problem.kv_heads
        return scaled_dot_product_attention(q, k, v, is_causal=problem.causal, scale=scene.scale, enable_gqa=grouped)

    def whole(like: Tensor, parts: Sequence[Tensor]) -> Tensor:
        found = torch.zeros_like(like)
        for offset, part in zip(offsets, parts, strict=True):
            _rows(scene, found, offset).copy_(part)
        return found

    def forward() -> Callable[[], Outputs]:
        with sdpa_kernel(backend):
            outs = [attend(*view) for view in views]
        return lambda: {"out": whole(scene.q, outs)}

    if scene.op == "fwd":
        return lambda outputs: forward
    leaves = [[x.detach().requires_grad_() for x in view] for view in views]
    with sdpa_kernel(backend):
        outs = [attend(*leaf) for leaf in leaves]
    douts = [_rows(scene, scene.dout, offset) for offset in offsets]

    def backward() -> Callable[[], Outputs]:
        found = [
            torch.autograd.grad(out, leaf, dout, retain_graph=True)
            for out, leaf, dout in zip(outs, leaves, douts, strict=True)
        ]
        dq, dk, dv = zip(*found, strict=True)
        return lambda: {"dq": whole(scene.q, dq), "dk": whole(scene.k, dk), "dv": whole(scene.v, dv)}

    return lambda outputs: backward


def _rows(scene: Scene, x: Tensor, offset: int) -> Tensor:
    """The kept rows of the heads of one offset as (B·segments, heads, rows, D): a view of x."""
    segment, rate = scene.problem.segment(0), scene.problem.branches[0][1]
    heads = [head for head, own in enumerate(scene.offsets.rows[0]) if own == offset]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    group = scene.q.shape[2] // x.shape[2]
    own = x[:, :, heads[0] // group : heads[-1] // group + 1 : max(step // group, 1)]
    cut = own.view(len(own), -1, segment, *own.shape[2:])
    return cut[:, :, offset::rate].flatten(0, 1).transpose(1, 2)


ROUTES: Mapping[str, Route] = {KERNEL: kernel, APART: apart, TORCH: torch_route, CUDNN: cudnn}
