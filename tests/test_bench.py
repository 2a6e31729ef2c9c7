"""The benchmarks' run with stand-ins on a CPU: what it checks, survives, keeps and resumes."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import composed, measure, prepare, results, rows, timing
from benchmarks.cases import Case, catalogue, least_bytes, limits_ms, selected, useful_flops, zero_bytes
from benchmarks.compare import SAMPLED, Contender, ours, random_tensors
from benchmarks.contenders import OURS, contenders
from benchmarks.measure import Settings, Sticky
from benchmarks.rows import Attend
from benchmarks.run import Shown, run
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.tuning.worker import Lost, NoStart, Raised
from dilated_attention_pytorch.workloads import WORKLOADS

CPU = torch.device("cpu")
QUICK = Settings(rounds=2, patience=0.0)
CEILINGS = {"matmul_tflops": 1.0, "copy_tb_s": 0.1}
PEER, WRONG, UNWRITTEN, CRASHING, LATE = "composition", "wrong", "unwritten", "crashing", "crashing later"

KERNEL = Case("kernel-n8-d8-r2-snake", "kernels", Problem("fp32", 1, 64, 4, 4, 8, ((16, 2),)), "kernels", 1)
KERNEL = replace(KERNEL, problem=replace(KERNEL.problem, order="snake", row_width=8), order=TokenOrder("snake"))
OPERATION = Case("op-tiny", "operations", Problem("fp32", 1, 61, 4, 4, 8, ((16, 1), (31, 2))), "tiny", 1)


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """A library's kernel."""
    scores = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def standing_in(case: Case, where: torch.device) -> dict[str, Contender]:
    """Ours, one that is right, and in whole operations those that are not."""
    found = {OURS: Contender(partial(ours, case.problem, "torch", case.order))}
    if case.level == "kernels":
        return found | {PEER: Contender(lambda: lambda q, k, v: softmax(q, k, v, False)[0], packed=True)}
    right = composed.attention(case.problem, softmax)

    def crashing() -> Attend:
        raise RuntimeError("no such | kernel\nand more")

    return found | {
        PEER: Contender(lambda: right, mix_grad="detached"),
        WRONG: Contender(lambda: lambda q, k, v: 1.001 * right(q, k, v), mix_grad="detached"),
        UNWRITTEN: Contender(lambda: lambda q, k, v: right(q, k, v) + _nan_in_one_row(q), mix_grad="detached"),
        CRASHING: Contender(crashing, mix_grad="detached"),
        LATE: Contender(lambda: _crashing_at(right, 3), mix_grad="detached"),
    }


def _nan_in_one_row(x: Tensor) -> Tensor:
    """In a row that the oracle does not look at."""
    drawn = rows.sample(OPERATION.problem, SAMPLED, CPU).tolist()
    poison = torch.zeros_like(x)
    poison[0, next(token for token in range(x.shape[1]) if token not in drawn), 1, 2] = torch.nan
    return poison


def _crashing_at(attend: Attend, last: int) -> Attend:
    calls = iter(range(last))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise RuntimeError("a later call")
        return attend(q, k, v)

    return call


def quick_run(path: Path, cases: list[Case], **how: object) -> results.Document:
    given = {"budget": 1e9, "resume": False, "processes": 0, "participants": standing_in, "shown": Silent} | how
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "peak_bytes", lambda call, where: 1)  # torch's profiler takes seconds to begin
        patch.setattr(timing, "HOST_SERIES", 1)
        return run(cases, CPU, path, QUICK, ceilings=lambda where: CEILINGS, **given)  # type: ignore[arg-type]


