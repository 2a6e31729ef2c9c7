"""`HilbertAttentionCore` and the launchers: what they compute, take, refuse and keep."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.kernels import (
    HilbertAttentionCore,
    auto_branches,
    hilbert_attention_kernel,
    standard_attention_kernel,
)
from dilated_attention_pytorch.kernels.vectorized import vectorized_attention

BACKWARDS = pytest.mark.parametrize("custom", [True, False], ids=["custom", "formula"])
FORMS: dict[str, dict[str, Any]] = {
    "dilated": {"segment_lengths": [16], "dilation_rates": [3]},
    "even": {"segment_lengths": [7], "dilation_rates": [1]},
    "several branches": {"segment_lengths": [16, 40, 99], "dilation_rates": [3, 5, 1]},
    "causal": {"segment_lengths": [16, 40], "dilation_rates": [3, 4], "is_causal": True},
    "masked": {"segment_lengths": [16], "dilation_rates": [3], "masked": True},
    "causal, masked, several branches": {
        "segment_lengths": [16, 40],
        "dilation_rates": [3, 20],
        "is_causal": True,
        "masked": True,
    },
}


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("order", ["hilbert", None])
@pytest.mark.parametrize("form", FORMS)
def test_formula_against_the_oracle(form: str, order: str | None, kv_heads: int) -> None:
    """A debugging aid that computes another attention, or attends to what fills up the last segment."""
    torch.manual_seed(0)
    q, k, v = double(2, 63, 4, 8), double(2, 63, kv_heads, 8), double(2, 63, kv_heads, 8)
    given = dict(FORMS[form])
    if given.pop("masked", False):
        mask = torch.rand(2, 63) > 0.4
        mask[1] = False
        given["key_padding_mask"] = mask
    curve = None if order is None else dap.TokenOrder(order)
    out = vectorized_attention(q, k, v, order=curve, **given)
    tokens = None if curve is None else curve.indices(63)
    wanted, _ = reference.dilated_attention(q, k, v, queries="all", head_offset="zero", order=tokens, **given)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    mine, true = (torch.autograd.grad(result, (q, k, v), dout) for result in (out, wanted))
    for actual, expected in zip(mine, true, strict=True):
        torch.testing.assert_close(actual, expected)


@BACKWARDS
def test_gradcheck(custom: bool) -> None:
    """The error of the code that the client's documents describe: forward and backward permute different tensors."""
    torch.manual_seed(0)
    core = HilbertAttentionCore(4, 2, [5, 20], [2, 3], use_custom_backward=custom, order="hilbert", dtype=torch.float64)
    x = double(1, 11, 4)

    def attend(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        return torch.func.functional_call(core, {"qkv_proj.weight": qkv, "out_proj.weight": out}, (x,))

    assert torch.autograd.gradcheck(attend, (x, core.qkv_proj.weight, core.out_proj.weight))


@pytest.mark.parametrize("use_hilbert", [True, False])
@BACKWARDS
def test_module_along_a_curve(custom: bool, use_hilbert: bool) -> None:
    """A swapped direction, which a snake hides, or an order that the flag does not switch off."""
    torch.manual_seed(0)
    core = HilbertAttentionCore(24, 3, 16, 3, use_custom_backward=custom, order="hilbert", dtype=torch.float64)
    x = double(2, 63, 24)
    q, k, v = core.qkv_proj(x).unflatten(2, (3, 3, 8)).unbind(2)
    order = dap.TokenOrder("hilbert").indices(63) if use_hilbert else None
    out, _ = reference.dilated_attention(q, k, v, [16], [3], queries="all", head_offset="zero", order=order)
    torch.testing.assert_close(core(x, use_hilbert=use_hilbert), core.out_proj(out.flatten(2)))


@pytest.mark.parametrize("kernel", [hilbert_attention_kernel, standard_attention_kernel])
def test_launchers(kernel: Callable[..., Tensor]) -> None:
    """A launcher that leaves its order, its scale or a dilation rate out, or that pretends to have a gradient."""
    q, k, v = double(2, 61, 3, 8), double(2, 61, 3, 8), double(2, 61, 3, 8)
    order = torch.randperm(61) if kernel is hilbert_attention_kernel else None
    maps = () if order is None else (order.int(),)
    out = kernel(q, k, v, *maps, 16, 3, scale=0.7)
    wanted, _ = reference.dilated_attention(
        q, k, v, [16], [3], queries="all", head_offset="zero", order=order, scale=0.7
    )
    torch.testing.assert_close(out, wanted.detach())
    assert not out.requires_grad


def test_parameters_keep_their_names() -> None:
    """A checkpoint of the client's that no longer loads."""
    shapes = {name: tuple(tensor.shape) for name, tensor in HilbertAttentionCore(24, 3).state_dict().items()}
    assert shapes == {"qkv_proj.weight": (72, 24), "out_proj.weight": (24, 24)}


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0)])
@BACKWARDS
def test_any_leading_dimensions(custom: bool, leading: tuple[int, ...]) -> None:
    """Hidden states without a batch, with more dimensions, or none at all, are refused or mixed up."""
    core = HilbertAttentionCore(24, 3, 16, 2, use_custom_backward=custom)
    x = torch.randn(*leading, 37, 24)
    mask = torch.rand(*leading, 37) > 0.3
    mask[..., 0] = True
    out = core(x, key_padding_mask=mask)
    assert out.shape == x.shape
    each = [
        core(a[None], key_padding_mask=b[None])[0] for a, b in zip(x.view(-1, 37, 24), mask.view(-1, 37), strict=True)
    ]
    torch.testing.assert_close(out, torch.stack(each).view(x.shape) if each else out)


