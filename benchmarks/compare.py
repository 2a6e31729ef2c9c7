"""Several ways to one attention: each held to the oracle on some rows of its real run, then timed in turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from benchmarks import rows
from benchmarks.rows import Attend
from benchmarks.timing import Spread, interleaved, peak_bytes
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.precision import TOLERANCES
from dilated_attention_pytorch.tuning.screen import DTYPES

SAMPLED = 16
"""Rows drawn for the oracle, besides the first and the last; of all heads and batch elements."""

ROUNDS = 5


@dataclass(frozen=True)
class Contender:
    """One way to compute a problem.

    Attributes:
        make: Builds it: compiles, lists rows; not timed.
        mix_grad: The rule of its gradients, "exact" or "detached".
        problem: What it computes, where that is not quite what was asked.
        packed: It takes rows that somebody has gathered, (segments, H, rows, D).
        compiles: Its first call takes seconds, and leaves something on the disk for the next process.
    """

    make: Callable[[], Attend]
    mix_grad: str = "exact"
    problem: Problem | None = None
    packed: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Row:
    """What was found of a contender.

    Attributes:
        errors: Relative errors of out, dq, dk and dv against the oracle.
        forward, both: Times without and with the backward, in milliseconds.
        peak: The most bytes that forward and backward took at once.
    """

    errors: dict[str, float]
    forward: Spread
    both: Spread
    peak: int


def too_large(errors: Mapping[str, float], dtype: str) -> str:
    """The errors of out and gradients that are above the contract's bounds, or NaN, in words; "" where none is."""
    bound = TOLERANCES[dtype]
    return ", ".join(
        f"{name} is wrong by {error:.0e}"
        for name, error in errors.items()
        if not error <= (bound.out if name == "out" else bound.grad)
    )


def ours(problem: Problem, backend: str | None, order: TokenOrder | None = None) -> Attend:
    """This package.

    Args:
        problem: What is computed.
        backend: As in `dilated_attention`.
        order: The problem's order, where its kind does not tell all of it.
    """
    lengths, rates = zip(*problem.branches, strict=True)
    return partial(
        dap.dilated_attention,
        segment_lengths=lengths,
        dilation_rates=rates,
        queries=problem.queries,
        head_offset=problem.head_offset,
        order=order or (None if problem.order == "none" else problem.order),
        is_causal=problem.causal,
        padding=problem.padding,
        mix_grad=problem.mix_grad,
        backend=backend,
    )


def random_tensors(problem: Problem, count: int, device: torch.device) -> list[Tensor]:
    """q, k, v, dout, …: (B, N, H, D) each, seeded."""
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(DTYPES[problem.dtype]) for _ in range(count)]


def compare(
    problem: Problem,
    contenders: Mapping[str, Contender],
    device: torch.device,
    *,
    order: Tensor | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Row | str]:
    """Check and time contenders on random inputs.

    Args:
        problem: As in `rows.truth`.
        contenders: By name.
        device: Where they run.
        order: The problem's order, steps -> tokens.
        rounds: How often each is timed at most.
        progress: Told `steps(contenders, rounds)` times what was done.

    Returns:
        By name, a row, or why there is none.
    """
    forget_compiled()
    q, k, v, dout = random_tensors(problem, 4, device)
    tokens = rows.sample(problem, SAMPLED, device)
    true = {
        rule: rows.truth(problem, q, k, v, dout, tokens, order=order, mix_grad=rule)
        for rule in {contender.mix_grad for contender in contenders.values()}
    }
    found: dict[str, Row | str] = {}
    errors, attends = {}, {}
    for name, contender in contenders.items():
        try:
            attends[name] = contender.make()
            errors[name] = true[contender.mix_grad].errors(attends[name], q, k, v)
        except Exception as error:  # a peer that cannot do this problem is a row of the table
            attends.pop(name, None)
            found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        progress(f"checked {name}")

    forward_calls = {name: forward_call(attend, q, k, v) for name, attend in attends.items()}
    both_calls = {name: both_call(attend, q, k, v, dout) for name, attend in attends.items()}
    forward = interleaved(forward_calls, device, rounds, lambda: progress("timed forward"))
    both = interleaved(both_calls, device, rounds, lambda: progress("timed forward and backward"))
    for name, call in both_calls.items():
        found[name] = Row(errors[name], forward[name], both[name], peak_bytes(call, device))
    return {name: found[name] for name in contenders}


def forget_compiled() -> None:
    """Let go what `torch.compile` made for earlier cases: it counts against the limit of recompilations."""
    if "torch._dynamo" in sys.modules:  # it takes seconds to import
        torch.compiler.reset()


def steps(contenders: Mapping[str, Contender], rounds: int = ROUNDS) -> int:
    """How often `compare` tells its progress."""
    return len(contenders) + 2 * rounds


def forward_call(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """A call without gradients."""

    def call() -> object:
        with torch.no_grad():
            return attend(q, k, v)

    return call


def both_call(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], object]:
    """A forward and its backward."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*inputs), inputs, dout)
