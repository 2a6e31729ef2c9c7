"""The same attention through torch's FlexAttention: an exact mask, and the logarithm of multiplicities as a bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from dilated_attention_pytorch.config import Problem, cdiv

Count = Callable[[Tensor, Tensor, Tensor], Tensor]

LARGEST_MASK = 1 << 31
"""Elements of a mask that is made in memory, at most."""


def counter(problem: Problem, device: torch.device, order: Tensor | None = None) -> Count:
    """(head, query token, key token) -> in how many branches they meet, elementwise.

    Args:
        problem: Neither masked nor padded.
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
            if problem.causal:
                meet = meet & (key <= query)
            meetings.append(meet.to(torch.int32))
        return reduce(torch.add, meetings)

    return count


def attention(
    problem: Problem, device: torch.device, order: Tensor | None = None, *, tma: bool = False
) -> Callable[..., Tensor]:
    """A function of q, k, v (B, N, H, D). Where `torch.compile` cannot, its first call says so.

    Args:
        problem: Not masked.
        device: Where it will run.
        order: Steps -> tokens, int64 (N,).
        tma: Ask for loads by descriptors.

    Raises:
        NotImplementedError: It is padded: phantom keys have no index.
    """
    if problem.padding == "zeros" and not problem.causal:
        raise NotImplementedError("phantom keys have no index that a mask could let through")
    count = counter(problem, device, order)

    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        times = count(head, query, key)
        return torch.where(times > 0, score + torch.log(times.to(score.dtype)), -torch.inf)

    options: dict[str, Any] = {"kernel_options": {"USE_TMA": True}} if tma else {}
    # A dilated branch over all tokens leaves no block of the mask empty: there is nothing to skip.
    skips = problem.causal or not any(problem.is_full(branch) for branch in range(len(problem.branches)))
    if skips:
        options["block_mask"] = create_block_mask(
            lambda batch, head, query, key: count(head, query, key) > 0,
            B=None,
            H=None if problem.head_offset == "zero" else problem.heads,
            Q_LEN=problem.length,
            KV_LEN=problem.length,
            device=device,
            _compile=problem.heads * problem.length**2 > LARGEST_MASK,
        )
    if not skips or len(problem.branches) > 1:
        options["score_mod"] = score
    compiled = _compiled(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def packed(rows: int, is_causal: bool, device: torch.device, *, tma: bool = False) -> Callable[..., Tensor]:
    """Of gathered q, k, v (P, H, rows, D)."""
    options: dict[str, Any] = {"kernel_options": {"USE_TMA": True}} if tma else {}
    if is_causal:
        options["block_mask"] = create_block_mask(
            lambda batch, head, query, key: key <= query, B=None, H=None, Q_LEN=rows, KV_LEN=rows, device=device
        )
    return partial(_compiled(device), **options)


def with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """out (P, H, rows, D) and lse (P, H, rows), to be compiled by the caller.

    Raises:
        NotImplementedError: Causal: each length would need a mask of its own.
    """
    if is_causal:
        raise NotImplementedError("a causal mask for each number of rows")
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    assert isinstance(aux.lse, Tensor)
    return out, aux.lse


def _compiled(device: torch.device) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
