"""torchscale's models on this package: the same names and weights, the function that they were trained with."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.compat import torchscale
from dilated_attention_pytorch.errors import UnsupportedError

from ..tolerances import TOLERANCES, check
from . import torchscale_stub as stub

N = 37


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tokens(args: SimpleNamespace, dtype: torch.dtype = torch.float64) -> Tensor:
    """Hidden states (2, N, embed_dim)."""
    return torch.randn(2, N, args.embed_dim, dtype=dtype)


def last_padded() -> Tensor:
    """torchscale's padding mask (2, N), True = padding: the second sequence has 30 tokens."""
    padding = torch.zeros(2, N, dtype=torch.bool)
    padding[1, 30:] = True
    return padding


def rotated(x: Tensor, sign: int, base: float = 512) -> Tensor:
    """xPos of (B, N, H, D) as what it is: a complex factor by position and pair of dimensions."""
    half = x.shape[3] // 2
    pair, step = torch.arange(half).double(), torch.arange(x.shape[1]).double()
    decay = (2 * pair + 0.8 * half) / (2.8 * half)
    size = decay ** (sign * (step - math.ceil(x.shape[1] / 2)) / base)[:, None]
    factor = torch.polar(size, torch.outer(step, 10000 ** (-pair / half)))
    turned = torch.view_as_complex(x.double().unflatten(-1, (half, 2)).contiguous()) * factor[:, None, :]
    return torch.view_as_real(turned).flatten(-2)


def formula(
    module: Any, query: Tensor, mix_grad: str, key: Tensor | None = None, value: Tensor | None = None, **how: Any
) -> Tensor:
    """What a layer's attention means, on the oracle; self-attention unless keys and values are given."""
    inputs = {"q": query, "k": query if key is None else key, "v": query if value is None else value}
    q, k, v = (getattr(module, f"{name}_proj")(x).unflatten(-1, (module.num_heads, -1)) for name, x in inputs.items())
    if module.xpos is not None:
        q, k = rotated(q, 1), rotated(k, -1)
    branches = module.args.segment_length, module.args.dilated_ratio
    rules = {"head_offset": "blocked", "padding": "zeros", "mix_grad": mix_grad}
    out, _ = reference.dilated_attention(q, k, v, *branches, **rules, **how)
    out = out.flatten(-2).to(query.dtype)
    return module.out_proj(out if module.inner_attn_ln is None else module.inner_attn_ln(out))


@pytest.mark.parametrize("mix_grad", ["detached", "exact"])
@pytest.mark.parametrize(
    ("departing", "is_causal", "padded"),
    [
        ({}, False, False),
        ({"multiway": True, "subln": False}, False, True),
        ({"segment_length": [10, 24, 300], "dilated_ratio": [1, 4, 7]}, True, False),
    ],
    ids=["plain", "multiway-padding", "causal"],
)
def test_the_attention_is_torchscales(departing: dict[str, Any], is_causal: bool, padded: bool, mix_grad: str) -> None:
    """Weights under another rule of offsets or padding, a padding mask read the wrong way round, another gradient."""
    args = stub.config(layers=1, **departing)
    model = stub.LongNet(args, is_causal).double()
    torchscale.use_in(model, mix_grad=mix_grad)
    attention = model.layers[0].self_attn
    for module in model.modules():
        if hasattr(module, "split_position"):
            module.split_position = 13
    x = tokens(args).requires_grad_()
    padding = last_padded() if padded else None
    kept = None if padding is None else ~padding

    out = model(x, padding)
    want = x + formula(attention, x, mix_grad, is_causal=is_causal, key_padding_mask=kept)
    check("out", out, want, TOLERANCES["fp64"].out)
    leaves = dict(model.named_parameters(), x=x)
    dout = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, [*leaves.values()], dout) for y in (out, want))
    for name, ours, theirs in zip(leaves, found, expected, strict=True):
        check(name, ours, theirs, TOLERANCES["fp64"].grad, floor=1e-12)


