"""torchscale's `DilatedAttention` on this package's kernels: LongNet, LongViT, Prov-GigaPath, with their weights.

Interface and function are those of torchscale/component/dilated_attention.py at commit 4d1e0e8, which Prov-GigaPath
carries unchanged; what differs is listed in docs/peers.md. Neither torchscale, fairscale nor flash-attn is needed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedError
from ..runtime.api import dilated_attention


def use_in(model: nn.Module, *, mix_grad: str = "detached") -> int:
    """Let every dilated attention of a torchscale model run on this package, in place.

    Parameters, buffers, hooks and the names in the state dict stay what they are, so that checkpoints and optimizers
    go on. Call it before FSDP's `fully_shard`, which makes subclasses.

    Args:
        model: A LongNet, LongViT or Prov-GigaPath model, or any module that holds torchscale's `DilatedAttention`.
        mix_grad: "detached" trains as torchscale does, with the weights that mix the branches held constant; "exact"
            gives the gradient of what is computed.

    Returns:
        How many modules now run here that did not before.

    Raises:
        ArgumentError: The model holds no such module, or mix_grad is neither word.
        UnsupportedError: A module is of a subclass, whose additions would be lost.
    """
    if mix_grad not in ("detached", "exact"):
        raise ArgumentError(f"mix_grad must be 'detached' or 'exact', got {mix_grad!r}")
    found = {name: module for name, module in model.named_modules() if _is_dilated_attention(module)}
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} holds no torchscale DilatedAttention (a module of that class with "
            "args.segment_length, args.dilated_ratio, q_proj, k_proj, v_proj and out_proj)"
        )
    theirs = {name: module for name, module in found.items() if not isinstance(module, DilatedAttention)}
    for name, module in theirs.items():
        if type(module).__name__ != DilatedAttention.__name__:
            raise UnsupportedError(
                f"{name} is a {type(module).__name__}, a subclass of torchscale's DilatedAttention: what it adds would "
                "be lost; call use_in before the model is wrapped, or derive it from compat.torchscale.DilatedAttention"
            )
    for module in theirs.values():
        # The attributes are the same; so references, hooks and flags of the module survive.
        module.__class__ = DilatedAttention
        if module.xpos is not None:
            module.xpos.__class__ = XPos
    for module in found.values():
        module.mix_grad = mix_grad
    return len(theirs)


def _is_dilated_attention(module: nn.Module) -> bool:
    named = any(kind.__name__ == DilatedAttention.__name__ for kind in type(module).__mro__)
    args = getattr(module, "args", None)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln", "xpos", "num_heads")
    return (
        named
        and all(hasattr(args, field) for field in ("segment_length", "dilated_ratio"))
        and all(hasattr(module, part) for part in parts)
    )


class DilatedAttention(nn.Module):
    """Multi-head dilated attention with torchscale's constructor, call and state dict.

    Heads are offset in blocks, and the zero rows that torchscale pads segments with count as keys: weights trained
    there are right here. `mix_grad` ("detached" or "exact") is an attribute, see `use_in`.

    Args:
        args: torchscale's configuration. Read are `segment_length` and `dilated_ratio` (lists, or strings such as
            "[1024,2048]"), `multiway`, `layernorm_eps`, `xpos_rel_pos`, `xpos_scale_base` and `seq_parallel`.
        embed_dim: Width of queries, keys, values and output.
        num_heads: H; divides embed_dim.
        dropout: Probability with which an attention weight is dropped, in training alone.
        self_attention: Keys and values are of the same sequence as queries.
        encoder_decoder_attention: They are of another; exactly one of the two.
        subln: Normalise the heads' outputs before the output projection.

    Raises:
        ArgumentError: An argument is wrong; the message says how to mend it.
    """

    mix_grad = "detached"

    def __init__(
        self,
        args: Any,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        subln: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ArgumentError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if self_attention == encoder_decoder_attention:
            raise ArgumentError("exactly one of self_attention and encoder_decoder_attention must be True")
        self.args = args
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention

        def multiway(module: nn.Linear | nn.LayerNorm) -> nn.Module:
            return Multiway(module) if args.multiway else module

        self.k_proj = multiway(nn.Linear(embed_dim, embed_dim))
        self.v_proj = multiway(nn.Linear(embed_dim, embed_dim))
        self.q_proj = multiway(nn.Linear(embed_dim, embed_dim))
        self.out_proj = multiway(nn.Linear(embed_dim, embed_dim))
        norm = subln and self_attention
        self.inner_attn_ln = multiway(nn.LayerNorm(embed_dim, eps=args.layernorm_eps)) if norm else None
        self.xpos = XPos(self.head_dim, args.xpos_scale_base) if args.xpos_rel_pos and self_attention else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: dict[str, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (B, N, embed_dim).
            key: (B, N, embed_dim).
            value: (B, N, embed_dim).
            incremental_state: Refused: keys of earlier calls.
            key_padding_mask: (B, N), True or 1 = padding, which takes no part.
            attn_mask: Refused: scores of single pairs.
            rel_pos: Refused, as in torchscale.
            is_first_step: Of incremental decoding; without a state it says nothing.
            is_causal: Drop keys of later tokens.

        Returns:
            The output (B, N, embed_dim), and None where torchscale's attention has weights.

        Raises:
            UnsupportedError: What was asked for cannot be honoured; the message says what to do instead.
            ArgumentError: As `dilated_attention`.
        """
        del is_first_step
        self._refuse(incremental_state, attn_mask, rel_pos)
        segment_lengths = _integers(self.args, "segment_length")
        self._refuse_spread_sequences(max(segment_lengths), query.shape[1])
        heads = (self.num_heads, -1)
        q = self.q_proj(query).unflatten(-1, heads)
        k = self.k_proj(key).unflatten(-1, heads)
        v = self.v_proj(value).unflatten(-1, heads)
        if self.xpos is not None:
            q, k = self.xpos(q), self.xpos(k, downscale=True)
        attn = dilated_attention(
            q,
            k,
            v,
            segment_lengths,
            _integers(self.args, "dilated_ratio"),
            head_offset="blocked",
            is_causal=is_causal,
            key_padding_mask=None if key_padding_mask is None else ~key_padding_mask.to(torch.bool),
            dropout_p=self.dropout if self.training else 0.0,
            padding="zeros",
            mix_grad=self.mix_grad,
        ).flatten(-2)
        if self.inner_attn_ln is not None:
            attn = self.inner_attn_ln(attn)
        return self.out_proj(attn), None

    def _refuse(self, incremental_state: object, attn_mask: object, rel_pos: object) -> None:
        """Raise for what torchscale's callers may pass and this attention cannot honour."""
        if incremental_state is not None:
            raise UnsupportedError(
                "incremental decoding (incremental_state) is not supported yet: pass the whole sequence, with "
                "incremental_state=None and is_causal=True"
            )
        if attn_mask is not None:
            raise UnsupportedError(
                "attn_mask is not supported: causality is is_causal=True, padding is key_padding_mask; torchscale's "
                "Decoder makes a causal attn_mask of its own unless args.flash_attention is True: set it"
            )
        if rel_pos is not None:
            raise UnsupportedError("rel_pos is not supported, nor was it by torchscale: set args.rel_pos_buckets = 0")

    def _refuse_spread_sequences(self, longest: int, length: int) -> None:
        """Raise where torchscale would gather the rest of a segment from other ranks."""
        if not getattr(self.args, "seq_parallel", False) or longest <= length:
            return
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UnsupportedError(
                f"args.seq_parallel over {dist.get_world_size()} ranks is not supported yet: segments of "
                f"{longest} tokens reach beyond the {length} of this rank; set it to False and give every rank whole "
                "sequences"
            )


