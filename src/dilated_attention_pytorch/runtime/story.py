"""A plan as text, and as plain values: what `explain` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ..config import Problem
from .plan import Choice, Plan
from .variants import acting_order, nested, why_ragged


def tell(plan: Plan, *, backward: bool = True) -> str:
    """The story of a plan, for a person: what runs, on which evidence, and why nothing else."""
    return "\n".join(_lines(plan, backward))


def values(plan: Plan, *, backward: bool = True) -> dict[str, Any]:
    """The same for a script: variants by name, configurations by field."""

    def is_told(op: str) -> bool:
        return backward or op == "fwd"

    shared = _joined(plan) if plan.launches else None
    return {
        "problem": asdict(plan.problem),
        "device": None if plan.device is None else asdict(plan.device),
        "backend": plan.backend,
        "rung": plan.rung,
        "external": [{"op": op, "route": "cudnn", "why": why} for op, why in plan.external if is_told(op)],
        "refusals": [{"what": what, "why": why} for what, why in plan.refusals],
        "calls": [
            {"op": calls.op, "branch": calls.branch, "config": calls.config.to_dict(), "why": calls.why}
            for calls in plan.calls
            if is_told(calls.op)
        ],
        "launches": [_launch(plan, choice) for choice in plan.launches if is_told(choice.op)],
        "beaten": [_launch(plan, choice) for choice in plan.beaten if is_told(choice.op)],
        "could_share": None if shared is None else {"branches": shared[0], "add": shared[1]},
    }


def _launch(plan: Plan, choice: Choice) -> dict[str, Any]:
    problem = plan.problem
    return {
        "op": choice.op,
        "branch": choice.branch,
        "branches": choice.branches,
        "segment": problem.segment(choice.branch),
        "dilation": problem.branches[choice.branch][1],
        "order": acting_order(problem, choice.branch),
        "variant": choice.variant.name,
        "config": choice.config.to_dict(),
        "rung": choice.rung,
        "why": choice.why,
        "passed": [{"rung": rung, "why": why} for rung, why in choice.passed],
        "tails": _tails(problem, choice),
        "add": _addable(problem, choice),
    }


def _lines(plan: Plan, backward: bool) -> Iterator[str]:
    yield _problem(plan.problem)
    yield f"device   {plan.device or 'CPU'}"
    yield f"backend  {plan.backend}, lowest rung: {plan.rung}"
    for op, why in plan.external:
        if backward or op == "fwd":
            yield f"         {'forward' if op == 'fwd' else 'backward'} by cuDNN on views of the segments: {why}"
    for name, sentence in plan.refusals:
        yield f"         not {name}: {sentence}"
    for choice in plan.beaten:
        if backward or choice.op == "fwd":
            passed = f"faster apart; {choice.config.name}  {choice.rung}: {choice.why}"
            once = " in one pass" if choice.wider else " in one launch"
            yield f"         not {choice.op} of {_counted(choice.branches)}{once}: {passed}"
    for calls in plan.calls:
        if backward or calls.op == "fwd":
            name = "forward" if calls.op == "fwd" else "backward"
            yield f"branch {calls.branch}, {name}: calls {calls.config.name}, {calls.why}"
    told: tuple[tuple[str, str], ...] = ()
    launches = plan.launches if backward else plan.fwd
    for place, branches in enumerate(dict.fromkeys(choice.branches for choice in launches), start=1):
        choices = [choice for choice in launches if choice.branches == branches]
        yield ""
        yield f"launch {place}: {_branch(plan.problem, choices[0])}"
        for choice in choices:
            yield f"  {choice.op:5} {choice.variant.name}  {choice.config.name}  {choice.rung}: {choice.why}"
            if choice.passed == told:
                yield "        passed over: as above"
            else:
                yield from _passed(choice)
            told = choice.passed
            if tails := _tails(plan.problem, choice):
                yield f"        its tails are masked: {tails}"
        if spec := _addable(plan.problem, choices[0]):
            yield f"  no text of its own: in a checkout, `python -m codegen --add {spec}` renders one"
    if plan.launches and (shared := _joined(plan)):
        possible, spec = shared
        yield f"branches {_listed(possible)} could share a pass: in a checkout, `python -m codegen --add {spec}`"


def _joined(plan: Plan) -> tuple[list[int], str] | None:
    """Branches that one pass could compute, had it a text, and what to give `python -m codegen --add` for one."""
    possible = nested(plan.problem)
    if len(possible) <= max(len(choice.branches) for choice in (*plan.launches, *plan.beaten)):
        return None
    return possible, "+".join(f"{w}:{r}" for w, r in (plan.problem.branches[branch] for branch in possible))


def _counted(branches: tuple[int, ...]) -> str:
    return f"branch{'es' * (len(branches) > 1)} {_listed(branches)}"


def _listed(branches: Iterable[int]) -> str:
    return ", ".join(map(str, branches))


def _problem(problem: Problem) -> str:
    words = [
        problem.dtype,
        f"B {problem.batch}",
        f"N {problem.length}",
        f"H {problem.heads}" + (f"/{problem.kv_heads}" if problem.kv_heads != problem.heads else ""),
        f"D {problem.head_dim}",
        f"queries {problem.queries}",
        f"offset {problem.head_offset}",
    ]
    words += [f"order {problem.order}"] if problem.order != "none" else []
    words += [name for name in ("causal", "mask", "dropout", "tf32", "deterministic") if getattr(problem, name)]
    words += ["phantom keys"] if problem.padding == "zeros" else []
    words += ["detached mix"] if problem.mix_grad == "detached" else []
    return "problem  " + ", ".join(words)


def _branch(problem: Problem, choice: Choice) -> str:
    if choice.wider:
        levels = ", ".join(f"{length}/{rate}" for length, rate in choice.variant.levels)
        return f"branches {_listed(choice.branches)} in one pass, segment/dilation {levels}"
    (asked, dilation), acts = problem.branches[choice.branch], problem.segment(choice.branch)
    segment = f"segment {acts}" + (f" (of {asked}, N is less)" if asked > acts else "")
    order = ""
    if problem.order != "none":
        acting = acting_order(problem, choice.branch)
        order = f", order {acting}" + (" (it changes nothing here)" if acting == "none" else "")
    return f"branch {choice.branch}, {segment}, dilation {dilation}, {problem.rows(choice.branch)} rows{order}"


def _tails(problem: Problem, choice: Choice) -> str | None:
    """Why a launch masks its tails; None where it does not, or where a pass always does."""
    if choice.wider or choice.variant.even:
        return None
    why = why_ragged(problem, choice.branch, choice.op, choice.config, choice.variant.one_tile)
    return why or "no even text of this pattern is rendered"


def _passed(choice: Choice) -> Iterator[str]:
    if choice.passed:
        yield "        passed over:"
    width = max((len(rung) for rung, _ in choice.passed), default=0)
    for rung, sentence in choice.passed:
        yield f"          {rung:{width}}  {sentence}"


def _addable(problem: Problem, choice: Choice) -> str | None:
    """What to give `python -m codegen --add` for a text of a launch's own, which it has not."""
    text = choice.variant
    if text.dilation is not None or (text.ring and (text.one_tile or not text.even)):
        return None  # of these there are general ones alone
    return _pattern(problem, choice.branch)


def _pattern(problem: Problem, branch: int) -> str | None:
    """What to give `python -m codegen --add` for a text of this branch; None where no special one can be."""
    segment, dilation, order = problem.segment(branch), problem.branches[branch][1], acting_order(problem, branch)
    if dilation > segment or (problem.head_offset == "table" and dilation == 1):
        return None
    parts = ["full" if problem.is_full(branch) else str(segment), str(dilation)]
    parts += [order] if order != "none" else []
    parts += ["all"] if problem.queries == "all" else []
    return ":".join(parts)
