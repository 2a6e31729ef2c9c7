"""Dilated attention as two operators of torch's dispatcher, for whoever traces calls instead of running them.

`torch.compile`, `torch.export`, fake and meta tensors see one opaque call with the shapes of its results; checks, plan
and launches happen when it runs. A graph thus holds for every length, and its kernels are chosen for the length at
hand. The arguments are those of `dilated_attention`, each union taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import Dropout

NAMESPACE = "dilated_attention_pytorch"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_SIDES = {
    "permutation": "Tensor?",
    "key_padding_mask": "Tensor?",
    "head_offsets": "Tensor?",
    "seed": "Tensor?",
}
_WORDS = {
    "segment_lengths": "SymInt[]",
    "dilation_rates": "SymInt[]",
    "queries": "str",
    "head_offset": "str",
    "order": "str?",
    "grid": "SymInt[]?",
    "prefix": "SymInt",
    "is_causal": "bool",
    "dropout_p": "float",
    "scale": "float?",
    "padding": "str",
    "mix_grad": "str",
    "backend": "str?",
}
SIDES, WORDS = tuple(_SIDES), tuple(_WORDS)
"""Arguments behind the tensors that are differentiated: the tensors, and the rest, in this sequence."""

_REST = ", ".join(f"{kind} {name}" for name, kind in {**_SIDES, **_WORDS}.items())
_INPUTS = "Tensor q, Tensor k, Tensor v"
_RESULTS = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
for _schema in (
    f"attention({_INPUTS}, {_REST}) -> (Tensor out, Tensor lse)",
    f"attention_backward({_INPUTS}, {_RESULTS}, {_REST}) -> (Tensor dq, Tensor dk, Tensor dv)",
):
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Deferred:
    """Stands for a plan in a call that is traced: the operators make the plan when they run.

    Attributes:
        words: Arguments of the operators behind the tensors, by name.
    """

    words: tuple[tuple[str, Any], ...]
    backend = "deferred"

    @property
    def mix_grad(self) -> str:
        """As in the call."""
        return str(dict(self.words)["mix_grad"])


def forward(
    plan: Deferred,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """The operator below autograd; `index` and `offsets` are the caller's tensors, not checked yet."""
    with torch._C._AutoDispatchBelowAutograd():
        out, lse = _attention(q, k, v, **_sides(index, mask, offsets, dropout), scale=scale, **dict(plan.words))
    return out, lse


def backward(
    plan: Deferred,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    scale: float | None,
    index: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    sides = _sides(index, mask, offsets, dropout)
    dq, dk, dv = _attention_backward(q, k, v, out, lse, dout, dlse, **sides, scale=scale, **dict(plan.words))
    return dq, dk, dv


def _sides(
    index: Tensor | None, mask: Tensor | None, offsets: Tensor | None, dropout: Dropout | None
) -> dict[str, Tensor | None]:
    seed = None if dropout is None else dropout.seed
    return {"permutation": index, "key_padding_mask": mask, "head_offsets": offsets, "seed": seed}


_attention = getattr(torch.ops, NAMESPACE).attention.default
_attention_backward = getattr(torch.ops, NAMESPACE).attention_backward.default


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads = q.shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=dtype)


def _backward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_fake(f"{NAMESPACE}::attention", _shapes, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::attention_backward", _backward_shapes, lib=LIBRARY)
