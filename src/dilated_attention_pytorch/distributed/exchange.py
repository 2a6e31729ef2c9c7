"""Rows on their way: kept keys and values to the ranks that ask them, and their gradients back.

A message holds the kept rows of one rank in one segment, and goes to that segment's other ranks alone: exact sizes,
point to point, in one batch for all branches. Both directions only begin here; `Pending.wait` ends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import waiting
from .layout import Rows, Run, Shards


@dataclass
class Pending:
    """Messages under way; the tensors are whole after `wait`."""

    works: list[dist.Work]
    group: dist.ProcessGroup
    what: str

    def wait(self) -> None:
        """Let the current stream, or on a CPU the caller, wait for all messages.

        Raises:
            LostRankError: Another rank is gone.
        """
        with waiting(self.group, self.what):
            for work in self.works:
                work.wait()
        self.works.clear()


class _Batch:
    """Messages to be sent and received together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ops: list[dist.P2POp] = []

    def send(self, x: Tensor, rank: int, tag: int) -> None:
        self._add(dist.isend, x, rank, tag)

    def receive(self, x: Tensor, rank: int, tag: int) -> None:
        self._add(dist.irecv, x, rank, tag)

    def _add(self, op: object, x: Tensor, rank: int, tag: int) -> None:
        if x.numel():
            self._ops.append(dist.P2POp(op, x, group=self._group, group_peer=rank, tag=tag))  # type: ignore[arg-type]

    def start(self, what: str) -> Pending:
        with waiting(self._group, what):
            works = dist.batch_isend_irecv(self._ops) if self._ops else []
        return Pending(works, self._group, what)


def gather(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    laid: Sequence[tuple[Run, Rows]],
    shards: Shards,
    group: dist.ProcessGroup,
) -> tuple[list[tuple[Tensor, Tensor | None]], Pending]:
    """Begin to bring the rows of runs together.

    Args:
        k: This rank's keys (B, n, G, D).
        v: This rank's values.
        mask: This rank's key padding mask (B, n), or None.
        laid: Runs with their index tensors.
        shards: Of the whole sequence.
        group: Ranks of the sequence.

    Returns:
        For each run its rows (R, 2, B, D), keys and values, in the blocks of the senders, with their mask (R, B); a
        zero row that nothing masks follows where padding counts as keys. They are whole after the second result's wait.
    """
    batch = _Batch(group)
    found: list[tuple[Tensor, Tensor | None]] = []
    for run, rows in laid:
        total, tag = rows.blocks[-1] + rows.phantoms, 2 * run.branch
        flat = k.new_zeros((total, 2, k.shape[0], k.shape[3]))
        own = flat[_block(run, rows, shards.rank)]
        for place, x in enumerate((k, v)):
            own[:, place] = x[:, rows.steps, rows.heads].transpose(0, 1)
        travelling, seen = [flat], None
        if mask is not None:
            seen = mask.new_ones((total, mask.shape[0]))
            seen[_block(run, rows, shards.rank)] = mask[:, rows.steps].t()
            travelling.append(seen)
        for order, x in enumerate(travelling):
            for rank in run.receivers:
                batch.send(x[_block(run, rows, shards.rank)], rank, tag + order)
            for owner in run.senders:
                if owner.rank != shards.rank:
                    batch.receive(x[_block(run, rows, owner.rank)], owner.rank, tag + order)
        found.append((flat, seen))
    return found, batch.start("kept keys and values")


def scatter(
    gradients: Sequence[Tensor], laid: Sequence[tuple[Run, Rows]], shards: Shards, group: dist.ProcessGroup
) -> tuple[list[list[Tensor]], Pending]:
    """Begin to bring the gradients of rows back to the ranks that hold them.

    Args:
        gradients: For each run, those of its rows (R, 2, B, D).
        laid: As for `gather`; so are shards and group.

    Returns:
        For each run, the gradients (own rows, 2, B, D) that have to be summed, whole after the second result's wait.
    """
    batch, found = _Batch(group), []
    for gradient, (run, rows) in zip(gradients, laid, strict=True):
        own = gradient[_block(run, rows, shards.rank)]
        received = [torch.empty_like(own) for _ in run.receivers]
        for rank, x in zip(run.receivers, received, strict=True):
            batch.receive(x, rank, 2 * run.branch)
        for owner in run.senders:
            if owner.rank != shards.rank:
                batch.send(gradient[_block(run, rows, owner.rank)], owner.rank, 2 * run.branch)
        found.append([own, *received])
    return found, batch.start("gradients of keys and values")


def add_rows(dk: Tensor, dv: Tensor, parts: Sequence[Tensor], rows: Rows) -> None:
    """Add the sum of a run's gradients, taken in float32 or float64, to those of this rank's keys and values."""
    total = parts[0].double() if parts[0].dtype == torch.float64 else parts[0].float()
    for part in parts[1:]:
        total = total + part
    for place, x in enumerate((dk, dv)):
        # No two rows of a run are the same row of k.
        present = x[:, rows.steps, rows.heads]
        x[:, rows.steps, rows.heads] = (present + total[:, place].transpose(0, 1)).to(x.dtype)


def _block(run: Run, rows: Rows, rank: int) -> slice:
    """Where a sender's rows lie."""
    place = next(place for place, owner in enumerate(run.senders) if owner.rank == rank)
    return slice(rows.blocks[place], rows.blocks[place + 1])
