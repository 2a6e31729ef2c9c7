"""One case: every contender is checked against the oracle, then all of them are timed in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import composed, rows
from benchmarks.cases import Case, zero_bytes
from benchmarks.compare import SAMPLED, Contender, both_call, forget_compiled, forward_call
from benchmarks.rows import Attend
from benchmarks.timing import Call, Failed, before, host_us, peak_bytes, samples, summary
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.precision import TOLERANCES
from dilated_attention_pytorch.tuning.screen import DTYPES

PEERS_SLACK = 4.0
"""A peer may be so many times less exact than we must be: it rounds between its branches."""

POISON_BYTES = 1 << 31
SMALL_BYTES = 1 << 19
"""Blocks above and below 1 MiB come out of different pools of torch's allocator."""

Row = dict[str, Any]


class Sticky(Exception):
    """After this error of a contender the process can do nothing more on the GPU."""


@dataclass(frozen=True)
class Settings:
    """How thoroughly.

    Attributes:
        rounds: How often each contender is timed at most.
        patience: Seconds after which no further round of a measurement begins.
        slack: Of peers; see `PEERS_SLACK`.
    """

    rounds: int = 21
    patience: float = 3.0
    slack: float = PEERS_SLACK


def measure(
    case: Case,
    contenders: Mapping[str, Contender],
    where: torch.device,
    settings: Settings,
    *,
    ours: str,
    without: Mapping[str, str] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Row]:
    """Rows of a case by contender: errors and measurements, or `failed` with the reason.

    Args:
        case: What is measured.
        contenders: Who takes part.
        where: The torch device.
        settings: How thoroughly.
        ours: Who is held to the contract's own tolerance.
        without: Contenders that are not tried, with the reason.
        note: Told what is being done.

    Raises:
        Sticky: A contender spoiled the GPU; its name, and the reason as the cause.
    """
    forget_compiled()
    run = _Run(case, contenders, where, settings, note)
    run.check(ours, without or {})
    run.time("forward", lambda attend, *tensors: forward_call(attend, *tensors[:3]))
    if case.level == "kernels":
        run.time("backward", _Backward, gradients=True)
    else:
        run.time("both", both_call, gradients=True)
        run.beside_the_times(host=case.level == "operations")
    found = run.found
    del run
    release()
    return found


