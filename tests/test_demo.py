"""The demo's pieces at tiny sizes: what it checks with is checked here."""

from __future__ import annotations

import io
import math
import os
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import demo, flex, indexed, interpreted, offline, rows, timing
from benchmarks.compare import Contender, Row, compare, ours, random_tensors, steps, too_large
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.call_config import CallConfig
from dilated_attention_pytorch.config import OPS, Problem, ProblemKey
from dilated_attention_pytorch.tuning.journal import Journal, Measurement, Pick
from dilated_attention_pytorch.tuning.screen import Resources
from dilated_attention_pytorch.workloads import named

CPU = torch.device("cpu")
LONGNET = Problem("fp32", 1, 62, 6, 6, 8, ((20, 1), (31, 2), (62, 6)))
"""Segments, rates and heads that divide as little as those of the workload."""
CORE = Problem("fp32", 2, 70, 3, 3, 8, ((16, 3),), queries="all", head_offset="zero", order="snake")
BLOCKED = Problem("fp32", 1, 45, 5, 5, 8, ((16, 1), (33, 3)), head_offset="blocked", order="snake")
TINY = Problem("fp32", 1, 64, 4, 4, 8, ((16, 1), (32, 2), (64, 4)))
"""Like the workload `readme`: everything divides."""
PROBLEMS = pytest.mark.parametrize("problem", [LONGNET, CORE, BLOCKED], ids=["longnet", "core", "blocked"])
RULES = pytest.mark.parametrize("rule", ["exact", "detached"])


def order_of(problem: Problem) -> Tensor | None:
    """A permutation that is not its own inverse, so that a swapped direction shows."""
    generator = torch.Generator().manual_seed(1)
    return None if problem.order == "none" else torch.randperm(problem.length, generator=generator)


def sampled(problem: Problem, rule: str = "exact", order: Tensor | None = None) -> tuple[rows.Rows, list[Tensor]]:
    q, k, v, dout = random_tensors(problem, 4, CPU)
    tokens = rows.sample(problem, 9, CPU)
    return rows.truth(problem, q, k, v, dout, tokens, order=order, mix_grad=rule), [q, k, v]


def oracle(problem: Problem, rule: str, order: Tensor | None) -> rows.Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths, rates = zip(*problem.branches, strict=True)
        return reference.dilated_attention(
            *(q, k, v, lengths, rates),
            queries=problem.queries,
            head_offset=problem.head_offset,
            order=order,
            mix_grad=rule,
        )[0].to(q.dtype)

    return attend


@RULES
@PROBLEMS
def test_some_rows_are_the_oracle_s(problem: Problem, rule: str) -> None:
    """Rows that mean something else than the reference: wrong segments, offsets, orders, mixing or gradients."""
    order = order_of(problem)
    true, tensors = sampled(problem, rule, order)
    errors = true.errors(oracle(problem, rule, order), *tensors)
    assert list(errors) == ["out", "dq", "dk", "dv"]
    assert max(errors.values()) < 1e-6  # the oracle's results were rounded to float32


def test_rules_of_gradients_are_told_apart() -> None:
    """A check that takes detached gradients for exact ones."""
    true, tensors = sampled(LONGNET, "exact")
    errors = true.errors(oracle(LONGNET, "detached", None), *tensors)
    assert errors["out"] < 1e-6
    assert errors["dk"] > 1e-2


class _Corrupted(torch.autograd.Function):
    """The identity, but for one element in one direction."""

    @staticmethod
    def forward(ctx: object, x: Tensor, place: tuple[int, ...], of_gradient: bool, by: float) -> Tensor:
        ctx.given = place, of_gradient, by  # type: ignore[attr-defined]
        return x.clone() if of_gradient else _off(x, place, by)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        place, of_gradient, by = ctx.given  # type: ignore[attr-defined]
        return (_off(gradient, place, by) if of_gradient else gradient), None, None, None


def _off(x: Tensor, place: tuple[int, ...], by: float) -> Tensor:
    wrong = x.clone()
    wrong[place] += by
    return wrong


