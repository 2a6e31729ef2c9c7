"""Dilated attention as a module, with the constructor of the package of the same name (docs/peers.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..runtime.api import dilated_attention

if TYPE_CHECKING:
    from ..distributed.agreement import Group


class DilatedAttention(nn.Module):
    """Dilated attention of LongNet (arXiv 2307.02486) over queries, keys and values of many heads.

    Args:
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        softmax_scale: Factor of the scores; None is D^-0.5.
        attention_dropout: Probability with which an attention weight is dropped, in training alone.
        head_groups: Each head takes part in one branch: the heads are cut into as many groups as there are branches,
            the first ones a head larger where they do not divide. By default every head takes part in every branch,
            as in the paper.
        group: Ranks that share each sequence: a process group, a `DeviceMesh` of one dimension, or (mesh, dimension);
            inputs and outputs are then this rank's steps (docs/scale.md). None is no sharing.

    Raises:
        ArgumentError: As many segment lengths as dilation rates are needed.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        head_groups: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__()
        if len(segment_lengths) != len(dilation_rates):
            raise ArgumentError(
                "segment_lengths and dilation_rates must be as many, one pair a branch; "
                f"got {segment_lengths!r} and {dilation_rates!r}"
            )
        self.segment_lengths = segment_lengths
        self.dilation_rates = dilation_rates
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout
        self.head_groups = head_groups
        self.group = group
        self._tables: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            query: (B, N, H, D).
            key: (B, N, G, D); G divides H.
            value: (B, N, G, D).
            is_causal: Drop keys of later tokens.

        Returns:
            (B, N, H, D); 0 where no branch keeps the token for the head.

        Raises:
            ArgumentError, ArgumentTypeError, UnsupportedError: As `dilated_attention`.
        """
        return self._function()(
            query,
            key,
            value,
            self.segment_lengths,
            self.dilation_rates,
            head_offset=self._groups(query.shape[2]) if self.head_groups else "cyclic",
            is_causal=is_causal,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.softmax_scale,
        )

    def _function(self) -> Callable[..., Tensor]:
        if self.group is None:
            return dilated_attention
        from .. import distributed

        return partial(distributed.dilated_attention, group=self.group)

    def _groups(self, heads: int) -> Tensor:
        """The table of head offsets, the same tensor each time: the runtime checks a tensor when it first sees it."""
        key = tuple(self.dilation_rates), heads
        if key not in self._tables:
            self._tables[key] = group_offsets(*key)
        return self._tables[key]

    def extra_repr(self) -> str:
        """Branches, and what departs from the defaults."""
        scale = "" if self.softmax_scale is None else f", softmax_scale={self.softmax_scale}"
        dropout = f", attention_dropout={self.dropout_p}" if self.dropout_p else ""
        groups = ", head_groups=True" if self.head_groups else ""
        return f"{list(self.segment_lengths)}, {list(self.dilation_rates)}{scale}{dropout}{groups}"


def group_offsets(dilation_rates: tuple[int, ...], heads: int) -> Tensor:
    """The table of head offsets under which each head takes part in the branch of its group alone.

    Returns:
        int64 (branches, H): h mod r in the branch of head h, -1 in the others.
    """
    size, larger = divmod(heads, len(dilation_rates))
    rows = []
    stop = 0
    for branch, rate in enumerate(dilation_rates):
        start, stop = stop, stop + size + (branch < larger)
        rows.append([head % rate if start <= head < stop else -1 for head in range(heads)])
    with torch.inference_mode(False):
        return torch.tensor(rows)