class _Run:
    """The contenders of a case that are still in it, and their tensors."""

    def __init__(
        self,
        case: Case,
        contenders: Mapping[str, Contender],
        where: torch.device,
        settings: Settings,
        note: Callable[[str], None],
    ) -> None:
        self._case, self._contenders, self._where, self._settings, self._note = case, contenders, where, settings, note
        self._attends: dict[str, Attend] = {}
        self._inputs = Inputs(case.problem, where)
        self.found: dict[str, Row] = {name: {} for name in contenders}

    def check(self, ours: str, without: Mapping[str, str]) -> None:
        """Hold each to the oracle; who fails is out."""
        truth = _Truth(self._case, self._inputs.whole)
        for name in sorted(self._contenders, key=lambda name: truth.key(self._contenders[name])):
            if name in without:
                self.found[name]["failed"] = without[name]
                continue
            self._note(f"checking {name}")
            with _reason(self.found, name):
                contender = self._contenders[name]
                attend = contender.make()
                errors = truth.errors(contender, attend)
                self.found[name]["errors"] = {
                    result: float(f"{error:.2e}") if math.isfinite(error) else None for result, error in errors.items()
                }
                slack = 1.0 if name == ours else self._settings.slack
                if wrong := _wrong(errors, self._case.problem.dtype, slack):
                    self.found[name]["failed"] = wrong
                else:
                    self._attends[name] = attend
            release()

    def time(self, measurement: str, make: Callable[..., Call], *, gradients: bool = False) -> None:
        """Time all that are left in turns; who fails is out, and the others begin again."""
        self._note(measurement)
        calls: dict[str, Call] = {}
        zeros = self._inputs.zero_rows(measurement) if self._case.level == "kernels" else None
        for name in self._left(gradients):
            with _reason(self.found, name):
                contender = self._contenders[name]
                call = make(self._attends[name], *self._inputs.of(contender))
                calls[name] = call if zeros is None or not contender.packed else _Filling(call, zeros)
        while calls:
            try:
                times = samples(calls, self._where, self._settings.rounds, patience=self._settings.patience)
            except Failed as failed:
                name, cause = str(failed), failed.__cause__ or failed
                del calls[name]
                release()
                with _reason(self.found, name):
                    raise cause from None
                continue
            for name, taken in times.items():
                self.found[name][f"{measurement}_ms"] = summary(taken)
            return

    def beside_the_times(self, *, host: bool) -> None:
        """Peaks of memory above the inputs, and what the host takes to queue a call."""
        for name in self._left():
            self._note(f"memory and host of {name}")
            with _reason(self.found, name, "failed_beside"):  # its times hold
                attend, tensors = self._attends[name], self._inputs.of(self._contenders[name])
                calls = {"forward": forward_call(attend, *tensors[:3])}
                if name in self._left(gradients=True):
                    calls["both"] = both_call(attend, *tensors)
                self.found[name]["peak_bytes"] = {
                    measurement: peak_bytes(call, self._where) for measurement, call in calls.items()
                }
                if host:
                    self.found[name]["host_us"] = _host(attend, tensors, self._where)

    def _left(self, gradients: bool = False) -> list[str]:
        """Who did not fail; with gradients: nor lacked the memory for them."""
        left = [name for name in self._contenders if name in self._attends and "failed" not in self.found[name]]
        return [name for name in left if not gradients or "dq" in self.found[name]["errors"]]


def _host(attend: Attend, tensors: Sequence[Tensor], where: torch.device) -> dict[str, float]:
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    calls = {
        "forward": forward_call(attend, *tensors[:3]),
        "autograd forward": lambda: attend(*inputs),
        "backward": _Backward(attend, *tensors),
    }
    return {name: round(host_us(call, where), 1) for name, call in calls.items()}


