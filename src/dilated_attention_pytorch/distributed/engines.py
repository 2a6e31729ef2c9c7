"""What computes a part: a backend's plan, or torch's matrix products where rows must know their tokens.

Both take q (X, Lq, m, D), k and v (X, L, heads, D) and a key padding mask (X, L) or None, and give out (X, Lq, m, D)
and lse by row, (X, Lq, m). Their backward takes the out and lse of the whole softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.arguments import HeadOffsets
from ..runtime.dropout import Dropout, token_bits
from ..runtime.function import backend_of
from ..runtime.plan import Plan
from ..runtime.torch_attention import Drops, Visibility, attend, attend_backward

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Planned:
    """Branches over whole segments, or some queries of one segment, by a backend.

    Attributes:
        plan: What runs.
        scale: Factor of the scores.
        offsets: Head offsets of the plan's branches.
        index: Steps -> rows, where there is an order.
    """

    plan: Plan
    scale: float
    offsets: HeadOffsets
    index: Tensor | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse."""
        out, lse = backend_of(self.plan).forward(
            self.plan, q, k, v, scale=self.scale, index=self.index, mask=mask, offsets=self.offsets
        )
        return out, lse.transpose(1, 2)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> Gradients:
        """dq, dk and dv."""
        dq, dk, dv = backend_of(self.plan).backward(
            self.plan,
            q,
            k,
            v,
            out.contiguous(),
            lse.transpose(1, 2).contiguous(),
            dout,
            None if dlse is None else dlse.transpose(1, 2),
            scale=self.scale,
            index=self.index,
            mask=mask,
            offsets=self.offsets,
        )
        return dq, dk, dv


@dataclass(frozen=True)
class Products:
    """Rows with tokens of their own, by torch's matrix products; U counts them within a batch element.

    Attributes:
        scale: Factor of the scores.
        asking: (U, Lq) the queries' tokens.
        keeping: (U, L) the keys' tokens.
        causal: A query sees no later token.
        heads: (U, m) query heads.
        branch: Index of the branch.
        dropout: What drops attention probabilities, or None.
        detached: The weights that mix the branches are constants in the backward.
    """

    scale: float
    asking: Tensor
    keeping: Tensor
    causal: bool
    heads: Tensor
    branch: int
    dropout: Dropout | None
    detached: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse; a query's own mask is the caller's."""
        q, k, v = self._by_head(q, k, v)
        out, lse = attend(q, k, v, self.scale, self._visibility(q, mask))
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> Gradients:
        """dq, dk and dv."""
        if self.detached:
            out, _ = self.forward(q, k, v, mask)
        q, k, v = self._by_head(q, k, v)
        keyless = lse == -torch.inf
        dq, dk, dv = attend_backward(
            q,
            k,
            v,
            out.transpose(1, 2),
            lse.masked_fill(keyless, torch.inf).transpose(1, 2),
            dout.transpose(1, 2),
            None if dlse is None else dlse.masked_fill(keyless, 0.0).transpose(1, 2),
            self.scale,
            self._visibility(q, mask),
        )
        # The query heads of a unit share its key/value head.
        dk, dv = (x.sum(1, keepdim=True).transpose(1, 2) for x in (dk, dv))
        return dq.transpose(1, 2), dk, dv

    def _by_head(self, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        k, v = (x.transpose(1, 2).expand(-1, q.shape[2], -1, -1) for x in (k, v))
        return q.transpose(1, 2), k, v

    def _visibility(self, q: Tensor, mask: Tensor | None) -> Visibility:
        units, heads = self.heads.shape
        batch = len(q) // units

        def by_head(rows: Tensor) -> Tensor:
            """(U, rows) -> (X, m, rows)."""
            return rows.repeat(batch, 1).unsqueeze(1).expand(-1, heads, -1)

        drops = None
        if self.dropout is not None:
            samples = torch.arange(batch, device=q.device)[:, None, None, None]
            first, second = self.dropout.bits(self.asking[:, None], self.heads[:, :, None], samples, self.branch)
            drops = Drops(self.dropout, (first.flatten(0, 1), second.flatten(0, 1)), by_head(token_bits(self.keeping)))
        return Visibility(
            tokens=(by_head(self.asking), by_head(self.keeping)) if self.causal else None,
            keys=None if mask is None else mask.unsqueeze(1).expand(-1, heads, -1),
            drops=drops,
        )
