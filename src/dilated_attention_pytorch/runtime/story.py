"""A plan as text: what `explain` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..config import Problem
from .plan import BranchPlan, Choice, Plan
from .variants import nested


def tell(plan: Plan, *, backward: bool = True) -> str:
    """The story of a plan, for a person: what runs, on which evidence, and why nothing else."""
    return "\n".join(_lines(plan, backward))


def _lines(plan: Plan, backward: bool) -> Iterator[str]:
    yield _problem(plan.problem)
    yield f"device   {plan.device or 'CPU'}"
    yield f"backend  {plan.backend}, lowest rung: {plan.rung}"
    for name, sentence in plan.refusals:
        yield f"         not {name}: {sentence}"
    for calls in plan.calls:
        if backward or calls.op == "fwd":
            name = "forward" if calls.op == "fwd" else "backward"
            yield f"branch {calls.branch}, {name}: calls {calls.config.name}, {calls.why}"
    told: tuple[tuple[str, str], ...] = ()
    for place, branch in enumerate(plan.branches, start=1):
        yield ""
        yield _branch(plan.problem, place, branch)
        for choice in (branch.fwd, branch.dkdv, branch.dq)[: 3 if backward else 1]:
            yield f"  {choice.op:5} {choice.variant.name}  {choice.config.name}  {choice.rung}: {choice.why}"
            if choice.passed == told:
                yield "        passed over: as above"
            else:
                yield from _passed(choice)
            told = choice.passed
        if branch.fwd.variant.dilation is None and (spec := _pattern(plan.problem, branch)):
            yield f"  no text of its own: in a checkout, `python -m codegen --add {spec}` renders one"
    if plan.branches:
        yield from _joined(plan)


def _joined(plan: Plan) -> Iterator[str]:
    """Branches that one pass could compute, had it a text."""
    possible = nested(plan.problem)
    if len(possible) > max(len(branch.branches) for branch in plan.branches):
        spec = "+".join(f"{length}:{rate}" for length, rate in (plan.problem.branches[branch] for branch in possible))
        yield f"branches {_listed(possible)} could share a pass: in a checkout, `python -m codegen --add {spec}`"


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


def _branch(problem: Problem, place: int, branch: BranchPlan) -> str:
    if branch.wider:
        levels = ", ".join(f"{length}/{rate}" for length, rate in branch.fwd.variant.levels)
        return f"launch {place}: branches {_listed(branch.branches)} in one pass, segment/dilation {levels}"
    asked = problem.branches[branch.branch][0]
    segment = f"segment {branch.segment}" + (f" (of {asked}, N is less)" if asked > branch.segment else "")
    order = ""
    if problem.order != "none":
        order = f", order {branch.order}" + (" (it changes nothing here)" if branch.order == "none" else "")
    rows = problem.rows(branch.branch)
    return f"launch {place}: branch {branch.branch}, {segment}, dilation {branch.dilation}, {rows} rows{order}"


def _passed(choice: Choice) -> Iterator[str]:
    if choice.passed:
        yield "        passed over:"
    width = max((len(rung) for rung, _ in choice.passed), default=0)
    for rung, sentence in choice.passed:
        yield f"          {rung:{width}}  {sentence}"


def _pattern(problem: Problem, branch: BranchPlan) -> str | None:
    """What to give `python -m codegen --add` for a text of this branch; None where no special one can be."""
    if branch.dilation > branch.segment or (problem.head_offset == "table" and branch.dilation == 1):
        return None
    parts = ["full" if problem.is_full(branch.branch) else str(branch.segment), str(branch.dilation)]
    parts += [branch.order] if branch.order != "none" else []
    parts += ["all"] if problem.queries == "all" else []
    return ":".join(parts)