@pytest.mark.parametrize("by", [0.05, math.nan], ids=["off", "NaN"])
@pytest.mark.parametrize("result", ["out", "dk"])
def test_corrupted_result_is_seen(result: str, by: float) -> None:
    """One wrong element, or a NaN that compares as small: of out in the last token, of dk where no row was drawn."""
    true, _ = sampled(TINY)
    undrawn = next(token for token in range(TINY.length) if token not in true.tokens.tolist())
    place = (0, TINY.length - 1 if result == "out" else undrawn, 1, 3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if result == "dk":
            k = _Corrupted.apply(k, place, True, by)
        out = ours(TINY, "torch")(q, k, v)
        return _Corrupted.apply(out, place, False, by) if result == "out" else out

    found = compare(TINY, {demo.OURS: Contender(lambda: attend)}, CPU, rounds=1)
    (sentence,) = demo.broken("tiny", TINY, found)
    assert sentence.startswith(f"tiny: {result} is wrong by ")
    assert "," not in sentence


@PROBLEMS
def test_indexed_composition(problem: Problem) -> None:
    """A peer that computes something else, or the same with rows of short segments left out, is timed in vain."""
    order = order_of(problem)
    listed = indexed.groups(problem, CPU, order)
    true, tensors = sampled(problem, "detached", order)
    assert max(true.errors(lambda q, k, v: indexed.attention(q, k, v, listed), *tensors).values()) < 1e-5


@PROBLEMS
def test_flex_attention_s_mask(problem: Problem) -> None:
    """A mask or a bias of multiplicities that is another attention's."""
    order = order_of(problem)
    tokens = torch.arange(problem.length)
    count = flex.counter(problem, CPU, order)
    counted = count(torch.arange(problem.heads)[:, None, None], tokens[:, None], tokens)
    assert torch.equal(counted.long(), rows.meetings(problem, tokens, order).sum(0))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("problem", [LONGNET, CORE], ids=["longnet", "core"])
def test_flex_attention_s_out(problem: Problem) -> None:
    """Tensors transposed the wrong way, or a mask that is not given. Its gradients need a GPU."""
    order = order_of(problem)
    true, tensors = sampled(problem, order=order)
    out = flex.attention(problem, CPU, order)(*tensors)
    assert rows.relative_error(out[:, true.tokens], true.out) < 1e-5


def test_calls_are_timed_in_turns() -> None:
    """One contender after the other: a machine that slows down slows the second."""
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) or time.sleep(0.001) for name in "ab"}
    rounds: list[int] = []
    times = timing.interleaved(calls, CPU, 2, lambda: rounds.append(1))
    assert "".join(seen) == "ababba"  # the first two are not measured
    assert len(rounds) == 2
    assert all(1 <= spread.low <= spread.median <= spread.high for spread in times.values())


def test_peak_counts_what_was_held_at_once() -> None:
    """A peak that adds up what was freed, or starts from what the inputs take."""
    x = torch.zeros(1 << 20, dtype=torch.uint8)

    def call() -> Tensor:
        for _ in range(5):
            y = x + 1
            del y
        return x + x + x

    assert 2 << 20 <= timing.peak_bytes(call, CPU) < 3 << 20


def test_every_launch_is_compiled() -> None:
    """A table without the backward's kernels, or with the first launch in place of the merging ones."""
    wanted = [launch.choice for launch in offline.launches(named("longnet").problem(), devices.simulated("h100"))]
    for op in OPS:  # whether branches share a pass is as measured
        of_op = [choice for choice in wanted if choice.op == op]
        assert sorted(branch for choice in of_op for branch in choice.branches) == [0, 1, 2, 3, 4]
        assert [choice.merge for choice in of_op] == [False, *[True] * (len(of_op) - 1)]


def text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_resources_have_all_rows() -> None:
    """A launch that fails to compile and vanishes from the table, or one that outgrows the GPU and passes."""
    device = devices.simulated("h100")
    wanted = offline.launches(named("longnet").problem(), device)
    taken: list[Resources | str] = [Resources(65_536, 200, 0) for _ in wanted]
    taken[3], taken[4] = "CompilationError: no", Resources(device.shared_bytes + 1, None, None)
    shown = text(demo.resources(list(zip(wanted, taken, strict=True)), device))
    lines = shown.splitlines()
    for launch in wanted:
        head, *rest = demo.folded(launch.choice.variant.name, 24).split("\n")
        rows = [number for number, line in enumerate(lines) if line.split()[:2] == [head, launch.choice.op]]
        assert any(all(lines[row + 1 + i].startswith(part) for i, part in enumerate(rest)) for row in rows)
    assert "…" not in shown
    assert "CompilationError: no" in shown
    assert [demo.fits(of_launch, device) for of_launch in taken].count(False) == 2


