"""`MultiheadDilatedAttention`: its names are those of the package of the same name, its function the paper's."""

from __future__ import annotations

import pytest
import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference

from ..tolerances import TOLERANCES, check

SIZES = {"embed_dim": 48, "num_heads": 6, "dilation_rates": [2, 3], "segment_lengths": [16, 40]}
LINEAR = [f"{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_the_state_dict_is_the_peers() -> None:
    """A checkpoint that does not load."""
    out = ["out_proj.weight", "out_proj.bias"]
    assert list(dap.MultiheadDilatedAttention(**SIZES).state_dict()) == [*LINEAR, "norm.weight", "norm.bias", *out]
    bare = dap.MultiheadDilatedAttention(**SIZES, bias=False, layer_norm=False).state_dict()
    assert list(bare) == ["q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"]
    assert {weight.shape for weight in bare.values()} == {(48, 48)}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_output_and_gradients_are_the_formulas(layer_norm: bool) -> None:
    """Projections that change places, heads that are laid out otherwise, a norm on the wrong side of out_proj."""
    module = dap.MultiheadDilatedAttention(**SIZES, layer_norm=layer_norm, dtype=torch.float64)
    query, key, value = (torch.randn(2, 61, 48, dtype=torch.float64, requires_grad=True) for _ in range(3))
    inputs = (query, key, value, *module.parameters())
    out, weights = module(query, key, value, is_causal=True)
    assert weights is None

    q = module.q_proj(query).view(2, 61, 6, 8)
    k = module.k_proj(key).view(2, 61, 6, 8)
    v = module.v_proj(value).view(2, 61, 6, 8)
    want, _ = reference.dilated_attention(q, k, v, [16, 40], [2, 3], is_causal=True)
    want = want.reshape(2, 61, 48)
    want = module.out_proj(want if module.norm is None else module.norm(want))
    check("out", out, want, TOLERANCES["fp64"].out)
    dout = torch.randn_like(out)
    gradients = zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True)
    for index, (ours, theirs) in enumerate(gradients):
        check(f"gradient {index}", ours, theirs, TOLERANCES["fp64"].grad, floor=1e-12)


def test_dropout_reaches_the_attention() -> None:
    """A rate that is taken and never used."""
    assert dap.MultiheadDilatedAttention(**SIZES, dropout=0.2).attention.dropout_p == 0.2


def test_the_gain_is_for_value_and_output() -> None:
    """MAGNETO's gain on the queries: the scores, not the residual stream, would change scale."""
    module = dap.MultiheadDilatedAttention(192, 6, [1], [64], gamma_init=3.0)
    usual = (2 / (192 + 192)) ** 0.5
    for name, gain in (("q", 1.0), ("k", 1.0), ("v", 3.0), ("out", 3.0)):
        projection = getattr(module, f"{name}_proj")
        assert projection.weight.std().item() == pytest.approx(gain * usual, rel=0.05), name
        assert not projection.bias.any()


def test_parameters_lie_where_they_are_asked_for() -> None:
    """A norm that stays in float32 on the CPU beside projections that do not."""
    module = dap.MultiheadDilatedAttention(**SIZES, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_heads_that_do_not_divide_are_refused() -> None:
    """An error from deep inside a reshape, at the first batch."""
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 48 and 5"):
        dap.MultiheadDilatedAttention(48, 5, [1], [16])