class Silent(Shown):
    """Shows nothing."""

    def done(self, name: str, case: object) -> None:
        """A case is done."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> results.Document:
    """A run of both kinds of cases, as its file has it."""
    path = tmp_path_factory.mktemp("bench") / "bench_cpu.json"
    quick_run(path, [KERNEL, OPERATION])
    return results.load(path)


def test_who_is_right_is_timed(measured: results.Document) -> None:
    """A measurement that is missing, or a share of the limit of another shape."""
    kernel, operation = (measured["cases"][case.name] for case in (KERNEL, OPERATION))
    for who in (OURS, PEER):
        assert max(kernel["rows"][who]["errors"].values()) < 1e-5
        assert all(time > 0 for name in ("forward_ms", "backward_ms") for time in kernel["rows"][who][name])
        assert operation["rows"][who].keys() == {"errors", "forward_ms", "both_ms", "peak_bytes", "host_us"}
    median, low, high = operation["rows"][OURS]["both_ms"]
    assert low <= median <= high
    assert operation["limit_ms"] == {
        name: round(value, 5) for name, value in limits_ms(OPERATION.problem, 1.0, 0.1).items()
    }
    assert operation["launches"] == ["torch"]
    (ran,) = measured["runs"]
    assert ran["left_out"] == []
    assert ran["zero_rows"] == results.ZERO_ROWS
    assert {"commit", "torch", "cpu"} <= ran["environment"].keys()
    assert json.loads(json.dumps(measured)) == measured


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        (WRONG, "out is wrong by 1.0e-03"),
        (UNWRITTEN, "out is wrong by nan"),
        (CRASHING, "RuntimeError: no such | kernel"),
        (LATE, "RuntimeError: a later call"),
    ],
)
def test_who_is_not_is_a_row_with_its_reason(measured: results.Document, who: str, reason: str) -> None:
    """A contender that is timed though it is wrong, or whose crash ends the run, or with more than a line of it."""
    row = measured["cases"][OPERATION.name]["rows"][who]
    assert row["failed"].startswith(reason)
    assert "\n" not in row["failed"]
    assert results.median(row, "forward") is None
    assert results.best_peer(measured["cases"][OPERATION.name], "both")[0] == PEER  # type: ignore[index]


def test_peers_fill_the_zero_rows_in_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that writes a quarter of what we must, or one that pays for zeros where there are none."""
    timed: list[dict[str, timing.Call]] = []

    def noting(calls: dict[str, timing.Call], *given: object, **how: object) -> dict[str, list[float]]:
        timed.append(dict(calls))
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(measure, "samples", noting)
    whole = replace(KERNEL, problem=replace(KERNEL.problem, branches=((16, 1),)))
    for case in (KERNEL, whole):
        measure.measure(case, standing_in(case, CPU), CPU, QUICK, ours=OURS)
    results_of_a_row = {"forward": 1, "backward": 3}
    for calls, tensors in zip(timed[:2], results_of_a_row.values(), strict=True):
        assert not isinstance(calls[OURS], measure._Filling)
        filling = calls[PEER]
        assert isinstance(filling, measure._Filling)
        zeros = filling._zeros.fill_(1.0)
        assert 4 * zeros.numel() == tensors * (64 * 4 * 8 * 4) // 2
        filling.before()
        filling()
        assert not zeros.any()
    assert not any(isinstance(call, measure._Filling) for calls in timed[2:] for call in calls.values())


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A case measured twice, or one that is lost when another is measured."""
    path = tmp_path / "bench.json"
    asked: list[str] = []

    def noting(case: Case, where: torch.device) -> dict[str, Contender]:
        asked.append(case.name)
        return {OURS: standing_in(case, where)[OURS]}

    once = partial(quick_run, path, participants=noting)
    once([KERNEL])
    once([KERNEL, OPERATION], resume=True)
    assert asked == [KERNEL.name, OPERATION.name]
    document = once([OPERATION])
    assert asked[2:] == [OPERATION.name]
    assert list(document["cases"]) == [KERNEL.name, OPERATION.name]
    assert len(document["runs"]) == 1  # the same environment and settings
    del document["runs"][0]["zero_rows"]
    results.save(document, path)
    assert [results.zero_rows(ran) for ran in once([KERNEL])["runs"]] == [results.ZERO_ROWS_ONCE, results.ZERO_ROWS]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_no_case_begins_behind_the_budget(tmp_path: Path) -> None:
    """A run that is killed at its limit in place of one that ends before it, and does not say what is missing."""
    document = quick_run(tmp_path / "bench.json", [KERNEL, OPERATION], budget=0.0)
    assert document["cases"] == {}
    assert document["runs"] == []


def test_who_spoils_the_gpu_is_not_tried_again(tmp_path: Path) -> None:
    """Every later case would fail with the same error, for ever."""
    path = tmp_path / "bench.json"

    def spoiling(case: Case, where: torch.device) -> dict[str, Contender]:
        def make() -> Attend:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return {OURS: standing_in(case, where)[OURS], "spoiling": Contender(make)}

    with pytest.raises(Sticky, match="spoiling"):
        quick_run(path, [KERNEL, OPERATION], participants=spoiling)
    row = quick_run(path, [KERNEL], participants=spoiling, resume=True)["cases"][KERNEL.name]["rows"]
    assert "illegal memory access" in row["spoiling"]["failed"]
    assert "forward_ms" in row[OURS]


def test_no_memory_for_a_case_is_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest sequence of a scale ends the run."""

    def none(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "Inputs", none)
    document = quick_run(tmp_path / "bench.json", [KERNEL])
    assert "no memory for the inputs" in document["cases"][KERNEL.name]["rows"][OURS]["failed"]


