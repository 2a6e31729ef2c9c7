"""Tensors to run a task on, and what must come out: small ones against the float64 reference, the full size against
the torch backend in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..config import RESULTS, Problem, head_offsets
from ..device import Device
from ..order import TokenOrder
from ..runtime import torch_backend
from ..runtime.arguments import DTYPES, HeadOffsets
from ..runtime.dropout import Dropout
from ..runtime.plan import Plan
from .routes import Outputs, Scene

DROPOUT_P = 0.1
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def small(problem: Problem) -> Problem:
    """Two segments of one batch element: the texts that the problem runs, and soon computed in float64.

    Of several branches one segment of a wider one, with four of the narrowest.
    """
    segment = problem.segment(0)
    if len(problem.branches) > 1:
        return _of_length(problem, min(problem.length, 4 * segment + problem.length % segment))
    tail = problem.length % segment
    return _of_length(problem, min(problem.length, (segment if tail else 2 * segment) + tail))


def ragged(problem: Problem) -> Problem:
    """With a short last segment; where one segment is all, of a length that nothing divides."""
    segment = problem.segment(0)
    if problem.is_full(0):
        return _of_length(problem, max(problem.length - problem.length // 9 - 1, 1))
    return _of_length(problem, segment + segment // 3 + 1)


def _of_length(problem: Problem, length: int) -> Problem:
    """One batch element of another length; a snake keeps its row width, so that it acts as it does in the task."""
    return replace(problem, batch=1, length=length, query_range=None)


def drawn(problem: Problem, device: Device, where: torch.device, seed: int, exact: bool) -> Scene:
    """The tensors of a problem and what comes of them, whatever operation is asked for.

    Args:
        problem: A call of what one launch computes.
        device: What kernels are planned for.
        where: Where the tensors lie.
        seed: Of the numbers.
        exact: Against the float64 reference, in memory that goes with rows²; else the torch backend in float32.
    """
    generator = torch.Generator(where).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = _TORCH_DTYPES[problem.dtype]) -> Tensor:
        return torch.randn(shape, generator=generator, device=where).to(dtype)

    b, n, h, g, d = problem.batch, problem.length, problem.heads, problem.kv_heads, problem.head_dim
    q, k, v, dout = normal(b, n, h, d), normal(b, n, g, d), normal(b, n, g, d), normal(b, n, h, d)
    mask = torch.rand(b, n, generator=generator, device=where) > 0.25 if problem.mask else None
    dropout = None
    if problem.dropout:
        dropout = Dropout(DROPOUT_P, torch.full((1,), 1234 + seed, dtype=torch.int64, device=where))
    inputs = Scene(
        problem=problem,
        op="",
        merge=False,
        device=device,
        q=q,
        k=k,
        v=v,
        dout=dout,
        index=_index(problem, where, None if not exact else generator),
        mask=mask,
        offsets=_offsets(problem, where),
        dropout=dropout,
        out=q,
        lse=torch.empty(0),
        delta=torch.empty(0),
        before={},
        expected={},
        alone={},
        rounded={},
    )
    found = _formula(inputs, torch.float64) if exact else _wide(inputs)
    inputs.out, inputs.lse = found["out"].to(q.dtype), found["lse"].float()
    inputs.delta = (dout.double() * found["out"].double()).sum(-1).transpose(1, 2).float().contiguous()
    inputs.alone = found
    inputs.sums = sums(inputs)
    return inputs


def sums(inputs: Scene) -> tuple[int, ...]:
    """Of the bits of what a kernel reads: others where one wrote to it."""
    read = (inputs.q, inputs.k, inputs.v, inputs.dout)
    return tuple(int(tensor.view(torch.uint8).sum(dtype=torch.int64)) for tensor in read)


def asked(inputs: Scene, op: str, merge: bool, seed: int) -> Scene:
    """A launch on drawn tensors, which it shares, and what it must write.

    Args:
        inputs: As `drawn`.
        op: "fwd", "dkdv", "dq" or "bwd".
        merge: Outputs hold something, and the launch merges into it.
        seed: Of what they hold.
    """
    inputs = replace(inputs, op=op, merge=merge)
    if merge:
        inputs.before = _earlier(inputs, torch.Generator(inputs.q.device).manual_seed(1000 + seed))
    inputs.expected = _mixed(inputs, inputs.alone)
    return inputs


def rounded(inputs: Scene, *, alone: bool) -> Outputs:
    """What must come out but for lse, with the rounding of the problem's own dtype in every step of the branch.

    Args:
        inputs: The scene; it keeps the result, and shares it with others on the same tensors.
        alone: Before anything is merged.
    """
    if not inputs.rounded:
        inputs.rounded.update(_formula(inputs, inputs.q.dtype) | {"lse": inputs.alone["lse"]})
    return inputs.rounded if alone else _mixed(inputs, inputs.rounded)


def _index(problem: Problem, where: torch.device, generator: torch.Generator | None) -> Tensor | None:
    """The order's index; where it is read and not computed, small problems take one that is not its own inverse."""
    if problem.order == "none":
        return None
    if problem.order == "snake":
        return _snake(problem, where)
    if generator is not None:
        return torch.randperm(problem.length, generator=generator, device=where).int()
    return TokenOrder("hilbert").indices(problem.length).to(where).int()


