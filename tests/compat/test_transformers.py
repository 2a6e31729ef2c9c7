"""Hugging Face models with `attn_implementation="dilated_attention"`: eager's numbers where the pattern is dense."""

from __future__ import annotations

import copy
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.compat import transformers as hf
from dilated_attention_pytorch.errors import MissingPackageError, UnsupportedError

from ..tolerances import TOLERANCES, check

N = 29
SIZES = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 6}
TEXT = SIZES | {"vocab_size": 19, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The package, with a dense pattern registered as "dense" and a dilated one under the usual name."""
    package = pytest.importorskip("transformers")
    hf.register([N], [1], name="dense")
    hf.register([8, 16], [1, 3])
    return package


def attention(module: Any, *arguments: Any, **more: Any) -> tuple[Tensor, None]:
    """What a model calls in each layer, without transformers."""
    attend = partial(dap.dilated_attention, segment_lengths=[8], dilation_rates=[1])
    return hf.attention_forward(attend, module, *arguments, **more)


def pair(model_class: Any, config: Any) -> tuple[Any, Any]:
    """A model in float64 with eager attention, and one of the same weights with the dense pattern."""
    eager = model_class(config).double()
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("dense")
    # A configuration that both share would compare a model with itself.
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", "dense")
    return eager, ours


def same(eager: Any, ours: Any, kept: Tensor, to_eager: dict[str, Any] | None = None, **inputs: Any) -> None:
    """Equal hidden states at the tokens that are kept, and equal gradients of all parameters.

    Eager's softmax is float32 in every dtype.
    """
    want, out = eager(**inputs | (to_eager or {}))[0][kept], ours(**inputs)[0][kept]
    check("out", out, want, TOLERANCES["fp32"].out)
    dout = torch.randn_like(out)
    named = [(name, p) for name, p in eager.named_parameters() if "pooler" not in name]
    expected = torch.autograd.grad(want, [p for _, p in named], dout)
    found = torch.autograd.grad(out, [ours.get_parameter(name) for name, _ in named], dout)
    for (name, _), theirs, gradient in zip(named, expected, found, strict=True):
        check(name, gradient, theirs, TOLERANCES["fp32"].grad, floor=1e-6)


def padded(side: str) -> Tensor:
    """An attention mask (3, N): nothing, a third and all but one token of a sequence are padding."""
    lengths = torch.tensor([N, 20, 1])[:, None]
    steps = torch.arange(N)
    return ((steps < lengths) if side == "right" else (steps >= N - lengths)).long()


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_a_decoder_equals_eager(transformers: Any, side: str) -> None:
    """Heads and tokens exchanged, grouped heads read in another order, a future or a padding that is seen."""
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    mask = torch.ones(3, N, dtype=torch.long) if side == "none" else padded(side)
    ids = torch.randint(0, 19, (3, N))
    given = {} if side == "none" else {"attention_mask": mask}
    same(*pair(transformers.LlamaModel, config), mask.bool(), input_ids=ids, **given)


def test_a_decoder_may_look_both_ways(transformers: Any) -> None:
    """Causality of the module where the call says otherwise."""
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=6)
    ids = torch.randint(0, 19, (3, N))
    mask = padded("right").bool()
    of_pairs = torch.zeros(3, 1, N, N).double().masked_fill(~mask[:, None, None, :], -1e9)
    eager, ours = pair(transformers.LlamaModel, config)
    same(eager, ours, mask, {"attention_mask": of_pairs}, input_ids=ids, attention_mask=mask, is_causal=False)


def test_an_encoder_equals_eager(transformers: Any) -> None:
    """An encoder that is made causal, or that attends to padding."""
    config = transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ids = torch.randint(0, 19, (3, N))
    mask = padded("right")
    same(*pair(transformers.BertModel, config), mask.bool(), input_ids=ids, attention_mask=mask)


def test_an_image_encoder_equals_eager(transformers: Any) -> None:
    """A model that makes no mask at all."""
    config = transformers.ViTConfig(**SIZES, image_size=20, patch_size=4)  # 25 patches and a class token
    kept = torch.ones(2, 26, dtype=torch.bool)
    same(*pair(transformers.ViTModel, config), kept, pixel_values=torch.randn(2, 3, 20, 20).double())


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_layer_is_the_oracle(transformers: Any, is_causal: bool) -> None:
    """Rules, scale or mask that do not arrive, or an output in transformers' input layout."""
    branches = [8, 16], [1, 3]
    rules: dict[str, Any] = {"head_offset": "blocked", "queries": "all", "padding": "zeros", "mix_grad": "detached"}
    hf.register(*branches, name="ruled", order="hilbert", **rules)
    q, k, v = (torch.randn(3, heads, N, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    mask = padded("left").bool()
    out, weights = transformers.AttentionInterface()["ruled"](
        SimpleNamespace(is_causal=is_causal), q, k, v, mask, scaling=0.3, dropout=0.0, use_cache=False
    )
    assert weights is None
    rules |= {"order": dap.TokenOrder("hilbert").indices(N), "scale": 0.3, "is_causal": is_causal}
    q_k_v = (x.transpose(1, 2) for x in (q, k, v))
    want, _ = reference.dilated_attention(*q_k_v, *branches, key_padding_mask=mask, **rules)
    check("out", out, want, TOLERANCES["fp64"].out)
    dout = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, (q, k, v), dout) for y in (out, want))
    for name, ours, theirs in zip("qkv", found, expected, strict=True):
        check(f"d{name}", ours, theirs, TOLERANCES["fp64"].grad)


def test_each_name_has_its_own_pattern(transformers: Any) -> None:
    """Registering a second pattern that changes models of the first."""
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 19, (1, N))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 19
    for name, reaches in (("dense", True), ("short", False), ("dense", True)):
        hf.register([8], [1], name="short")
        model.set_attn_implementation(name)
        with torch.no_grad():
            last = [model(tokens).last_hidden_state[0, -1] for tokens in (ids, other)]
        assert torch.equal(*last) is not reaches, name


