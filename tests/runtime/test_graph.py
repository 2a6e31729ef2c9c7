"""Calls that are traced: torch.compile, torch.export, fake and meta tensors, torch.func."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.errors import ArgumentError, OrderError, UnsupportedError
from dilated_attention_pytorch.runtime import graph, ops

from ..cases import Case, arguments, make_inputs, seeded_dropout

PLAIN = Case(N=37, branches=((16, 2), (40, 3)), B=2, H=4, D=8)
TRACED = (
    PLAIN,
    replace(PLAIN, order="random", causal=True, mask=True, G=2),
    replace(PLAIN, order="hilbert", queries="all", head_offset="zero", dropout=0.3),
    replace(PLAIN, head_offset=((0, 1, -1, 0), (2, 1, 0, 0)), padding="zeros", dtype="bf16"),
)
WORDS = {
    "segment_lengths": [16, 40],
    "dilation_rates": [2, 3],
    "queries": "dilated",
    "head_offset": "cyclic",
    "order": None,
    "grid": None,
    "prefix": 0,
    "is_causal": False,
    "dropout_p": 0.0,
    "scale": None,
    "padding": "none",
    "mix_grad": "exact",
    "backend": None,
}
"""The operators' arguments behind the tensors."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Compilations of one test must not count in another."""
    torch._dynamo.reset()


def compiled(function: Any, **more: Any) -> Any:
    """Traced whole, forward and backward, and run without a code generator, which would need a C++ compiler."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **more)


def random_qkv(length: int = 37, **more: Any) -> list[Tensor]:
    return [torch.randn(2, length, 4, 8, **more) for _ in range(3)]


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.id)
def test_a_compiled_call_is_the_same_call(case: Case) -> None:
    """A graph break, an argument lost on the way through the operator, another dropout mask in the backward."""
    inputs = make_inputs(case)
    given = arguments(case, inputs) | {"dropout_p": case.dropout, "return_lse": True}

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dap.dilated_attention(q, k, v, **given)

    found = []
    for attend in (function, compiled(function)):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        seeded_dropout(case)
        out, lse = attend(*leaves)
        gradients = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse))
        found.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "order",
    [dap.TokenOrder("snake", prefix=3), dap.TokenOrder.from_permutation(torch.arange(36, -1, -1)), "hilbert"],
    ids=["curve with prefix", "explicit", "word"],
)
def test_every_order_passes_through_a_graph(order: Any) -> None:
    """A TokenOrder is no type that operators take: it is sent in parts."""
    q, k, v = random_qkv()
    wanted = dap.dilated_attention(q, k, v, 16, 3, order=order)
    found = compiled(lambda q, k, v: dap.dilated_attention(q, k, v, 16, 3, order=order))(q, k, v)
    assert torch.equal(found, wanted)


def test_twenty_lengths_take_two_compilations() -> None:
    """A graph that holds the length: training on real sequences compiles at every step, then never again."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
            return dap.dilated_attention(q, k, v, [16, 64], [1, 4], order="hilbert", is_causal=True).flatten(-2)

    counter = CompileCounterWithBackend("aot_eager")
    block = Block()
    fast = torch.compile(block, fullgraph=True, backend=counter)
    for length in range(30, 50):
        x = torch.randn(2, length, 32)
        out = fast(x)
        out.sum().backward()
        assert torch.equal(out, block(x))
    assert counter.frame_count <= 2


def test_segments_as_long_as_the_sequence_do_not_fix_it() -> None:
    """A segment length computed from x.shape is a symbol in a graph."""
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(
        lambda q, k, v: dap.dilated_attention(q, k, v, [8, q.shape[1]], [1, 2]), fullgraph=True, backend=counter
    )
    for length in (30, 31, 47, 48):
        q, k, v = random_qkv(length)
        assert torch.equal(attend(q, k, v), dap.dilated_attention(q, k, v, [8, length], [1, 2]))
    assert counter.frame_count <= 2


def test_compiled_under_autocast() -> None:
    """Inputs that a graph casts after, or never; float32 inside that autocast rounds."""
    q, k, v = random_qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return dap.dilated_attention(q, k, v, 16, 3, return_lse=True)

    assert all(torch.equal(a, b) for a, b in zip(compiled(function)(q, k, v), function(q, k, v), strict=True))