def _snake(problem: Problem, where: torch.device) -> Tensor:
    """Steps -> tokens of a snake with the problem's row width, whatever its length: every second row runs backwards."""
    tokens = torch.arange(problem.length, device=where)
    row, column = (tokens - problem.prefix) // problem.row_width, (tokens - problem.prefix) % problem.row_width
    ends = torch.clamp(problem.length - problem.prefix - row * problem.row_width, max=problem.row_width)
    turned = problem.prefix + row * problem.row_width + ends - 1 - column
    backwards = (row % 2 == 1) & (tokens >= problem.prefix)
    return torch.where(backwards, turned, tokens).int()


def _offsets(problem: Problem, where: torch.device) -> HeadOffsets:
    table = problem.head_offset == "table"
    rule = "cyclic" if table else problem.head_offset
    rows = tuple(head_offsets(rule, problem.heads, rate) for _, rate in problem.branches)
    return HeadOffsets(rows, torch.tensor(rows, dtype=torch.int32, device=where) if table else None)


def _formula(inputs: Scene, dtype: torch.dtype) -> Outputs:
    """out, lse and gradients by the oracle in a dtype."""
    problem, dropout = inputs.problem, inputs.dropout
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = reference.dilated_attention(
        q,
        k,
        v,
        *zip(*problem.branches, strict=True),
        queries=problem.queries,
        head_offset=torch.tensor(inputs.offsets.rows),
        order=None if inputs.index is None else inputs.index.long(),
        is_causal=problem.causal,
        key_padding_mask=inputs.mask,
        padding=problem.padding,
        dropout_mask=None if dropout is None else lambda branch: dropout.multipliers(problem, branch),
        dtype=dtype,
    )
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.to(dtype), materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def _wide(inputs: Scene) -> Outputs:
    """The same by the torch backend in float32."""
    problem = replace(inputs.problem, dtype="fp32", tf32=False)
    plan = Plan(problem, None, "torch", (), (), "torch")
    q, k, v, dout = (x.float() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    sides = {"scale": inputs.scale, "index": inputs.index, "mask": inputs.mask, "offsets": inputs.offsets}
    out, lse = torch_backend.forward(plan, q, k, v, **sides, dropout=inputs.dropout)  # type: ignore[arg-type]
    gradients = torch_backend.backward(plan, q, k, v, out, lse, dout, None, **sides, dropout=inputs.dropout)  # type: ignore[arg-type]
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def _earlier(inputs: Scene, generator: torch.Generator) -> Outputs:
    """An earlier branch's results, of the size of this one's."""

    def like(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return (noise * x.float().square().mean().sqrt()).to(inputs.q.dtype)

    if inputs.op != "fwd":
        return {name: like(inputs.alone[name]) for name in RESULTS[inputs.op]}
    lse = inputs.alone["lse"]
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    noise = torch.randn(lse.shape, generator=generator, device=lse.device)
    return {"out": like(inputs.alone["out"]), "lse": noise + finite.float().mean()}


def _mixed(inputs: Scene, found: Outputs) -> Outputs:
    """What a launch must write: a branch's results, merged into an earlier one's if there is one."""
    if not inputs.merge:
        return {name: found[name] for name in RESULTS[inputs.op]}
    if inputs.op != "fwd":
        return {name: found[name] + inputs.before[name].to(found[name].dtype) for name in RESULTS[inputs.op]}
    out, lse = found["out"], found["lse"]
    both = torch.logaddexp(lse, inputs.before["lse"].to(lse.dtype))
    weight = torch.exp(lse - both).transpose(1, 2).unsqueeze(3)
    return {"out": weight * out + (1.0 - weight) * inputs.before["out"].to(out.dtype), "lse": both}


def fresh(inputs: Scene, guard: int) -> tuple[Outputs, list[tuple[str, Tensor]]]:
    """Outputs between guard bands of NaN, and the whole memory of each: full of NaN, or of an earlier branch."""
    outputs, memories = {}, []
    for name in RESULTS[inputs.op]:
        shape = inputs.expected[name].shape
        dtype = torch.float32 if name == "lse" else inputs.q.dtype
        memory = torch.full((shape.numel() + 2 * guard,), torch.nan, dtype=dtype, device=inputs.q.device)
        outputs[name] = memory[guard : guard + shape.numel()].view(shape)
        if inputs.merge:
            outputs[name].copy_(inputs.before[name])
        memories.append((name, memory))
    return outputs, memories