class Multiway(nn.Module):
    """Two copies of a module, A for the tokens before `split_position` and B for the others; -1 is A for all."""

    def __init__(self, module: nn.Linear | nn.LayerNorm, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.A = module
        self.B = copy.deepcopy(module)
        self.B.reset_parameters()
        self.split_position = -1

    def forward(self, x: Tensor) -> Tensor:
        """A and B side by side along `dim`; what has no token does not run, and gets no gradient."""
        split = x.shape[self.dim] if self.split_position == -1 else self.split_position
        parts = zip((self.A, self.B), x.tensor_split([split], dim=self.dim), strict=True)
        return torch.cat([module(part) for module, part in parts if part.shape[self.dim]], dim=self.dim)


class XPos(nn.Module):
    """xPos, a rotation with a decay (arXiv 2212.10554), with torchscale's positions: 0 in the middle of the sequence.

    The angles are float32 whatever the model's dtype; torchscale rounds them to it.
    """

    scale: Tensor

    def __init__(self, head_dim: int, scale_base: float = 512) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale_base = scale_base
        self.register_buffer("scale", self._decay(None))

    def _decay(self, device: torch.device | None) -> Tensor:
        even = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return (even + 0.4 * self.head_dim) / (1.4 * self.head_dim)

    def forward(self, x: Tensor, downscale: bool = False) -> Tensor:
        """Rotate.

        Args:
            x: Queries or keys (B, N, H, D), D even.
            downscale: For keys: grow where queries decay.

        Returns:
            (B, N, H, D), in the dtype of x.
        """
        length, half = x.shape[1], self.head_dim // 2
        step = torch.arange(length, dtype=torch.float32, device=x.device)
        frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angle = torch.outer(step, frequency)  # [N, D / 2]
        power = (step - (length + 1) // 2) / self.scale_base
        scale = self._decay(x.device) ** (-power if downscale else power)[:, None]
        sine, cosine = ((wave * scale)[:, None, :] for wave in (angle.sin(), angle.cos()))  # [N, 1, D / 2]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2).to(x.dtype)


def _integers(args: Any, field: str) -> list[int]:
    """A list of the configuration, or the one that a string such as "[1024,2048]" spells."""
    given = getattr(args, field)
    try:
        return [int(item) for item in given.strip("[]() ").split(",")] if isinstance(given, str) else list(given)
    except (TypeError, ValueError):
        raise ArgumentError(f"args.{field} must be a list of integers, got {given!r}") from None