def test_a_swap_keeps_what_others_hold() -> None:
    """New parameters under the optimizer's feet, lost hooks, renamed weights, layers that are forgotten."""
    args = stub.config(layers=3, xpos_rel_pos=True)
    model = stub.LongNet(args, causal=True).eval()
    names, held = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    calls: list[str] = []
    model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append("hook"))

    assert torchscale.use_in(model) == 3
    assert list(model.state_dict()) == names
    assert all(ours is theirs for ours, theirs in zip([*model.parameters(), *model.buffers()], held, strict=True))
    assert not any(module.training for module in model.modules())
    x = tokens(args, torch.float32)
    assert model(x).isfinite().all()
    assert calls == ["hook"]
    assert torchscale.use_in(model) == 0
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_model_trains_without_flash_attn() -> None:
    """A parameter without a gradient, or gradients that lead nowhere, on a CPU in float32."""
    args = stub.config()
    model = stub.LongNet(args)
    torchscale.use_in(model)
    x, target = tokens(args, torch.float32), torch.randn(2, N, args.embed_dim)
    losses = []
    for _ in range(4):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= gradient
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_is_for_training() -> None:
    """torchscale hands its rate to flash-attn in evaluation too."""
    args = stub.config(attention_dropout=0.4)
    model = stub.LongNet(args).double()
    torchscale.use_in(model)
    x = tokens(args)
    dropped, plain = model(x), model.eval()(x)
    args.attention_dropout = 0.0
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    assert torch.equal(plain, model(x))
    assert not torch.allclose(dropped, plain)


@pytest.mark.parametrize("multiway", [False, True])
@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("subln", [False, True])
def test_a_new_module_has_torchscales_names(multiway: bool, xpos: bool, subln: bool) -> None:
    """A checkpoint that does not load into a model that is built here; keys or values made of another input."""
    args = stub.config(multiway=multiway, xpos_rel_pos=xpos)
    theirs = stub.DilatedAttention(args, 40, 5, self_attention=True, subln=subln)
    ours = torchscale.DilatedAttention(args, 40, 5, self_attention=True, subln=subln)
    ours.load_state_dict(theirs.state_dict())
    torchscale.use_in(swapped := nn.ModuleList([theirs]))
    x = tokens(args, torch.float32)
    assert torch.equal(ours(x, x, x)[0], swapped[0](x, x, x)[0])
    out, weights = ours(x, -x, 2 * x)
    assert weights is None
    check("out", out, formula(ours, x, "detached", key=-x, value=2 * x), TOLERANCES["fp32"].out)


def test_cross_attention_has_neither_norm_nor_positions() -> None:
    """Parameters that torchscale's module of that kind does not have."""
    args = stub.config(xpos_rel_pos=True)
    theirs = stub.DilatedAttention(args, 40, 5, encoder_decoder_attention=True, subln=True)
    ours = torchscale.DilatedAttention(args, 40, 5, encoder_decoder_attention=True, subln=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="exactly one of self_attention and encoder_decoder_attention"):
        torchscale.DilatedAttention(args, 40, 5)


@pytest.mark.parametrize("length", [8, N])
def test_positions_turn_and_decay_as_in_torchscale(length: int) -> None:
    """Another middle of the sequence, halves for pairs, or keys that decay where they should grow."""
    x = torch.randn(2, length, 3, 24, dtype=torch.float64)
    xpos = torchscale.XPos(24, 100)
    check("queries", xpos(x), rotated(x, 1, 100), TOLERANCES["fp32"].out)
    check("keys", xpos(x, downscale=True), rotated(x, -1, 100), TOLERANCES["fp32"].out)


def test_positions_survive_bfloat16() -> None:
    """Angles in the model's dtype: from position 256 on, bfloat16 skips integers."""
    x = torch.randn(1, 5000, 1, 16).bfloat16()
    out = torchscale.XPos(16).bfloat16()(x)
    assert out.dtype == torch.bfloat16
    check("queries", out, rotated(x, 1), TOLERANCES["bf16"].out)


def test_branches_may_be_strings() -> None:
    """What an argument parser gives; torchscale's own configuration evaluates it."""
    lists, strings = stub.config(), stub.config(segment_length="[10,24]", dilated_ratio="[2, 3]")
    module = torchscale.DilatedAttention(lists, 40, 5, self_attention=True)
    x = tokens(lists, torch.float32)
    want = module(x, x, x)[0]
    module.args = strings
    assert torch.equal(module(x, x, x)[0], want)
    for wrong in ("[10; 24]", None):
        module.args = stub.config(segment_length=wrong)
        with pytest.raises(ValueError, match="segment_length must be a list of integers, got"):
            module(x, x, x)


@pytest.mark.parametrize("segment_length", ["[10,24]", [10, 24]], ids=type)
def test_it_compiles_without_a_graph_break(segment_length: str | list[int]) -> None:
    """A configuration or a position that the compiler cannot see through."""
    args = stub.config(segment_length=segment_length, multiway=True, xpos_rel_pos=True)
    module = torchscale.DilatedAttention(args, 40, 5, self_attention=True, subln=True).double()
    x = tokens(args)
    out, _ = torch.compile(module, backend="eager", fullgraph=True)(x, x, x, key_padding_mask=last_padded())
    assert torch.equal(out, module(x, x, x, key_padding_mask=last_padded())[0])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"incremental_state": {}}, "incremental decoding"),
        ({"attn_mask": torch.zeros(N, N)}, "attn_mask is not supported: causality is is_causal=True"),
        ({"rel_pos": torch.zeros(5, N, N)}, "rel_pos is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(argument: dict[str, Any], sentence: str) -> None:
    """A mask or a cache that is silently left out."""
    args = stub.config()
    module = torchscale.DilatedAttention(args, 40, 5, self_attention=True)
    x = tokens(args, torch.float32)
    with pytest.raises(UnsupportedError, match=sentence):
        module(x, x, x, **argument)


def test_sequences_spread_over_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would attend to its own tokens alone, and train on."""
    args = stub.config(seq_parallel=True)
    module = torchscale.DilatedAttention(args, 40, 5, self_attention=True)
    x = tokens(args, torch.float32)
    short = x[:, :20]
    module(short, short, short)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="seq_parallel over 2 ranks"):
        module(short, short, short)
    module(x, x, x)  # no segment reaches beyond a rank's own tokens


@pytest.mark.parametrize("model", [nn.Linear(3, 3), dap.MultiheadDilatedAttention(48, 6, [1], [16])], ids=type)
def test_a_model_without_any_is_refused(model: nn.Module) -> None:
    """A swap that finds nothing and says nothing; our own module of that name taken for torchscale's."""
    with pytest.raises(ValueError, match="holds no torchscale DilatedAttention"):
        torchscale.use_in(model)


def test_a_subclass_is_refused_and_nothing_is_swapped() -> None:
    """What the subclass adds (sharding, say) would be gone without a word."""

    class ShardedDilatedAttention(stub.DilatedAttention):
        pass

    model = stub.LongNet(stub.config())
    model.layers[1].self_attn.__class__ = ShardedDilatedAttention
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn is a ShardedDilatedAttention"):
        torchscale.use_in(model)
    assert type(model.layers[0].self_attn) is stub.DilatedAttention


def test_a_subclass_of_ours_is_left_alone() -> None:
    """A model that was swapped and then sharded, turned back into a plain one."""

    class ShardedDilatedAttention(torchscale.DilatedAttention):
        pass

    model = stub.LongNet(stub.config())
    torchscale.use_in(model)
    model.layers[1].self_attn.__class__ = ShardedDilatedAttention
    assert torchscale.use_in(model, mix_grad="exact") == 0
    assert type(model.layers[1].self_attn) is ShardedDilatedAttention
    assert {layer.self_attn.mix_grad for layer in model.layers} == {"exact"}


def test_a_word_that_is_no_rule_is_refused() -> None:
    """A typing error that would show at the first batch."""
    with pytest.raises(ValueError, match="mix_grad must be 'detached' or 'exact', got 'detach'"):
        torchscale.use_in(stub.LongNet(stub.config()), mix_grad="detach")