def test_results_have_all_rows() -> None:
    """A contender that cannot do a problem and vanishes, ends the demo, or counts as our fault."""

    def refuses() -> rows.Attend:
        raise NotImplementedError("no such [mask]\nand more")

    contenders = {**demo.cpu_contenders(TINY), demo.FLEX: Contender(refuses)}
    told: list[str] = []
    found = compare(TINY, contenders, CPU, rounds=2, progress=told.append)
    assert list(found) == [demo.OURS, demo.COMPOSITION, demo.FLEX]
    assert len(told) == steps(contenders, rounds=2)
    assert demo.broken("tiny", TINY, found) == []
    for name in (demo.OURS, demo.COMPOSITION):
        row = found[name]
        assert isinstance(row, Row)
        assert too_large(row.errors, "fp32") == ""
        assert row.peak > 0
    shown = text(demo.results("tiny", TINY, found))
    assert [line.split()[-1] for line in shown.splitlines() if demo.FLEX in line] == ["skipped", "[mask]"]
    assert "…" not in shown
    assert demo.broken("tiny", TINY, found | {demo.OURS: "RuntimeError: no"}) == ["tiny: RuntimeError: no"]


def test_titles_of_the_real_tables_fit() -> None:
    """A table that is cut or wrapped in a terminal of 80 columns."""
    row = Row(dict.fromkeys(("out", "dq", "dk", "dv"), 1e-3), *[timing.Spread(1234.5, 1, 2)] * 2, 123 << 30)
    for name in ("longnet", "readme"):
        problem = replace(named(name).problem(), dtype="bf16")
        shown = text(demo.results(name, problem, {demo.OURS: row, demo.COMPOSITION: row, demo.FLEX: row}))
        assert "…" not in shown
        assert len([line for line in shown.splitlines() if line.strip().endswith("1.0e-03")]) >= 3


def test_without_triton_the_cpu_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop where nothing compiles: a traceback in place of a sentence."""
    tiny = replace(named("readme"), lengths=(64,), heads=4, head_dim=8, patterns=(TINY.branches,))
    monkeypatch.setattr(demo, "named", lambda name: tiny)
    monkeypatch.setattr(demo, "TUNED", replace(TINY, branches=((16, 2),)))
    monkeypatch.setattr(devices, "_triton_version", lambda: None)
    monkeypatch.setattr(devices, "current", lambda where=None: None)
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(demo, "Console", lambda **_: console)
    assert demo.main() == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "triton not installed" in shown
    assert "Without triton" in shown
    assert [line.split()[0] for line in shown.splitlines() if "_p" in line] == ["backward", "forward", "view_p1_s4:"]
    assert "Everything holds" in shown


def test_ctrl_c_ends_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of traceback where somebody has seen enough."""

    def interrupted(console: Console) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_on_cpu", interrupted)
    monkeypatch.setattr(devices, "current", lambda where=None: None)
    assert demo.main() == 130


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_interpreted_kernels() -> None:
    """What the demo runs in the interpreter is refused there, or is compared in another order than it runs in."""
    assert max(interpreted.errors().values()) < 1e-5
    assert [name.split()[1] for name in interpreted.kernels()] == list(OPS)


def test_picks_have_their_gain() -> None:
    """A gain upside down, or a pick that nobody would keep and that looks like any other."""
    journal = Journal()
    for op, noisy in (("fwd", ""), ("dkdv", "noisy")):
        key, config = ProblemKey.of(demo.TUNED, op, 0), CallConfig("view").to_dict()
        journal.add(Measurement(key, config, "torch", "torch", "finals", "ok", flag=noisy))
        journal.add(Pick(key, config, "torch", "fastest", 200.0, 190.0, 210.0, 300.0, None, 4))
    shown = text(demo.picks(journal))
    assert shown.count("view_p1_s4") == 3 and shown.count("1.50") == 2
    assert "keeps no such pick" in shown
    journal.measurements.pop()
    assert "keeps no such pick" not in text(demo.picks(journal))