def test_dropout_is_for_training(transformers: Any) -> None:
    """A rate that does not arrive, or that stays on in evaluation."""
    config = transformers.LlamaConfig(**TEXT, attention_dropout=0.4, attn_implementation="dilated_attention")
    model = transformers.LlamaModel(config)
    ids = torch.randint(0, 19, (1, N))
    with torch.no_grad():
        first, second = (model(ids).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_generation_with_a_cache_is_refused(transformers: Any) -> None:
    """One query over many keys that is taken for a sequence of one token."""
    config = transformers.LlamaConfig(**TEXT, eos_token_id=None, attn_implementation="dilated_attention")
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 19, (1, N))
    with pytest.raises(UnsupportedError, match=f"1 queries over {N + 1} keys: .* use_cache=False"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (1, N + 2)


def test_masks_of_other_shapes_are_refused(transformers: Any) -> None:
    """A window, packed sequences or a mask of pairs that is silently left out."""
    ids = torch.randint(0, 19, (1, N))
    sliding = transformers.MistralConfig(**TEXT, sliding_window=8, attn_implementation="dilated_attention")
    with pytest.raises(UnsupportedError, match="a mask beyond causality and padding"):
        transformers.MistralModel(sliding)(ids)

    model = transformers.LlamaModel(transformers.LlamaConfig(**TEXT, attn_implementation="dilated_attention"))
    packed = torch.cat([torch.arange(12), torch.arange(N - 12)])[None]
    with pytest.raises(UnsupportedError, match="packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(UnsupportedError, match=r"an attention_mask of shape \(1, 1, 29, 29\)"):
        model(ids, attention_mask=torch.zeros(1, 1, N, N))


@pytest.mark.parametrize("keyword", hf.REFUSED)
def test_another_attention_is_refused(keyword: str) -> None:
    """Sinks, biases or caps that a model was trained with, left out without a word; absent ones that are refused."""
    q = torch.randn(1, 2, N, 8)
    module = SimpleNamespace(is_causal=True)
    for absent in (None, False):
        attention(module, q, q, q, None, **{keyword: absent})
    for present in (torch.zeros(N), True, 3):
        with pytest.raises(UnsupportedError, match="SimpleNamespace asks dilated attention for"):
            attention(module, q, q, q, None, **{keyword: present})


@pytest.mark.parametrize("field", ["is_encoder_decoder", "add_cross_attention"])
def test_cross_attention_is_refused(field: str) -> None:
    """Where both sequences are as long, the keys' padding would be taken for that of the queries."""
    q = torch.randn(1, 2, N, 8)
    module = SimpleNamespace(is_causal=False, config=SimpleNamespace(**{field: True}))
    with pytest.raises(UnsupportedError, match="a model with cross-attention"):
        attention(module, q, q, q, None)


@pytest.mark.parametrize("found", [None, SimpleNamespace()], ids=["absent", "old"])
def test_without_transformers_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """An error that names a module nobody asked for."""
    monkeypatch.setitem(sys.modules, "transformers", found)
    with pytest.raises(MissingPackageError, match="pip install 'transformers>=5'"):
        hf.register([8], [1])