def test_options_act_in_a_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is made while tracing: what a user asks for later has no effect."""
    q, k, v = random_qkv()
    attend = compiled(lambda q, k, v: dap.dilated_attention(q, k, v, 16, 3))
    attend(q, k, v)
    planned = []
    decide = graph.decide

    def noted(*given: Any, **named: Any) -> Any:
        planned.append(decide(*given, **named)[1])
        return decide(*given, **named)

    monkeypatch.setattr(graph, "decide", noted)
    for deterministic in (False, True):
        with dap.options(deterministic=deterministic):
            attend(q, k, v)
    assert [plan.problem.deterministic for plan in planned] == [False, True]


@pytest.mark.parametrize("changes", [{}, {"order": "hilbert"}, {"dropout_p": 0.2}], ids=["plain", "hilbert", "dropout"])
def test_the_operators_keep_torchs_contract(changes: dict[str, Any]) -> None:
    """A schema that hides a write, shapes or strides that the fake does not foretell, a wrong autograd registration."""
    words = list((WORDS | changes).values())
    seed = torch.tensor([3]) if "dropout_p" in changes else None
    sides = (None, torch.rand(2, 37) > 0.2, None, seed)
    leaves = random_qkv(requires_grad=True)
    opcheck(graph._attention, (*leaves, *sides, *words))
    plain = [x.detach() for x in leaves]
    out, lse = graph._attention(*plain, *sides, *words)
    incoming = torch.randn_like(out), torch.randn_like(lse)
    opcheck(ops._attention_backward, (*plain, out, lse, *incoming, *sides, *words))


def test_meta_tensors_have_shapes_and_gradients() -> None:
    """A model that is measured before it gets memory."""
    q = torch.empty(2, 37, 4, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k = torch.empty(2, 37, 2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out, lse = dap.dilated_attention(q, k, k, [16, 64], [2, 4], order="hilbert", return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 37), torch.float32)
    out.sum().backward()
    assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape


def test_wrong_arguments_of_a_traced_call_are_sentences() -> None:
    """A tracer that swallows the checks: the message would speak of an operator nobody called."""
    q, k, v = random_qkv(device="meta")
    with pytest.raises(ArgumentError, match="must agree in B, N and D"):
        dap.dilated_attention(q, k[:, :5], v[:, :5], 16, 3)
    with pytest.raises(ArgumentError, match="queries must be"):
        dap.dilated_attention(q, k, v, 16, 3, queries="some")
    with pytest.raises(UnsupportedError, match="no graph holds"):
        dap.dilated_attention(q, k, v, 16, 3, backend="reference")
    real = random_qkv()
    attend = compiled(lambda q, k, v: dap.dilated_attention(q, k, v, 16, 3, order=torch.zeros(37, dtype=torch.int64)))
    with pytest.raises(OrderError, match="holds 0 again"):
        attend(*real)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_takes_any_length(strict: bool) -> None:
    """An export that unrolls the plan of the example's length."""

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dap.dilated_attention(q, k, v, [16, 40], [2, 3], order="snake")

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {1: length} for name in "qkv"}
    program = torch.export.export(Attention(), tuple(random_qkv()), dynamic_shapes=shapes, strict=strict)
    q, k, v = random_qkv(61)
    assert torch.equal(program.module()(q, k, v), Attention()(q, k, v))


def test_functional_gradients() -> None:
    """An autograd function that torch.func cannot enter."""
    q, k, v = random_qkv(requires_grad=True)

    def loss(q: Tensor) -> Tensor:
        return dap.dilated_attention(q, k.detach(), v.detach(), 16, 3).square().sum()

    assert torch.equal(torch.func.grad(loss)(q.detach()), torch.autograd.grad(loss(q), q)[0])


def test_a_module_called_with_other_weights() -> None:
    """`functional_call` swaps parameters for plain tensors, as meta-learning and ensembles do."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
            return dap.dilated_attention(q, k, v, 16, 3)

    first, second = Projected(), Projected()
    x = torch.randn(2, 37, 32)
    weights = {name: weight.detach().requires_grad_() for name, weight in second.named_parameters()}
    out = torch.func.functional_call(first, weights, x)
    assert torch.equal(out, second(x))
    out.sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(weight.grad is None for weight in first.parameters())
