"""The attentions that make up a rank's share, each with the place of its queries in the results.

A `Span` is some branches over segments that this rank holds whole, where they lie. A `Gathered` is one piece of a run,
over rows that were brought together. Results are by row: out (X, rows, heads, D) and lse (X, rows, heads); merging them
is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import device as devices
from ..config import Problem
from ..runtime.arguments import HeadOffsets
from ..runtime.dropout import Dropout
from ..runtime.options import Options
from ..runtime.plan import Plan, plan
from .engines import Gradients, Planned, Products
from .layout import Piece


@dataclass(frozen=True)
class Share:
    """A checked call of one rank.

    Attributes:
        problem: With this rank's length, and segment lengths as they act: min(w, N).
        start: First step of this rank.
        scale: Factor of the scores.
        mask: This rank's key padding mask (B, n), or None.
        offsets: Head offsets.
        tokens: Steps -> tokens, (N,) integers, where there is an order and it matters; else None.
        dropout: With the seed of all ranks, or None.
        backend: As the caller said.
        backward: Gradients will be asked for.
        options: Those in force at the call; the backward may run in another thread, and behind their `with`.
    """

    problem: Problem
    start: int
    scale: float
    mask: Tensor | None
    offsets: HeadOffsets
    tokens: Tensor | None
    dropout: Dropout | None
    backend: str | None
    backward: bool
    options: Options

    @property
    def in_place(self) -> bool:
        """Backends compute whole segments by themselves: they take a row's place for its token, as dropout may not."""
        return self.dropout is None

    @property
    def by_token(self) -> bool:
        """Which keys a query sees goes by tokens that steps do not follow."""
        return self.problem.causal and self.tokens is not None

    @property
    def prefix(self) -> bool:
        """A query sees no later step."""
        return self.problem.causal and not self.by_token

    def plan(self, problem: Problem, device: torch.device) -> Plan:
        """What runs a part."""
        chosen = plan(problem, devices.current(device), self.backend, self.options, backward=self.backward)
        if self.options.miss_log is not None:
            from ..runtime.misses import note

            note(self.options.miss_log, chosen, backward=self.backward)
        return chosen

    def tokens_at(self, steps: Tensor) -> Tensor:
        """Tokens of steps of the whole sequence."""
        return steps if self.tokens is None else self.tokens[steps].long()


class Span:
    """Whole segments of some branches: this rank's rows [first, last).

    Where tokens decide, the rows are put in their sequence, and the backend follows the order within them.

    Attributes:
        is_whole: These are all of this rank's rows, as they lie.
    """

    def __init__(self, share: Share, branches: Sequence[int], first: int, last: int, device: torch.device) -> None:
        chosen = tuple(share.problem.branches[branch] for branch in branches)
        problem = replace(share.problem, length=last - first, branches=chosen)
        self._rows: slice | Tensor = slice(first, last)
        index = None
        if share.by_token:
            steps = torch.arange(first, last, device=device)
            by_token = share.tokens_at(steps + share.start).argsort()
            problem, index = replace(problem, order="hilbert"), by_token.argsort().int()
            self._rows = steps[by_token]
        table = share.offsets.table
        offsets = HeadOffsets(
            tuple(share.offsets.rows[branch] for branch in branches), None if table is None else table[list(branches)]
        )
        self.is_whole = problem.length == share.problem.length and index is None
        self._mask = None if share.mask is None else share.mask[:, self._rows]
        self._engine = Planned(share.plan(problem, device), share.scale, offsets, index)

    def read(self, x: Tensor) -> Tensor:
        """The part's rows of x (B, n, H, …)."""
        return x[:, self._rows]

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Store what `read` would give."""
        x[:, self._rows] = rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of the part."""
        return self._engine.forward(self.read(q), self.read(k), self.read(v), self._mask)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> Gradients:
        """dq, dk and dv of the part's rows; out, lse (B, n, H) and their gradients are those of all branches."""
        q, k, v, out, lse, dout = (self.read(x) for x in (q, k, v, out, lse, dout))
        return self._engine.backward(q, k, v, self._mask, out, lse, dout, None if dlse is None else self.read(dlse))