# ---- Preparing -------------------------------------------------------------------------------------------------------


class StandInWorker:
    """Answers with what the name of the contender says."""

    answers: ClassVar[dict[str, object]] = {}

    def __init__(self, setup: object, where: str) -> None:
        self.busy, self.seconds_left, self.connection = False, 0.0, None

    def submit(self, job: prepare.Job, seconds: float) -> None:
        """Take a job."""
        self._job, self.busy = job, True

    def answer(self) -> object:
        """What came of it; None while it runs."""
        found = self.answers.get(self._job[1], "")
        self.busy = found is None
        return found

    def stop(self) -> None:
        """End."""


def test_who_ends_its_process_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while preparing would be one while timing; who only had no time is told apart."""
    monkeypatch.setattr(prepare, "Worker", StandInWorker)
    StandInWorker.answers = {
        "killed": Lost(False, "its process ended: killed by SIGSEGV"),
        "spoiling": Raised("RuntimeError", "RuntimeError: CUDA error", fatal=True),
        "raising": "RuntimeError: no",
        "unstarted": NoStart("no GPU"),
        "slow": None,
    }
    jobs = [(KERNEL, name) for name in ("killed", "spoiling", "raising", "fine", "unstarted", "slow", "waiting")]
    found = prepare.prepare(jobs, "cpu", seconds=0.3, processes=1)
    assert {name for _, name in found.failed} == {"killed", "spoiling"}
    assert [name for _, name in found.left] == ["unstarted", "slow", "waiting"]


def test_what_is_prepared() -> None:
    """FlashAttention-4 compiled for each of many lengths, or a contender compiled for the first time when timed."""
    cases = selected(("kernels", "scale", "operations"), tier=2)
    jobs = prepare.jobs(cases, CPU)
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert len(set(jobs)) == len(jobs)
    assert jobs[0][0].level == "operations"
    wanted = {(case.name, name) for case in cases for name, who in contenders(case, CPU).items() if who.compiles}
    missing = wanted - {(case.name, name) for case, name in jobs}
    assert {name.partition("-")[0] for name, _ in missing} == {"scale"}


# ---- Cases -----------------------------------------------------------------------------------------------------------


def test_the_catalogue() -> None:
    """A name that stands for two cases, a workload that nobody measures, or a third tier before the first."""
    cases = catalogue()
    assert len({case.name for case in cases}) == len(cases)
    assert [case.tier for case in cases] == sorted(case.tier for case in cases)
    assert {case.workload for case in cases} == {*WORKLOADS, "kernels", "branch"}
    assert {case.problem.branches[0][1] for case in cases if case.level == "kernels"} == {1, 2, 4, 8}
    assert [case.name for case in selected(("kernels",), pattern="*n2048-d64-r4*snake")] == [
        "kernel-n2048-d64-r4-snake"
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_those_of_the_pairs(causal: bool) -> None:
    """Useful work that counts short segments as whole ones, or a branch twice."""
    problem = Problem("fp32", 2, 96, 4, 4, 8, ((32, 1), (40, 2), (96, 4)), causal=causal)
    pairs = int(rows.meetings(problem, torch.arange(96), None).sum())
    assert useful_flops(problem) == pytest.approx(2 * 4 * 8 * pairs, rel=0.08 if causal else 1e-9)


def test_bytes_of_a_dilated_branch() -> None:
    """A limit in which rows that nobody reads count, or zero rows that must be written do not."""
    whole, dilated = (Problem("bf16", 1, 64, 4, 4, 8, ((16, rate),)) for rate in (1, 4))
    row, lse = 64 * 4 * 8 * 2, 64 * 4 * 4
    assert least_bytes(whole)["forward"] == 4 * row + lse
    assert least_bytes(dilated)["forward"] == 3 * row / 4 + row + lse / 4
    assert least_bytes(dilated)["backward"] == 5 * row / 4 + lse / 4 + 3 * row
    assert zero_bytes(dilated) == {"forward": 3 * row / 4, "backward": 3 * (3 * row / 4)}
    assert set(zero_bytes(whole).values()) == {0.0}
    everything = replace(dilated, queries="all", head_offset="zero")
    assert zero_bytes(everything) == {"forward": 0.0, "backward": 2 * (3 * row / 4)}


# ---- Peers -----------------------------------------------------------------------------------------------------------

COMPOSED = {
    "longnet": Problem("fp32", 1, 64, 6, 6, 8, ((20, 1), (31, 2), (64, 6))),
    "causal": Problem("fp32", 2, 62, 6, 6, 8, ((20, 1), (31, 3), (62, 6)), causal=True),
    "core": Problem("fp32", 2, 70, 3, 3, 8, ((16, 3),), queries="all", head_offset="zero", order="snake"),
    "gigapath": Problem("fp32", 2, 61, 4, 4, 8, ((16, 1), (32, 2), (999, 4)), head_offset="blocked", padding="zeros"),
    "branch": Problem("fp32", 1, 61, 4, 4, 8, ((17, 2),), head_offset="blocked"),
}


def errors_of(problem: Problem, attend: Attend, order: Tensor | None = None) -> float:
    """The largest, of rows in the last segments."""
    q, k, v, dout = random_tensors(problem, 4, CPU)
    tokens = rows.sample(problem, 9, CPU, start=rows.last_segments(problem))
    true = rows.truth(problem, q, k, v, dout, tokens, order=order, mix_grad="detached")
    return max(true.errors(attend, q, k, v).values())


@pytest.mark.parametrize("apart", [False, True], ids=["gathered", "views"])
@pytest.mark.parametrize("problem", COMPOSED.values(), ids=COMPOSED)
def test_compositions_are_the_oracle_s(problem: Problem, apart: bool) -> None:
    """A peer that computes something else: rows lost in short segments, residues swapped, tails unmixed."""
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)) if problem.order != "none" else None
    assert errors_of(problem, composed.attention(problem, softmax, apart=apart, order=order), order) < 1e-6


@pytest.mark.parametrize("name", ["longnet", "causal", "gigapath", "branch"])
def test_torchscale_s_way(name: str) -> None:
    """Rows put to shifted places where the rate does not divide the segment, as torchscale itself does."""
    problem = COMPOSED[name]
    padded = problem if problem.causal else replace(problem, padding="zeros")
    assert errors_of(padded, composed.torchscale(problem, softmax)) < 1e-6


def test_a_composition_is_one_graph() -> None:
    """A peer that `torch.compile` runs in pieces, with gradients or without."""
    problem = COMPOSED["branch"]
    attend = torch.compile(composed.attention(problem, softmax), fullgraph=True, backend="eager")
    assert errors_of(problem, attend) < 1e-6
    q, k, v = random_tensors(problem, 3, CPU)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), ours(problem, "torch")(q, k, v))


def test_strided_views_are_no_copies() -> None:
    """Copies under another name."""
    x = torch.zeros(1, 48, 4, 8)
    (part,) = composed.parts(Problem("fp32", 1, 48, 4, 4, 8, ((24, 4),)), 0, keys=True)
    assert all(rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for rows in part.apart(x))


@pytest.mark.parametrize("wrong", ["outside", "inside"])
def test_gradients_before_the_last_segments_are_seen(wrong: str) -> None:
    """A kernel that writes into segments that no drawn row meets."""
    problem = replace(COMPOSED["branch"], length=68)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stray = v[:, :5] if wrong == "outside" else v[:, -5:]
        out = ours(problem, "torch")(q, k, v)
        return out + 0.01 * (stray.sum() - stray.detach().sum())

    assert rows.last_segments(problem) == 51
    assert errors_of(problem, ours(problem, "torch")) < 1e-6
    assert errors_of(problem, attend) > 1e-3


# ---- Timing and comparing --------------------------------------------------------------------------------------------


def test_a_backward_is_timed_without_its_forward() -> None:
    """The forward that each backward needs counts as a part of it, or one backward serves twice."""
    seen: list[str] = []

    class Step:
        def before(self) -> None:
            seen.append("f")

        def __call__(self) -> None:
            seen.append("b")

    timing.samples({"step": Step()}, CPU, 2)
    assert "".join(seen) == "fbfbfb"
    seen.clear()
    timing.host_us(Step(), CPU)
    assert "".join(seen) == ("f" * timing.HOST_CALLS + "b" * timing.HOST_CALLS) * timing.HOST_SERIES


def test_the_hopeless_take_no_more_time() -> None:
    """Minutes for a contender that is out of the running, or the others' rounds lost with it."""
    seen: list[str] = []
    calls = {"slow": lambda: time.sleep(0.02), "quick": lambda: seen.append("quick")}
    times = timing.samples(calls, CPU, 9)
    assert {name: len(taken) for name, taken in times.items()} == {"slow": timing.LEAST_ROUNDS, "quick": 9}


