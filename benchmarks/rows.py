"""The oracle where the oracle is too slow: a few query rows of a real run, in float64, and the gradients they give.

out is computed for some tokens from all keys, by definition. Gradients are linear in dout: with a dout that is zero
elsewhere, those few rows decide all of dq, dk and dv, so a real backward at full size is held to them as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_attention_pytorch.config import Problem, head_offsets

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Some tokens of a problem, and what their results must be.

    Attributes:
        tokens: int64 (R,).
        dout: (B, N, H, D), zero for every other token.
        out: (B, R, H, D), float64.
        gradients: dq, dk and dv (B, N, H, D) for this dout, float64.
    """

    tokens: Tensor
    dout: Tensor
    out: Tensor
    gradients: tuple[Tensor, ...]

    def errors(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
        """Relative errors of out and of the gradients of a call, in the Frobenius norm; NaN where it gave one."""
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, self.dout)
        found = {"out": relative_error(out.detach()[:, self.tokens], self.out)}
        for name, actual, true in zip(("dq", "dk", "dv"), gradients, self.gradients, strict=True):
            found[name] = relative_error(actual, true)
        return found


def relative_error(actual: Tensor, true: Tensor) -> float:
    """‖actual - true‖ / ‖true‖."""
    return ((actual.double() - true).norm() / true.norm()).item()


def sample(problem: Problem, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """The first token, the last, and others at random: int64 (R,), ascending."""
    drawn = torch.randperm(problem.length, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.cat([drawn, torch.tensor([0, problem.length - 1])]).unique().to(device)


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
        problem: Neither causal nor masked nor padded, with as many key/value heads as query heads.
        q, k, v, dout: (B, N, H, D).
        tokens: int64 (R,). Memory goes with R·N·H.
        order: Steps -> tokens, int64 (N,).
        mix_grad: "exact" or "detached".
    """
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    met = meetings(problem, tokens, order)
    out = _attention(*inputs, tokens, met, mix_grad)
    only = torch.zeros_like(dout)
    only[:, tokens] = dout[:, tokens]
    gradients = torch.autograd.grad(out, inputs, only[:, tokens].double())
    return Rows(tokens, only, out.detach(), gradients)


def meetings(problem: Problem, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Whether a token asks a key token in a branch: bool (branches, H, R, N)."""
    step = torch.arange(problem.length, device=tokens.device) if order is None else torch.argsort(order)
    met = []
    for branch, (_, rate) in enumerate(problem.branches):
        width = problem.segment(branch)
        offsets = torch.tensor(head_offsets(problem.head_offset, problem.heads, rate), device=tokens.device)
        kept = step % width % rate == offsets[:, None]  # [H, N]
        asks = kept[:, tokens] if problem.queries == "dilated" else torch.ones_like(kept[:, tokens])
        same_segment = step[tokens, None] // width == step // width  # [R, N]
        met.append(asks[:, :, None] & kept[:, None, :] & same_segment)
    return torch.stack(met)


def _attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, met: Tensor, mix_grad: str) -> Tensor:
    """out (B, R, H, D) of the tokens: one softmax over the keys of all branches, with their multiplicities."""
    scores = q.shape[3] ** -0.5 * torch.einsum("brhd,bnhd->bhrn", q[:, tokens], k)
    weights = torch.exp(scores - scores.detach().amax(3, keepdim=True))
    masses = torch.stack([(weights * of_branch).sum(3) for of_branch in met])  # [branches, B, H, R]
    shares = masses / masses.sum(0)
    if mix_grad == "detached":
        shares = shares.detach()
    # A branch that a token does not ask has no mass and no keys: 0/1.
    per_mass = shares / masses.masked_fill(masses == 0, 1.0)
    mixed = torch.zeros_like(weights)
    for of_branch, share in zip(met, per_mass, strict=True):
        mixed = mixed + weights * of_branch * share[..., None]
    return torch.einsum("bhrn,bnhd->brhd", mixed, v)
