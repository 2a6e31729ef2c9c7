"""The same attention through torch's FlexAttention: an exact mask, and the logarithm of multiplicities as a bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dilated_attention_pytorch.config import Problem, cdiv

Count = Callable[[Tensor, Tensor, Tensor], Tensor]


def counter(problem: Problem, device: torch.device, order: Tensor | None = None) -> Count:
    """(head, query token, key token) -> in how many branches they meet, elementwise.

    Args:
        problem: Neither causal nor masked nor padded.
        device: Where it will be asked.
        order: Steps -> tokens, int64 (N,).
    """
    step = None if order is None else torch.argsort(order).to(device, torch.int32)
    rule, heads = problem.head_offset, problem.heads
    branches = [(problem.segment(branch), rate) for branch, (_, rate) in enumerate(problem.branches)]

    def count(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        asking, asked = (query, key) if step is None else (step[query], step[key])
        meetings = []
        for width, rate in branches:
            offset = {"cyclic": head % rate, "blocked": head // cdiv(heads, rate), "zero": 0 * head}[rule]
            meet = (asking // width == asked // width) & (asked % width % rate == offset)
            if problem.queries == "dilated":
                meet = meet & (asking % width % rate == offset)
            meetings.append(meet.to(torch.int32))
        return reduce(torch.add, meetings)

    return count


def attention(problem: Problem, device: torch.device, order: Tensor | None = None) -> Callable[..., Tensor]:
    """A function of q, k, v (B, N, H, D). Where `torch.compile` cannot, its first call says so."""
    count = counter(problem, device, order)

    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        times = count(head, query, key)
        return torch.where(times > 0, score + torch.log(times.to(score.dtype)), -torch.inf)

    options: dict[str, Any] = {}
    # A dilated branch over all tokens leaves no block of the mask empty: there is nothing to skip.
    skips = not any(problem.is_full(branch) for branch in range(len(problem.branches)))
    if skips:
        options["block_mask"] = create_block_mask(
            lambda batch, head, query, key: count(head, query, key) > 0,
            B=None,
            H=None if problem.head_offset == "zero" else problem.heads,
            Q_LEN=problem.length,
            KV_LEN=problem.length,
            device=device,
        )
    if not skips or len(problem.branches) > 1:
        options["score_mod"] = score
    # Earlier cases would count against the compiler's limit of recompilations.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend
