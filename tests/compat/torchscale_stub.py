"""The interface of torchscale that `compat.torchscale` relies on: its modules' names, their attributes, and calls.

torchscale itself needs fairscale, timm and flash-attn. What is stated here was read in its code at commit 4d1e0e8, and
is all that a swap may touch; there is no attention in it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def config(**departing: Any) -> SimpleNamespace:
    """The fields of `EncoderConfig` and `DecoderConfig` that are read, with sizes that divide nothing."""
    fields: dict[str, Any] = {
        "embed_dim": 40,
        "heads": 5,
        "layers": 2,
        "attention_dropout": 0.0,
        "segment_length": [10, 24],
        "dilated_ratio": [2, 3],
        "multiway": False,
        "layernorm_eps": 1e-5,
        "subln": True,
        "xpos_rel_pos": False,
        "xpos_scale_base": 512,
        "seq_parallel": False,
        "flash_attention": True,
    }
    return SimpleNamespace(**fields | departing)


class XPOS(nn.Module):
    def __init__(self, head_dim: int, scale_base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale_base = scale_base
        self.register_buffer("scale", (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim))


class MultiwayNetwork(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.A = module
        self.B = copy.deepcopy(module)
        self.B.reset_parameters()
        self.split_position = -1

    def forward(self, x: Tensor) -> Tensor:
        if self.split_position == -1:
            return self.A(x)
        return torch.cat([self.A(x[:, : self.split_position]), self.B(x[:, self.split_position :])], dim=1)


class MultiheadAttention(nn.Module):
    def __init__(
        self,
        args: SimpleNamespace,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        subln: bool = False,
    ) -> None:
        super().__init__()
        self.args = args
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention

        def wrapped(module: nn.Module) -> nn.Module:
            return MultiwayNetwork(module) if args.multiway else module

        self.k_proj = wrapped(nn.Linear(embed_dim, embed_dim))
        self.v_proj = wrapped(nn.Linear(embed_dim, embed_dim))
        self.q_proj = wrapped(nn.Linear(embed_dim, embed_dim))
        self.out_proj = wrapped(nn.Linear(embed_dim, embed_dim))
        norm = subln and self_attention
        self.inner_attn_ln = wrapped(nn.LayerNorm(embed_dim, eps=args.layernorm_eps)) if norm else None
        self.dropout_module = nn.Dropout(dropout)
        self.xpos = XPOS(self.head_dim, args.xpos_scale_base) if args.xpos_rel_pos and self_attention else None


class DilatedAttention(MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        raise AssertionError("flash-attn is not installed")


class Layer(nn.Module):
    """`LongNetEncoderLayer` and `LongNetDecoderLayer`: how they build and call their attention."""

    def __init__(self, args: SimpleNamespace, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.self_attn = DilatedAttention(
            args,
            args.embed_dim,
            args.heads,
            dropout=args.attention_dropout,
            self_attention=True,
            encoder_decoder_attention=False,
            subln=args.subln,
        )

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        decoder = {"is_first_step": False, "is_causal": True} if self.causal else {}
        y, _ = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=padding,
            attn_mask=None,
            rel_pos=None,
            incremental_state=None,
            **decoder,
        )
        return x + y


class LongNet(nn.Module):
    """`LongNetEncoder`, which makes a padding mask where it is given none, or `LongNetDecoder`, which does not."""

    def __init__(self, args: SimpleNamespace, causal: bool = False) -> None:
        super().__init__()
        self.args = args
        self.causal = causal
        self.layers = nn.ModuleList([Layer(args, causal) for _ in range(args.layers)])

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        if padding is None and not self.causal:
            padding = torch.zeros(x.shape[:2]).bool()
        for layer in self.layers:
            x = layer(x, padding)
        return x