def test_the_call_that_fails_is_named() -> None:
    """One contender's crash put down to another."""

    def failing() -> None:
        raise ValueError("no")

    with pytest.raises(timing.Failed, match="second") as caught:
        timing.samples({"first": lambda: None, "second": failing}, CPU, 2)
    assert isinstance(caught.value.__cause__, ValueError)


def document_of(change: Callable[[float], float] = float) -> results.Document:
    """One case, in which the peer takes twice our time; `change` is put on ours."""
    rows = {
        OURS: {"forward_ms": [change(1.0)] * 3, "both_ms": [4.0] * 3},
        PEER: {"forward_ms": [2.0] * 3, "both_ms": [8.0] * 3},
        "slower": {"forward_ms": [3.0] * 3, "both_ms": [9.0] * 3},
        "dense, cuDNN": {"forward_ms": [0.1] * 3, "both_ms": [0.1] * 3},
    }
    return {"runs": [], "cases": {"op-tiny": {"rows": rows}}}


def test_regressions() -> None:
    """A ratio that fell and passes, one that rose and fails, or a failure of ours that is no regression."""
    before = document_of()
    assert {(case, what): found for case, what, found in results.ratios(before)} == {
        ("op-tiny", "forward"): 2.0,
        ("op-tiny", "both"): 2.0,
    }
    assert results.regressions(before, document_of(lambda ms: 1.04 * ms)) == []
    assert results.regressions(before, document_of(lambda ms: 0.5 * ms)) == []
    (sentence,) = results.regressions(before, document_of(lambda ms: 1.1 * ms))
    assert sentence.startswith("op-tiny forward: 2.000 before, now 1.818")
    broken = document_of()
    broken["cases"]["op-tiny"]["rows"][OURS] = {"failed": "out is wrong"}
    assert len(results.regressions(before, broken)) == 2
    assert results.regressions(before, {"runs": [], "cases": {}}) == []