class _Backward:
    """The backward by itself. Each has a forward of its own: what `torch.compile` makes keeps nothing for a second."""

    def __init__(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        self._inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        self._attend, self._dout = attend, dout
        self._outs: list[Tensor] = []

    def before(self) -> None:
        """A forward for one call."""
        self._outs.append(self._attend(*self._inputs))

    def __call__(self) -> object:
        """All three gradients."""
        return torch.autograd.grad(self._outs.pop(), self._inputs, self._dout)


class _Filling:
    """A call on gathered rows, and behind it as many zeros as the whole results have besides: a kernel that writes into
    them has the same to do. Behind it, as what is written last need not have reached the memory when time is up."""

    def __init__(self, call: Call, zeros: Tensor) -> None:
        self._call, self._zeros = call, zeros

    def before(self) -> None:
        """As the call's own."""
        before(self._call)

    def __call__(self) -> object:
        """What the call gives."""
        found = self._call()
        self._zeros.zero_()
        return found


# ---- Inputs ----------------------------------------------------------------------------------------------------------


class Inputs:
    """q, k, v and dout for contenders of either kind: other numbers in every run."""

    def __init__(self, problem: Problem, where: torch.device) -> None:
        shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
        self.whole = [torch.randn(shape, device=where, dtype=DTYPES[problem.dtype]) for _ in range(4)]
        self._problem = replace(problem, order="none", row_width=0)
        self._packed: list[Tensor] | None = None

    def of(self, contender: Contender) -> list[Tensor]:
        """For who takes gathered rows they are gathered before anything is timed."""
        if not contender.packed:
            return self.whole
        if self._packed is None:
            self._packed = [composed.packed(self._problem, x) for x in self.whole]
        return self._packed

    def zero_rows(self, measurement: str) -> Tensor | None:
        """Memory of the size of the zero rows that a measurement's results have; None where they have none."""
        size = int(zero_bytes(self._problem)[measurement])
        # Of float32 where torch fills four a store.
        return torch.empty(size // 4, dtype=torch.float32, device=self.whole[0].device) if size else None


# ---- Checking --------------------------------------------------------------------------------------------------------


class _Truth:
    """What must come out of a case, by the rules of a contender.

    Only the last rules' is kept: each takes as much memory as the inputs in float64.
    """

    def __init__(self, case: Case, tensors: Sequence[Tensor]) -> None:
        self._case, self._tensors = case, tensors
        self._known: tuple[str, rows.Rows] | None = None

    @staticmethod
    def key(contender: Contender) -> str:
        """Contenders with the same one are held to the same."""
        return f"{contender.problem} {contender.mix_grad}"

    def errors(self, contender: Contender, attend: Attend) -> dict[str, float]:
        """Errors of a whole call, on memory that was poisoned before."""
        problem, where = contender.problem or self._case.problem, self._tensors[0].device
        order = None
        if problem.order != "none" and self._case.order is not None:
            order = self._case.order.indices(problem.length).to(where)
        if contender.packed:
            attend = composed.attention(problem, partial(_with_lse, attend), order=order)
        if self._known is None or self._known[0] != self.key(contender):
            self._known = None
            tokens = rows.sample(problem, SAMPLED, where, start=rows.last_segments(problem))
            true = rows.truth(problem, *self._tensors, tokens, order=order, mix_grad=contender.mix_grad)
            self._known = self.key(contender), true
        poison(where)
        try:
            return self._known[1].errors(attend, *self._tensors[:3])
        except torch.OutOfMemoryError:
            if self._case.level != "scale":
                raise
        release()
        return {"out": self._known[1].forward_error(attend, *self._tensors[:3])}


def _with_lse(kernel: Attend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Of a branch alone nobody asks for lse."""
    return kernel(q, k, v), q.new_empty(q.shape[:3])


def poison(where: torch.device) -> None:
    """Leave NaN in the memory that the next allocations will be given: who does not write an element, shows it."""
    if where.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(where)
    blocks = [torch.full((min(POISON_BYTES, free // 4),), 255, dtype=torch.uint8, device=where)]
    blocks += [torch.full((SMALL_BYTES,), 255, dtype=torch.uint8, device=where) for _ in range(64)]
    del blocks


def _wrong(errors: Mapping[str, float], dtype: str, slack: float) -> str:
    """Which results are further from the oracle than is allowed, in words; "" where none is."""
    bound = TOLERANCES[dtype]
    allowed = {name: slack * (bound.out if name == "out" else bound.grad) for name in errors}
    return ", ".join(
        f"{name} is wrong by {error:.1e}, more than {allowed[name]:.0e}"
        for name, error in errors.items()
        if not error <= allowed[name]
    )


# ---- Failing ---------------------------------------------------------------------------------------------------------


class _reason:
    """Write down why a contender failed, and go on without it."""

    def __init__(self, found: dict[str, Row], name: str, where: str = "failed") -> None:
        self._row, self._name, self._where = found[name], name, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._row[self._where] = told(error)
        if is_sticky(error):
            raise Sticky(self._name) from error
        return True


def told(error: BaseException) -> str:
    """Class and first line of an exception."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def is_sticky(error: BaseException) -> bool:
    """A CUDA error after which every later call of the process fails."""
    signs = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
    return any(sign in str(error) for sign in signs)


def release() -> None:
    """Give back what nobody holds."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# ---- Ceilings --------------------------------------------------------------------------------------------------------


def ceilings(where: torch.device, side: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """What this GPU does at best: a large matrix product in 10^12 operations a second, a copy in 10^12 bytes."""
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(copied, dtype=torch.uint8, device=where) for _ in range(2))
    source.random_()
    times = samples({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, where, rounds=15)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "matmul_tflops": round(2 * side**3 / medians["matmul"] / 1e9, 1),
        "copy_tb_s": round(2 * copied / medians["copy"] / 1e9, 3),
    }