@pytest.mark.parametrize("length", [0, 1])
@BACKWARDS
def test_short_sequences(custom: bool, length: int) -> None:
    """Nothing to attend to, or one token, which attends to itself."""
    core = HilbertAttentionCore(24, 3, use_custom_backward=custom)
    x = torch.randn(2, length, 24, requires_grad=True)
    out = core(x)
    torch.testing.assert_close(out, core.out_proj(core.qkv_proj(x)[..., 48:]))
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({"segment_size": 16, "dilation_rate": 3}, {}),
        ({"segment_size": 128, "dilation_rate": 3}, {"segment_size": 16}),
        ({"segment_size": 16}, {"dilation_rate": 3}),
        ({}, {"segment_size": (16,), "dilation_rate": [3]}),
        ({"segment_size": "auto"}, {"segment_size": 16, "dilation_rate": 3}),
    ],
)
def test_a_call_s_own_branches(made: dict[str, Any], asked: dict[str, Any]) -> None:
    """An override that is forgotten, or that sticks."""
    torch.manual_seed(0)
    x = torch.randn(2, 61, 24)
    core = HilbertAttentionCore(24, 3, **made)
    wanted = HilbertAttentionCore(24, 3, 16, 3)
    wanted.load_state_dict(core.state_dict())
    before = core(x)
    torch.testing.assert_close(core(x, **asked), wanted(x))
    torch.testing.assert_close(core(x), before)


def test_auto_at_construction_and_at_a_call() -> None:
    """A word that is taken for another rule than the documented one, or that keeps the module's dilation rate."""
    x = torch.randn(1, 1100, 8)
    core = HilbertAttentionCore(8, 1, "auto")
    lengths, rates = auto_branches(1100)
    wanted = core(x, segment_size=lengths, dilation_rate=rates)
    torch.testing.assert_close(core(x), wanted)
    other = HilbertAttentionCore(8, 1, 16, 3)
    other.load_state_dict(core.state_dict())
    torch.testing.assert_close(other(x, segment_size="auto"), wanted)


@pytest.mark.parametrize(("segments", "rates"), [([16, 40], 3), (16, [3, 5]), ([16, 40], [3])])
def test_a_single_value_goes_with_all(segments: Any, rates: Any) -> None:
    """Several segment sizes at one dilation rate take only the first."""
    x = torch.randn(1, 61, 24)
    core = HilbertAttentionCore(24, 3, segments, rates)
    wanted = HilbertAttentionCore(24, 3, [16, 40] if segments != 16 else [16, 16], [3, 5] if segments == 16 else [3, 3])
    wanted.load_state_dict(core.state_dict())
    torch.testing.assert_close(core(x), wanted(x))


@BACKWARDS
def test_dropout_is_for_training(custom: bool) -> None:
    """Weights that are dropped in evaluation, or never: the client's core dropped none."""
    core = HilbertAttentionCore(24, 3, 16, dropout=0.5, use_custom_backward=custom)
    x = torch.randn(2, 61, 24)
    trained, again = core(x), core(x)
    assert not torch.allclose(trained, again)
    core.eval()
    evaluated, again = core(x), core(x)
    assert torch.equal(evaluated, again)
    assert not torch.allclose(trained, evaluated)
    assert evaluated.requires_grad


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"hidden_dim": 50}, "hidden_dim must be a multiple of num_heads, got 50 and 4"),
        ({"num_heads": 0}, "hidden_dim must be a multiple of num_heads, got 48 and 0"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in [0, 1), got -0.1"),
        ({"segment_size": 0}, "segment_size must be a positive integer, a sequence of them or 'auto', got 0"),
        ({"segment_size": "automatic"}, "or 'auto', got 'automatic'"),
        ({"segment_size": []}, "got []"),
        ({"dilation_rate": 1.5}, "dilation_rate must be a positive integer, a sequence of them, got 1.5"),
        ({"dilation_rate": True}, "got True"),
        ({"segment_size": [1, 2], "dilation_rate": [1, 2, 3]}, "as many, or one of them single; got (1, 2) and"),
        ({"segment_size": "auto", "dilation_rate": 2}, "leave dilation_rate at 1, got 2"),
        ({"order": "row"}, "order must be 'snake', 'hilbert'"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], sentence: str) -> None:
    """A mistake that shows at the first batch, or never."""
    with pytest.raises(ArgumentError, match=re.escape(sentence)):
        HilbertAttentionCore(**{"hidden_dim": 48, "num_heads": 4, **arguments})


@pytest.mark.parametrize("shape", [(24,), (2, 7, 23)])
def test_hidden_states_of_another_shape(shape: tuple[int, ...]) -> None:
    """A matrix product's message about shapes that the caller never wrote."""
    with pytest.raises(ArgumentError, match=r"x must have shape \(\.\.\., N, 24\)"):
        HilbertAttentionCore(24, 3)(torch.randn(shape))


def test_mask_of_another_shape() -> None:
    """A mask that is broadcast over the batch, or laid out otherwise."""
    with pytest.raises(ArgumentError, match=r"key_padding_mask must have shape \(2, 7\)"):
        HilbertAttentionCore(24, 3)(torch.randn(2, 7, 24), key_padding_mask=torch.ones(7, dtype=torch.bool))


def test_odd_head_dims_run() -> None:
    """hidden_dim 30 in 3 heads: no kernel takes it, so the torch backend has to."""
    core = HilbertAttentionCore(30, 3, 16, 3)
    x = torch.randn(1, 40, 30)
    out = core(x)
    core.use_custom_backward = False
    torch.testing.assert_close(out, core(x))
