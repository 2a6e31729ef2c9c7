"""The public functions: wrong input is a sentence before any launch, right input is the oracle's result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.errors import ArgumentError, ArgumentTypeError, OrderError, UnsupportedError
from dilated_attention_pytorch.runtime import launch, torch_backend
from dilated_attention_pytorch.runtime.arguments import resolve
from dilated_attention_pytorch.runtime.plan import Plan

from ..cases import CASES, Case, Inputs, arguments, make_inputs, oracle, seeded_dropout
from ..tolerances import TOLERANCES, Results, check, check_results

PLAIN = Case(N=61, branches=((16, 3), (40, 2)), B=2, H=6, G=2, D=8)
EVERYTHING = replace(PLAIN, order="random", mask=True, causal=True, queries="all")
BACKENDS = ("torch", "reference")

Function = Callable[..., Any]


def run(case: Case, inputs: Inputs, **more: Any) -> Results:
    """Forward and backward through the public function, dlse included."""
    q, k, v = leaves(inputs)
    seeded_dropout(case)
    given = arguments(case, inputs) | {"dropout_p": case.dropout}
    out, lse = dap.dilated_attention(q, k, v, **given, return_lse=True, **more)
    # Nothing is left of a graph where no step is kept at all.
    gradients = torch.autograd.grad((out, lse), (q, k, v), (inputs.dout, inputs.dlse))
    assert lse.dtype == inputs.dlse.dtype
    assert all(x.dtype == q.dtype for x in (out, *gradients))
    return Results(out.detach(), lse.detach(), *gradients)


def leaves(inputs: Inputs) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs[:3]]


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts to compute fails the test."""

    def computed(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was launched")

    for module in (launch, torch_backend):
        monkeypatch.setattr(module, "forward", computed)
    monkeypatch.setattr(reference, "dilated_attention", computed)


# ---- Wrong input -----------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 7, 4, 8), torch.zeros(2, 7, 2, 8)
MASK = torch.ones(2, 7, dtype=torch.bool)
GIVEN: dict[str, Any] = {"q": Q, "k": K, "v": K, "segment_lengths": [4, 7], "dilation_rates": [2, 3]}

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q is a list": ({"q": [1.0]}, ArgumentTypeError, "q must be a tensor (B, N, H, D), got list"),
    "v is None": ({"v": None}, ArgumentTypeError, "v must be a tensor (B, N, G, D), got NoneType"),
    "q of rank 3": ({"q": Q[0]}, ArgumentError, "q must have shape (B, N, H, D), got (7, 4, 8)"),
    "v of rank 5": ({"v": K[None]}, ArgumentError, "v must have shape (B, N, G, D), got (1, 2, 7, 2, 8)"),
    "integers": ({"q": Q.int()}, ArgumentError, "q must be bfloat16, float16, float32 or float64, got torch.int32"),
    "complex": ({"k": K.cfloat()}, ArgumentError, "k must be bfloat16, float16, float32 or float64, got torch.complex"),
    "two dtypes": ({"k": K.half()}, ArgumentError, "one dtype; q has torch.float32, k has torch.float16"),
    "two devices": ({"v": K.to("meta")}, ArgumentError, "one device; q is on cpu, v on meta"),
    "k unlike v": ({"v": K[:, :5]}, ArgumentError, "k and v must have one shape, got (2, 7, 2, 8) and (2, 5, 2, 8)"),
    "another batch": ({"q": Q[:1]}, ArgumentError, "must agree in B, N and D, got (1, 7, 4, 8) and (2, 7, 2, 8)"),
    "another length": ({"q": Q[:, :3]}, ArgumentError, "must agree in B, N and D, got (2, 3, 4, 8)"),
    "another head_dim": ({"q": Q[..., :4]}, ArgumentError, "must agree in B, N and D, got (2, 7, 4, 4)"),
    "heads before tokens": ({"q": Q.transpose(1, 2)}, ArgumentError, "(B, H, N, D) need .transpose(1, 2)"),
    "3 heads over 2": ({"q": Q[:, :, :3]}, ArgumentError, "the 3 heads of q must be a multiple of the 2 of k and v"),
    "no heads": ({"q": Q[:, :, :0]}, ArgumentError, "the 0 heads of q must be a multiple of the 2"),
    "no head_dim": ({name: x[..., :0] for name, x in (("q", Q), ("k", K), ("v", K))}, ArgumentError, "at least 1"),
    "mask is a list": ({"key_padding_mask": [True] * 7}, ArgumentTypeError, "a bool tensor (B, N), got list"),
    "mask of integers": ({"key_padding_mask": MASK.long()}, ArgumentTypeError, "got torch.int64; write mask != 0"),
    "mask of floats": ({"key_padding_mask": MASK.float()}, ArgumentTypeError, "True = take part, got torch.float32"),
    "mask of rank 1": ({"key_padding_mask": MASK[0]}, ArgumentError, "shape (B, N) = (2, 7), got (7,)"),
    "mask of another length": ({"key_padding_mask": MASK[:, :6]}, ArgumentError, "(B, N) = (2, 7), got (2, 6)"),
    "mask elsewhere": ({"key_padding_mask": MASK.to("meta")}, ArgumentError, "on q's device cpu, got meta"),
    "an unknown curve": ({"order": "peano"}, OrderError, "'snake', 'hilbert', a TokenOrder or a tensor, got 'peano'"),
    "order is a list": ({"order": list(range(7))}, ArgumentTypeError, "got list; TokenOrder.from_permutation takes"),
    "order repeats": ({"order": torch.tensor([0, 1, 2, 3, 4, 5, 5])}, OrderError, "but position 6 holds 5 again"),
    "order from 1": ({"order": torch.arange(1, 8)}, OrderError, "each of 0..6 once, but position 6 holds 7"),
    "order of 6 tokens": ({"order": torch.arange(6)}, OrderError, "permutes 6 tokens, but there are 7"),
    "order of floats": ({"order": torch.arange(7.0)}, OrderError, "got torch.float32"),
    "order of rank 2": ({"order": torch.arange(7)[None]}, OrderError, "(1, 7)"),
    "order of another grid": ({"order": dap.TokenOrder("snake", (2, 4))}, OrderError, "8 tokens, but there are 7"),
    "order of a long prefix": ({"order": dap.TokenOrder("snake", prefix=8)}, OrderError, "prefix 8 exceeds"),
    "order without numbers": ({"order": torch.arange(7, device="meta")}, OrderError, "a meta tensor has none"),
    "sparse q": ({"q": Q.to_sparse()}, ArgumentError, "got layout torch.sparse_coo; .to_dense() makes one"),
    "sparse mask": ({"key_padding_mask": MASK.to_sparse()}, ArgumentError, "got layout torch.sparse_coo; .to_dense()"),
    "lengths in a tensor": ({"segment_lengths": torch.tensor([4, 7])}, ArgumentTypeError, "; .tolist() makes one"),
    "2 lengths, 1 rate": ({"dilation_rates": 2}, ArgumentError, "got 2 ((4, 7)) and 1 ((2,))"),
    "no branch": ({"segment_lengths": [], "dilation_rates": ()}, ArgumentError, "at least one branch, got none"),
    "length 0": ({"segment_lengths": [4, 0]}, ArgumentError, "segment_lengths must lie in 1..2^31-1, got 0 in [4, 0]"),
    "rate -2": ({"dilation_rates": [-2, 3]}, ArgumentError, "dilation_rates must lie in 1..2^31-1, got -2"),
    "length 2^31": ({"segment_lengths": [4, 2**31]}, ArgumentError, "got 2147483648"),
    "length True": ({"segment_lengths": [4, True]}, ArgumentTypeError, "a sequence of integers, got [4, True]"),
    "rate 2.0": ({"dilation_rates": [2.0, 3]}, ArgumentTypeError, "a sequence of integers, got [2.0, 3]"),
    "length '4'": ({"segment_lengths": "4"}, ArgumentTypeError, "a sequence of integers, got '4'"),
    "rate None": ({"dilation_rates": None}, ArgumentTypeError, "dilation_rates must be an integer or a sequence"),
    "scale NaN": ({"scale": float("nan")}, ArgumentError, "scale must be a number, got NaN"),
    "scale inf": ({"scale": float("inf")}, ArgumentError, "must be finite, got inf; None is 1/sqrt(head_dim)"),
    "scale -inf": ({"scale": -float("inf")}, ArgumentError, "must be finite, got -inf"),
    "scale True": ({"scale": True}, ArgumentTypeError, "scale must be a number, got True"),
    "scale '1'": ({"scale": "1"}, ArgumentTypeError, "scale must be a number, got '1'"),
    "dropout_p 1": ({"dropout_p": 1.0}, ArgumentError, "dropout_p must lie in [0, 1), got 1.0"),
    "dropout_p -0.1": ({"dropout_p": -0.1}, ArgumentError, "dropout_p must lie in [0, 1), got -0.1"),
    "dropout_p NaN": ({"dropout_p": float("nan")}, ArgumentError, "dropout_p must be a number, got NaN"),
    "dropout_p None": ({"dropout_p": None}, ArgumentTypeError, "dropout_p must be a number, got None"),
    "is_causal 1": ({"is_causal": 1}, ArgumentTypeError, "is_causal must be True or False, got 1"),
    "queries": ({"queries": "some"}, ArgumentError, "queries must be 'dilated' or 'all', got 'some'"),
    "padding": ({"padding": True}, ArgumentError, "padding must be 'none' or 'zeros', got True"),
    "mix_grad": ({"mix_grad": "none"}, ArgumentError, "mix_grad must be 'exact' or 'detached', got 'none'"),
    "backend": (
        {"backend": "cuda"},
        ArgumentError,
        "backend must be None or one of triton, torch, reference, got 'cuda'",
    ),
    "head_offset": ({"head_offset": "table"}, ArgumentError, "'cyclic', 'blocked', 'zero' or an integer tensor"),
    "offsets in a list": ({"head_offset": [[0]]}, ArgumentTypeError, "a word or an integer tensor, got list"),
    "offsets of floats": ({"head_offset": torch.zeros(2, 4)}, ArgumentTypeError, "hold integers, got torch.float32"),
    "offsets of bools": ({"head_offset": MASK[:, :4]}, ArgumentTypeError, "hold integers, got torch.bool"),
    "offsets of a branch": ({"head_offset": torch.zeros(4).int()}, ArgumentError, "(branches, H) = (2, 4), got (4,)"),
    "offset r": ({"head_offset": torch.full((2, 4), 2)}, ArgumentError, "in 0..r-1, or be -1 for a head that takes no"),
    "offset -2": ({"head_offset": torch.full((2, 4), -2)}, ArgumentError, "got -2 at rate 2"),
}


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("function", [dap.dilated_attention, dap.explain], ids=["run", "explain"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_sentence(name: str, function: Function) -> None:
    """It would reach a kernel, or end in somebody else's error about a stride."""
    changes, error, words = WRONG[name]
    with pytest.raises(error) as raised:
        function(**GIVEN | changes)
    assert type(raised.value) is error
    assert words in str(raised.value)


# ---- The oracle's results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_function_is_the_oracle(case: Case) -> None:
    """An argument that is lost or swapped between the public face and a backend."""
    inputs = make_inputs(case)
    check_results(run(case, inputs, backend="torch"), oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, replace(EVERYTHING, dtype="fp64")], ids=lambda case: case.id)
def test_the_reference_is_a_backend(case: Case) -> None:
    """Whoever compares with it would compare with other arguments."""
    inputs = make_inputs(case)
    check_results(run(case, inputs, backend="reference"), oracle(case, inputs), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_returned(backend: str) -> None:
    """A pair where a tensor was expected, or an lse of another precision."""
    q, k, v = (x.half() for x in make_inputs(PLAIN)[:3])
    out = dap.dilated_attention(q, k, v, 16, 3, backend=backend)
    pair = dap.dilated_attention(q, k, v, 16, 3, return_lse=True, backend=backend)
    assert isinstance(out, Tensor) and isinstance(pair, tuple)
    assert torch.equal(out, pair[0])
    assert (out.shape, out.dtype) == (q.shape, torch.float16)
    assert (pair[1].shape, pair[1].dtype) == ((2, 6, 61), torch.float32)


def test_an_integer_is_a_branch() -> None:
    """`segment_lengths=16` must be `[16]`, and any kind of integer and sequence will do."""
    q, k, v = make_inputs(PLAIN)[:3]
    out = dap.dilated_attention(q, k, v, 16, 3)
    for lengths, rates in (([16], (3,)), (np.int64(16), [np.int32(3)]), (torch.Size([16]), range(3, 4))):
        assert torch.equal(dap.dilated_attention(q, k, v, lengths, rates), out)  # type: ignore[arg-type]


def test_every_way_to_give_an_order() -> None:
    """A word, a value and a tensor that mean one order, taken in different directions."""
    q, k, v = make_inputs(PLAIN)[:3]
    order = dap.TokenOrder("hilbert")
    tokens = order.indices(61)
    assert not torch.equal(tokens[tokens], torch.arange(61)), "an involution hides a swapped direction"
    out = dap.dilated_attention(q, k, v, 16, 3, order=tokens)
    for same in ("hilbert", order, dap.TokenOrder.from_permutation(tokens), tokens.int()):
        assert torch.equal(dap.dilated_attention(q, k, v, 16, 3, order=same), out)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1, np.float32(0.3)])
