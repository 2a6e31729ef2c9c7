"""The oracle where the oracle is too slow: a few query rows of a real run, in float64, and the gradients they give.

out is computed for some tokens from all keys, by definition. Gradients are linear in dout: with a dout that is zero
elsewhere, those few rows decide all of dq, dk and dv, so a real backward at full size is held to them as a whole. Of a
long sequence without an order the last segments alone are looked at: no row of theirs meets one before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilated_attention_pytorch.config import Problem, head_offsets

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Some tokens of a problem, and what their results must be.

    Attributes:
        tokens: int64 (R,).
        dout: (B, R, H, D); it is zero for every other token.
        out: (B, R, H, D), float64.
        gradients: dq, dk and dv for this dout, float64: of the tokens from `start` on, zero before.
        start: The first token that the drawn ones can meet.
    """

    tokens: Tensor
    dout: Tensor
    out: Tensor
    gradients: tuple[Tensor, ...]
    start: int = 0

    def errors(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
        """Relative errors of out and gradients of a call, in the Frobenius norm; NaN where any row of out holds one."""
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        dout = torch.zeros_like(out)
        dout[:, self.tokens] = self.dout
        gradients = torch.autograd.grad(out, inputs, dout)
        found = {"out": self._error_of(out.detach())}
        for name, actual, true in zip(("dq", "dk", "dv"), gradients, self.gradients, strict=True):
            stray = float(torch.linalg.vector_norm(actual[:, : self.start], dtype=torch.float32))
            found[name] = math.hypot(relative_error(actual[:, self.start :], true), stray / float(true.norm()))
        return found

    def forward_error(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
        """The relative error of out alone, where there is no memory for a backward."""
        with torch.no_grad():
            return self._error_of(attend(q, k, v))

    def _error_of(self, out: Tensor) -> float:
        poison = 0.0 * float(out.sum(dtype=torch.float32))
        return relative_error(out[:, self.tokens], self.out) + poison


def relative_error(actual: Tensor, true: Tensor) -> float:
    """‖actual - true‖ / ‖true‖."""
    return ((actual.double() - true).norm() / true.norm()).item()


def sample(problem: Problem, count: int, device: torch.device, seed: int = 0, start: int = 0) -> Tensor:
    """The first token from `start` on, the last, and others at random: int64 (R,), ascending."""
    drawn = torch.randperm(problem.length - start, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.cat([drawn + start, torch.tensor([start, problem.length - 1])]).unique().to(device)


def last_segments(problem: Problem) -> int:
    """The first token of the last stretch that every branch cuts off: what comes before meets nothing behind it."""
    widths = [problem.segment(branch) for branch in range(len(problem.branches))]
    stretch = math.lcm(*widths)
    alone = problem.order == "none" and problem.padding == "none" and problem.length > 0
    return (problem.length - 1) // stretch * stretch if alone else 0


def truth(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    tokens: Tensor,
    *,
    order: Tensor | None = None,
    mix_grad: str = "exact",
) -> Rows:
    """Results of these tokens, as `reference.dilated_attention` defines them.

    Args:
        problem: Not masked, with as many key/value heads as query heads.
        q, k, v, dout: (B, N, H, D).
        tokens: int64 (R,). Memory goes with R·H and the tokens that they can meet.
        order: Steps -> tokens, int64 (N,).
        mix_grad: "exact" or "detached".
    """
    start = last_segments(problem)
    start = start if bool((tokens >= start).all()) else 0
    inputs = [x[:, start:].detach().double().requires_grad_() for x in (q, k, v)]
    seen = replace(problem, length=problem.length - start, branches=_acting(problem))
    met = meetings(seen, tokens - start, order)
    out = _attention(*inputs, tokens - start, met, phantoms(seen, tokens - start, order), mix_grad)
    gradients = torch.autograd.grad(out, inputs, dout[:, tokens].double())
    return Rows(tokens, dout[:, tokens], out.detach(), gradients, start)


def _acting(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Branches with the segments that act."""
    return tuple((problem.segment(branch), rate) for branch, (_, rate) in enumerate(problem.branches))


def meetings(problem: Problem, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Whether a token asks a key token in a branch: bool (branches, H, R, N)."""
    step = torch.arange(problem.length, device=tokens.device) if order is None else torch.argsort(order)
    met = []
    for branch, (_, rate) in enumerate(problem.branches):
        width = problem.segment(branch)
        offsets = torch.tensor(head_offsets(problem.head_offset, problem.heads, rate), device=tokens.device)
        kept = step % width % rate == offsets[:, None]  # [H, N]
        asks = kept[:, tokens] if problem.queries == "dilated" else torch.ones_like(kept[:, tokens])
        seen = step[tokens, None] // width == step // width  # [R, N]
        if problem.causal:
            seen = seen & (torch.arange(problem.length, device=tokens.device) <= tokens[:, None])
        met.append(asks[:, :, None] & kept[:, None, :] & seen)
    return torch.stack(met)


def phantoms(problem: Problem, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Keys of score 0 and value 0 that a token meets in a branch: int64 (branches, H, R), or (1, 1, 1) zeros."""
    if problem.padding == "none" or problem.causal:
        return torch.zeros(1, 1, 1, dtype=torch.int64, device=tokens.device)
    counted = meetings(problem, tokens, order).sum(3)
    rows = torch.tensor([problem.rows(branch) for branch in range(len(problem.branches))], device=tokens.device)
    return torch.where(counted > 0, rows[:, None, None] - counted, 0)


def _attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, met: Tensor, unreal: Tensor, mix_grad: str) -> Tensor:
    """out (B, R, H, D) of the tokens: one softmax over the keys of all branches, with their multiplicities."""
    scores = q.shape[3] ** -0.5 * torch.einsum("brhd,bnhd->bhrn", q[:, tokens], k)
    peak = scores.detach().amax(3, keepdim=True)
    weights = torch.exp(scores - peak)
    masses = torch.stack([(weights * of_branch).sum(3) for of_branch in met])  # [branches, B, H, R]
    masses = masses + unreal[:, None] * torch.exp(-peak[..., 0])
    total = masses.sum(0)
    shares = masses / total.masked_fill(total == 0, 1.0)
    if mix_grad == "detached":
        shares = shares.detach()
    # A branch that a token does not ask has no mass and no keys: 0/1.
    per_mass = shares / masses.masked_fill(masses == 0, 1.0)
    mixed = torch.zeros_like(weights)
    for of_branch, share in zip(met, per_mass, strict=True):
        mixed = mixed + weights * of_branch * share[..., None]
    return torch.einsum("bhrn,bnhd->brhd", mixed, v)
