"""Dilated attention as an attention implementation of Hugging Face transformers (5 or newer).

    from dilated_attention_pytorch.compat import transformers as hf

    hf.register(segment_lengths=[2048, 8192], dilation_rates=[1, 4])
    model = AutoModel.from_config(config, attn_implementation="dilated_attention")

It serves self-attention over whole sequences, causal or not, with padding, grouped key/value heads and dropout. What it
cannot honour (a key/value cache in use, sliding windows, masks of other shapes, …) is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import MissingPackageError, UnsupportedError
from ..order import TokenOrder
from ..runtime.api import dilated_attention

REFUSED = {
    "sliding_window": "a sliding window; set config.sliding_window = None",
    "position_bias": "a bias of the scores by position",
    "softcap": "capped scores (softcap)",
    "s_aux": "attention sinks",
    "head_mask": "a mask of heads",
    "cu_seq_lens_q": "packed sequences; give each its own row, with padding",
    "indices": "a choice of keys by index",
    "block_indices": "a choice of keys by block",
    "cache": "a paged cache; use another implementation to generate",
    "output_attentions": "attention weights as an output, which it never computes",
}
"""Keywords with which transformers asks for a different attention, and what they mean."""


def register(
    segment_lengths: int | Sequence[int],
    dilation_rates: int | Sequence[int],
    *,
    name: str = "dilated_attention",
    queries: str = "dilated",
    head_offset: str | Tensor = "cyclic",
    order: str | TokenOrder | Tensor | None = None,
    padding: str = "none",
    mix_grad: str = "exact",
) -> None:
    """Let models be built with `attn_implementation=name`; the model gives mask, causality, scale and dropout.

    Args:
        segment_lengths: As in `dilated_attention`, as are all but `name`.
        dilation_rates: r of each branch.
        name: What models call it; the same name again replaces what it meant, for models that are built already too.
        queries: "dilated" or "all".
        head_offset: First step that each head keeps.
        order: Sequence in which tokens are visited.
        padding: "none" or "zeros".
        mix_grad: "exact" or "detached".

    Raises:
        MissingPackageError: transformers is not installed, or older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    except ImportError as error:
        raise MissingPackageError("this needs transformers 5 or newer: pip install 'transformers>=5'") from error
    attend = partial(
        dilated_attention,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        queries=queries,
        head_offset=head_offset,
        order=order,
        padding=padding,
        mix_grad=mix_grad,
    )
    AttentionInterface.register(name, partial(attention_forward, attend))
    AttentionMaskInterface.register(name, partial(padding_mask, (causal_mask_function, bidirectional_mask_function)))


def attention_forward(
    attend: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        attend: `dilated_attention` with its branches.
        module: The layer's attention module.
        query: (B, H, N, D).
        key: (B, G, N, D).
        value: (B, G, N, D).
        attention_mask: What `padding_mask` returned: (B, N) bool, True = take part.
        scaling: Factor of the scores.
        dropout: Probability with which an attention weight is dropped; 0 outside of training.
        is_causal: Drop keys of later tokens; None asks the module.
        others: Everything else that the model was called with.

    Returns:
        (B, N, H, D), and None where other implementations have weights.

    Raises:
        UnsupportedError: The model asks for what this attention cannot honour.
    """
    for keyword, meaning in REFUSED.items():
        if others.get(keyword) is not None and others[keyword] is not False:
            raise UnsupportedError(f"{type(module).__name__} asks dilated attention for {meaning}")
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedError(
            f"{type(module).__name__} belongs to a model with cross-attention, which has no dilated form: set "
            "attn_implementation per part of the model, or to 'sdpa'"
        )
    if query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"{query.shape[2]} queries over {key.shape[2]} keys: dilated attention takes whole sequences and knows no "
            "key/value cache yet; call the model with use_cache=False, or generate with another implementation"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedError(
            f"an attention_mask of shape {tuple(attention_mask.shape)} is not supported: pass padding as (batch, N)"
        )
    out = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        key_padding_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out, None


def padding_mask(
    plain: tuple[Callable[..., Any], ...], *, mask_function: Callable[..., Any], attention_mask: Tensor | None, **_: Any
) -> Tensor | None:
    """What transformers calls once a forward, to make the mask that each layer gets.

    Args:
        plain: The mask functions that say causal and bidirectional, and nothing else.
        mask_function: Which keys a query sees.
        attention_mask: (B, N) bool, True = take part, or None.

    Returns:
        attention_mask as it is: causality is told by `is_causal`.

    Raises:
        UnsupportedError: The model wants a mask that is neither.
    """
    if mask_function not in plain:
        raise UnsupportedError(
            "the model asks for a mask beyond causality and padding (sliding window, chunks, packed sequences, or "
            "overlays), which dilated attention cannot honour; where no sequences are packed (under torch.compile "
            "transformers cannot tell), pass attention_mask"
        )
    return attention_mask