@pytest.mark.parametrize(
    "case",
    [PLAIN, EVERYTHING, replace(PLAIN, mask=True), replace(PLAIN, causal=True), replace(PLAIN, causal=True, mask=True)],
    ids=lambda case: case.id,
)
def test_any_finite_scale(case: Case, scale: float) -> None:
    """The largest product is the largest score, and -inf stays -inf, only where the scale is positive."""
    inputs = make_inputs(case)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    expected = reference.dilated_attention(q, k, v, **arguments(case, inputs), scale=float(scale))
    gradients = torch.autograd.grad(expected[0], (q, k, v), inputs.dout.double())
    mine = leaves(inputs)
    actual = dap.dilated_attention(*mine, **arguments(case, inputs), scale=scale, return_lse=True)
    found = torch.autograd.grad(actual[0], mine, inputs.dout)
    floor = 1e-6 * inputs.dout.norm().item()
    check("out", actual[0], expected[0], TOLERANCES["fp32"].out)
    assert torch.equal(actual[1] == -torch.inf, expected[1] == -torch.inf)
    for name, got, want in zip("qkv", found, gradients, strict=True):
        check(f"d{name}", got, want, TOLERANCES["fp32"].grad, floor=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words", [{"order": "hilbert", "is_causal": True}, {"queries": "all"}, {}], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0), (0, 0), (1, 1)])
def test_next_to_nothing(batch: int, length: int, words: dict[str, Any], backend: str) -> None:
    """An empty batch, the last of an epoch, or an empty sequence divides by zero or has no gradient."""
    q, k, v = (torch.randn(batch, length, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out, lse = dap.dilated_attention(q, k, v, [4, 9], [1, 2], return_lse=True, backend=backend, **words)
    assert (out.shape, lse.shape) == (q.shape, (batch, 4, length))
    if backend != "reference" or length:  # its loops have nothing to record
        torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
        assert q.grad is not None and q.grad.shape == q.shape
    assert not length or torch.allclose(out, v.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("layout", ["packed", "expanded", "last dimension strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(layout: str, backend: str) -> None:
    """Memory read as if it were contiguous; an expanded dout, as `out.sum()` sends it, among it."""
    case = replace(PLAIN, G=6)
    inputs = make_inputs(case)
    q, k, v = inputs[:3]
    if layout == "packed":
        q, k, v = torch.stack((q, k, v), dim=3).unbind(3)
    elif layout == "expanded":
        q, k, v = (x[:, :1].expand_as(x) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
        assert q.stride(3) != 1
    given = inputs._replace(q=q, k=k, v=v, dout=torch.ones(()).expand(q.shape))
    check_results(run(case, given, backend=backend), oracle(case, given), case.dtype, dout=given.dout)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_a_gradient_through_either_result(through: str) -> None:
    """A missing gradient is None, not zeros: code that reads it fails, or adds the other's."""
    inputs = make_inputs(EVERYTHING)
    if through == "out":
        inputs = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    elif through == "lse":
        inputs = inputs._replace(dout=torch.zeros_like(inputs.dout))
    expected = oracle(EVERYTHING, inputs)
    q, k, v = leaves(inputs)
    out, lse = dap.dilated_attention(q, k, v, **arguments(EVERYTHING, inputs), return_lse=True)
    sent = [(out, inputs.dout)] * (through != "lse") + [(lse, inputs.dlse)] * (through != "out")
    results, incoming = zip(*sent, strict=True)
    gradients = torch.autograd.grad(results, (q, k, v), incoming)
    actual = Results(out.detach(), lse.detach(), *gradients)
    check_results(actual, expected, "fp32", dout=make_inputs(EVERYTHING).dout)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_some_inputs_are_frozen(wanted: str) -> None:
    """A gradient handed to the wrong input, or none at all where q alone is frozen."""
    inputs = make_inputs(EVERYTHING)
    expected = oracle(EVERYTHING, inputs._replace(dlse=torch.zeros_like(inputs.dlse)))
    named = {name: getattr(inputs, name).detach().requires_grad_(name in wanted) for name in "qkv"}
    out = dap.dilated_attention(**named, **arguments(EVERYTHING, inputs))
    out.backward(inputs.dout)
    for name, x in named.items():
        assert (x.grad is not None) == (name in wanted)
        if x.grad is not None:
            check(f"d{name}", x.grad, getattr(expected, f"d{name}"), TOLERANCES["fp32"].grad)


def test_without_gradients_nothing_is_saved() -> None:
    """Inference that holds on to q, k, v and out."""
    inputs = make_inputs(PLAIN)
    q, k, v = leaves(inputs)
    with torch.no_grad():
        out = dap.dilated_attention(q, k, v, **arguments(PLAIN, inputs))
    assert not out.requires_grad and out.grad_fn is None
    with torch.inference_mode():
        again = dap.dilated_attention(q, k, v, **arguments(PLAIN, inputs))
    assert torch.equal(out, again)


TINY = Case(N=9, branches=((4, 2), (9, 3), (6, 1)), B=2, H=4, G=2, D=2, dtype="fp64")
TINIEST = replace(TINY, N=5, B=1, H=2, G=1, D=1, order="random", causal=True)
GRADCHECKED = (
    TINY,
    replace(TINY, order="random", causal=True, mask=True),
    replace(TINY, order="random", queries="all", causal=True, head_offset="zero"),
    replace(TINY, queries="all", mask=True, padding="zeros", head_offset="blocked"),
    TINIEST,
)


@pytest.mark.parametrize("case", GRADCHECKED, ids=lambda case: case.id)
def test_gradients_are_finite_differences(case: Case) -> None:
    """A backward and an oracle that are wrong in the same way."""
    inputs = make_inputs(case)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dap.dilated_attention(q, k, v, **arguments(case, inputs), return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    # Each entry of the Jacobian takes seconds; else one random projection of it.
    assert torch.autograd.gradcheck(function, leaves(inputs), fast_mode=case is not TINIEST)


@pytest.mark.parametrize("through", ["q", "v", "dout"])
def test_a_second_derivative_is_refused(through: str) -> None:
    """The backward is no function that torch could differentiate: a gradient penalty would be silently wrong."""
    q, k, v = leaves(make_inputs(PLAIN))
    dout = torch.ones_like(q, requires_grad=True)
    (dq,) = torch.autograd.grad(dap.dilated_attention(q, k, v, 16, 3), q, dout, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(dq.square().sum(), {"q": q, "v": v, "dout": dout}[through])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    """A forward that is run again under other modes may plan, and so compute, something else."""
    inputs = make_inputs(EVERYTHING)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dap.dilated_attention(q, k, v, **arguments(EVERYTHING, inputs))

    found = []
    for step in (function, lambda *x: checkpoint(function, *x, use_reentrant=reentrant)):
        mine = leaves(inputs)
        step(*mine).backward(inputs.dout)
        found.append([x.grad for x in mine])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_mask_edited_before_the_backward_is_noticed() -> None:
    """The backward would mask other keys than the forward did."""
    inputs = make_inputs(EVERYTHING)
    assert inputs.mask is not None
    mine = leaves(inputs)
    out = dap.dilated_attention(*mine, **arguments(EVERYTHING, inputs))
    inputs.mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING], ids=lambda case: case.id)
def test_autocast_casts_the_inputs_and_nothing_else(case: Case) -> None:
    """Inputs left in float32, or the float32 that backends compute in rounded to bf16 on the way."""
    inputs = make_inputs(case)
    rounded = inputs._replace(**{name: getattr(inputs, name).bfloat16() for name in ("q", "k", "v", "dout")})
    expected = run(replace(case, dtype="bf16"), rounded)
    mine = leaves(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        q = inputs.q.transpose(1, 2)
        assert scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        out, lse = dap.dilated_attention(*mine, **arguments(case, inputs), return_lse=True)
        gradients = torch.autograd.grad((out, lse), mine, (rounded.dout, inputs.dlse))
    assert torch.equal(out, expected.out) and torch.equal(lse, expected.lse)
    for got, want in zip(gradients, expected[2:], strict=True):
        assert torch.equal(got, want.float())


def test_autocast_leaves_float64() -> None:
    """`gradcheck` under autocast."""
    q, k, v = (x.double() for x in make_inputs(PLAIN)[:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dap.dilated_attention(q, k, v, 16, 3), dap.dilated_attention(q, k, v, 16, 3))
        assert dap.dilated_attention(q, k, v, 16, 3).dtype == torch.float64


# ---- What no backend has, and what one alone has ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "equal",
    [
        {"is_causal": 1},
        {"dropout_p": False},
        {"scale": True},
        {"segment_lengths": [4.0, 7]},
        {"dilation_rates": [True, 3]},
    ],
    ids=lambda equal: next(iter(equal)),
)
def test_a_known_call_does_not_let_its_equals_in(equal: dict[str, Any]) -> None:
    """A memory of calls in which 1, 1.0 and True are one: what was refused is taken from the second call on."""
    given = GIVEN | {"dilation_rates": [1, 3], "is_causal": True, "dropout_p": 0.0, "scale": 1.0}
    dap.dilated_attention(**given)
    with pytest.raises(ArgumentTypeError):
        dap.dilated_attention(**given | equal)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_detached_mix(backend: str | None) -> None:
    """Weights trained by torchscale's rule need its gradient; whichever backend has it must be found."""
    inputs = make_inputs(PLAIN)
    expected = oracle(PLAIN, inputs, mix_grad="detached")
    mine = leaves(inputs)
    out = dap.dilated_attention(*mine, **arguments(PLAIN, inputs), mix_grad="detached", backend=backend)
    gradients = torch.autograd.grad(out, mine, inputs.dout)
    check_results(Results(out.detach(), expected.lse, *gradients), expected, "fp32", dout=inputs.dout)


def test_a_detached_mix_has_no_gradient_of_lse() -> None:
    """The rule defines none: an exact one would be a mix of two rules."""
    mine = leaves(make_inputs(PLAIN))
    out, lse = dap.dilated_attention(*mine, 16, 3, mix_grad="detached", return_lse=True)
    with pytest.raises(UnsupportedError, match="detach lse, or use"):
        (out.sum() + lse[lse > -torch.inf].sum()).backward()


def test_a_scale_that_is_not_positive_stays_off_the_kernels() -> None:
    """They take the largest product for the largest score."""
    for scale in (-1.0, 0.0):
        with pytest.raises(UnsupportedError, match="scale must be positive"):
            dap.explain(**GIVEN, scale=scale, backend="triton")


# ---- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_launch")
def test_explain_runs_nothing_and_tells_all() -> None:
    """A plan whose `print` is a line of fields nobody reads."""
    found = dap.explain(**GIVEN, order="hilbert", is_causal=True, key_padding_mask=MASK, return_lse=True)
    assert isinstance(found, Plan)
    assert str(found) == found.explain()
    for words in (
        "problem  fp32, B 2, N 7, H 4/2, D 8",
        "order hilbert",
        "causal, mask",
        "backend  torch",
        "not triton",
    ):
        assert words in str(found)
    assert repr(found).startswith("Plan(problem=Problem(dtype='fp32'")
    assert {found: "hashable"}


def test_shapes_can_be_asked_without_memory() -> None:
    """Meta tensors, as model loaders make them, know no autocast."""
    q, k, v = (x.to("meta") for x in (Q, K, K))
    assert dap.explain(q, k, v, 4, 2).backend == "torch"
    out, lse = dap.dilated_attention(q, k, v, [4, 7], [2, 3], order="hilbert", return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", (2, 4, 7))


# ---- State that outlives a call --------------------------------------------------------------------------------------


def test_a_table_of_head_offsets_edited_in_place_is_seen() -> None:
    """It is checked once and remembered: the old one would be used, or a wrong one pass."""
    q, k, v = (torch.randn(2, 7, heads, 8) for heads in (4, 2, 2))
    table = torch.tensor([[0, 1, 2, 0]])
    before = dap.dilated_attention(q, k, v, 7, 3, head_offset=table)
    table += 1
    table %= 3
    after = dap.dilated_attention(q, k, v, 7, 3, head_offset=table)
    assert torch.equal(after, dap.dilated_attention(q, k, v, 7, 3, head_offset=table.clone()))
    assert not torch.equal(before, after)
    table += 2
    with pytest.raises(ArgumentError, match="at rate 3"):
        dap.dilated_attention(q, k, v, 7, 3, head_offset=table)
    with pytest.raises(ArgumentError, match="at rate 2"):
        dap.dilated_attention(q, k, v, 7, 2, head_offset=table)


def test_a_table_of_head_offsets_follows_the_call_to_its_device() -> None:
    """One model on two GPUs: the second would be handed the first one's memory."""
    table = torch.zeros(2, 4, dtype=torch.int64)
    for device in ("meta", "cpu"):
        q, k = (x.to(device) for x in (Q, K))
        found = resolve(q, k, k, [4, 7], [2, 3], head_offset=table).offsets.table
        assert found is not None and found.device.type == device
        assert resolve(q, k, k, [4, 7], [2, 3], head_offset=table).offsets.table is found


def test_a_table_made_under_inference_mode_is_read_each_time() -> None:
    """Inference tensors count no edits: the first content would be kept for good."""
    with torch.inference_mode():
        table = torch.tensor([[0, 1, 2, 0]])
        first = resolve(Q, K, K, 7, 3, head_offset=table).offsets.rows
        table.fill_(1)
        assert (first, resolve(Q, K, K, 7, 3, head_offset=table).offsets.rows) == (((0, 1, 2, 0),), ((1, 1, 1, 1),))


def test_threads_do_not_share_options() -> None:
    """A server that runs one model deterministically would switch the others, and their results with them."""
    cases = (PLAIN, EVERYTHING)
    expected = [run(case, make_inputs(case)) for case in cases]
    together = threading.Barrier(2, timeout=60)
    failures: list[BaseException] = []

    def work(place: int) -> None:
        case, wanted = cases[place], bool(place)
        inputs = make_inputs(case)
        try:
            for _ in range(5):
                with dap.options(deterministic=wanted):
                    together.wait()
                    found = dap.explain(*inputs[:3], **arguments(case, inputs))
                    assert found.problem.deterministic is wanted
                    results = run(case, inputs)
                for name in Results._fields:
                    torch.testing.assert_close(getattr(results, name), getattr(expected[place], name))
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_torch_says_whether_atomics_are_allowed() -> None:
    """`torch.use_deterministic_algorithms` must reach the plan, and `options` go before it."""
    torch.use_deterministic_algorithms(True)
    try:
        assert dap.explain(**GIVEN).problem.deterministic
        with dap.options(deterministic=False):
            assert not dap.explain(**GIVEN).problem.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert not dap.explain(**GIVEN).problem.deterministic
