"""All ranks of a case in one process, one after the other: what they would send each other is read where it lies.

So the kernels that take gathered rows run in Triton's interpreter, and on a single GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dilated_attention_pytorch.distributed import api, exchange
from dilated_attention_pytorch.distributed.layout import Rows, Run, Shards

from ..cases import Case, Inputs, arguments, make_inputs
from ..tolerances import Results
from .ranks import Cut

Laid = Sequence[tuple[Run, Rows]]


@dataclass
class Loopback:
    """The exchange of a case: the whole sequence of steps, and gradients for other ranks."""

    case: Case
    inputs: Inputs
    away: dict[str, Tensor] = field(default_factory=dict)

    def gather(
        self, k: Tensor, v: Tensor, mask: Tensor | None, laid: Laid, shards: Shards, group: Any
    ) -> tuple[list[tuple[Tensor, Tensor | None]], Any]:
        """The rows of all senders."""
        found = []
        for run, rows in laid:
            flat = k.new_zeros((rows.blocks[-1] + rows.phantoms, 2, k.shape[0], k.shape[3]))
            seen = None if mask is None else mask.new_ones((len(flat), len(mask)))
            for _, block, steps, heads in self._blocks(run, rows, shards):
                for side, x in enumerate((self.inputs.k, self.inputs.v)):
                    flat[block, side] = x[:, steps, heads].transpose(0, 1)
                if seen is not None and self.inputs.mask is not None:
                    seen[block] = self.inputs.mask[:, steps].t()
            found.append((flat, seen))
        return found, mock.Mock()

    def scatter(
        self, gradients: Sequence[Tensor], laid: Laid, shards: Shards, group: Any
    ) -> tuple[list[list[Tensor]], Any]:
        """This rank's rows; those of other ranks are added up in `away`."""
        found = []
        for gradient, (run, rows) in zip(gradients, laid, strict=True):
            for rank, block, steps, heads in self._blocks(run, rows, shards):
                if rank == shards.rank:
                    found.append([gradient[block]])
                    continue
                for side, (name, x) in enumerate((("dk", self.inputs.k), ("dv", self.inputs.v))):
                    total = self.away.setdefault(name, torch.zeros_like(x, dtype=torch.float64))
                    total[:, steps, heads] += gradient[block, side].transpose(0, 1)
        return found, mock.Mock()

    def _blocks(self, run: Run, rows: Rows, shards: Shards) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Of each sender: its rank, where its rows lie in the run, their steps and key heads, by definition."""
        rate, offsets = self.case.branches[run.branch][1], self.case.offsets[run.branch]
        kinds = {(head * self.case.kv_heads // self.case.H, s) for head, s in enumerate(offsets) if s >= 0}
        for place, owner in enumerate(run.senders):
            block = slice(rows.blocks[place], rows.blocks[place + 1])
            kept = [
                (step, head)
                for head, offset in sorted(kinds)
                for step in range(run.start + offset, owner.last, rate)
                if step >= owner.first
            ]
            steps, heads = torch.tensor(kept, device=rows.steps.device).view(-1, 2).unbind(1)
            if owner.rank == shards.rank:
                steps, heads = rows.steps + shards.start, rows.heads
            yield owner.rank, block, steps, heads


def attend(cut: Cut, device: str = "cpu") -> Results:
    """Results of all ranks together, by generated kernels."""
    case, given = cut.case, make_inputs(cut.case, device)
    steps = torch.arange(case.N, device=device) if given.order is None else given.order
    inputs = Inputs(
        *(x.index_select(2 if x is given.dlse else 1, steps) for x in given[:5]),
        order=given.order,
        mask=None if given.mask is None else given.mask[:, steps],
    )
    loop, parts = Loopback(case, inputs), []
    stops = list(accumulate(cut.lengths))
    for rank, (length, stop) in enumerate(zip(cut.lengths, stops, strict=True)):
        own = slice(stop - length, stop)
        q, k, v = (x[:, own].detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        words = arguments(case, inputs)
        words["key_padding_mask"] = None if inputs.mask is None else inputs.mask[:, own]
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: len(cut.lengths))
        with (
            mock.patch.object(api, "as_group", lambda group: group),
            mock.patch.object(api, "agree", lambda *_: cut.lengths),
            mock.patch.multiple(exchange, gather=loop.gather, scatter=loop.scatter),
        ):
            out, lse = api.dilated_attention(
                q, k, v, group=group, mix_grad=cut.mix_grad, return_lse=True, backend="triton", **words
            )
            results, gradients = [out], [inputs.dout[:, own]]
            if cut.mix_grad == "exact":
                results.append(lse)
                gradients.append(inputs.dlse[:, :, own].masked_fill(lse == -torch.inf, 0.0))
            parts.append((out.detach(), lse.detach(), *torch.autograd.grad(results, (q, k, v), gradients)))
    whole = Results(*(torch.cat(x, dim=2 if place == 1 else 1) for place, x in enumerate(zip(*parts, strict=True))))
    whole = whole._replace(**{name: getattr(whole, name).double() + away for name, away in loop.away.items()})
    return Results(*(x.index_select(2 if x is whole.lse else 1, steps.argsort()) for x in whole))