class Gathered:
    """Dense attentions of one size over gathered rows; X counts (batch element, unit) pairs."""

    is_whole = False

    def __init__(self, share: Share, branch: int, piece: Piece) -> None:
        self._share, self._piece = share, piece
        self._engine = self._kernels() or Products(
            scale=share.scale,
            asking=share.tokens_at(piece.steps + share.start),
            keeping=share.tokens_at(piece.key_steps),
            causal=share.problem.causal,
            heads=piece.heads,
            branch=branch,
            dropout=share.dropout,
            detached=share.problem.mix_grad == "detached",
        )

    def read(self, x: Tensor) -> Tensor:
        """The part's rows of x (B, n, H, …), packed."""
        return x[:, self._piece.steps[:, :, None], self._piece.heads[:, None, :]].flatten(0, 1)

    def write(self, x: Tensor, rows: Tensor) -> None:
        """Store what `read` would give."""
        rows = rows.reshape(x.shape[0], len(self._piece.heads), *rows.shape[1:])
        x[:, self._piece.steps[:, :, None], self._piece.heads[:, None, :]] = rows

    def forward(self, q: Tensor, flat: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse of the part.

        Args:
            q: This rank's queries (B, n, H, D).
            flat: The run's rows (R, 2, B, D).
            seen: Their key padding mask (R, B), or None.
        """
        out, lse = self._engine.forward(self.read(q), *self._keys(flat), self._seen(seen))
        if self._share.mask is None:
            return out, lse
        masked = ~self.read(self._share.mask.unsqueeze(2).expand(-1, -1, self._share.problem.heads))
        return out.masked_fill(masked.unsqueeze(3), 0.0), lse.masked_fill(masked, -torch.inf)

    def backward(
        self,
        q: Tensor,
        flat: Tensor,
        seen: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dflat: Tensor,
    ) -> Tensor:
        """dq of the part's rows; the gradients of its keys and values are stored in dflat, shaped like flat."""
        q, out, lse, dout = (self.read(x) for x in (q, out, lse, dout))
        dq, *gradients = self._engine.backward(
            q, *self._keys(flat), self._seen(seen), out, lse, dout, None if dlse is None else self.read(dlse)
        )
        units, keys = self._piece.keys.shape
        for place, gradient in enumerate(gradients):  # (X, L, 1, D) -> (U, L, B, D)
            rows = gradient.reshape(flat.shape[2], units, keys, flat.shape[3]).permute(1, 2, 0, 3)
            dflat[self._piece.keys, place] = rows.to(dflat.dtype)
        return dq

    def _keys(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (X, L, 1, D) each."""
        k, v = flat[self._piece.keys].permute(2, 3, 0, 1, 4).flatten(1, 2).unsqueeze(3)
        return k, v

    def _seen(self, seen: Tensor | None) -> Tensor | None:
        """Key padding mask (X, L)."""
        return None if seen is None else seen[self._piece.keys].permute(2, 0, 1).flatten(0, 1).contiguous()

    def _kernels(self) -> Planned | None:
        """One segment of dilation 1, of which this rank asks some rows; None where no kernel of ours takes that."""
        share, piece = self._share, self._piece
        if share.dropout is not None or share.by_token or share.problem.queries == "all":
            return None
        (units, heads), keys, queries = piece.heads.shape, piece.keys.shape[1], piece.steps.shape[1]
        problem = replace(
            share.problem,
            batch=share.problem.batch * units,
            length=keys,
            heads=heads,
            kv_heads=1,
            branches=((keys, 1),),
            head_offset="zero",
            padding="none",  # phantoms are rows here
        )
        chosen = share.plan(problem, piece.steps.device)
        if chosen.backend != "triton":
            return None
        if queries < keys:
            asked = replace(problem, query_range=(piece.first, piece.first + queries))
            chosen = share.plan(asked, piece.steps.device)
        return Planned(chosen, share.scale, HeadOffsets(((0,) * heads,)), index=None)
