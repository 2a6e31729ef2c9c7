"""What there is to tune: the launches of calls, each measured once under its key, the weightiest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .. import generated, heuristics
from ..call_config import OPS as CALL_OPS
from ..config import BACKWARD, DTYPE_BYTES, OPS, LaunchConfig, Problem, ProblemKey
from ..device import CPU, Device
from ..runtime.plan import Choice, launch_order, untuned
from ..runtime.variants import key_of, may_give_all_gradients, query_rows, stood_in_for, text_for
from ..workloads import WORKLOADS, named
from . import grid

PRODUCTS = {"fwd": 2, "dkdv": 4, "dq": 3, BACKWARD: 5}
"""Matrix products a (query, key) pair takes part in."""
TENSORS = {"fwd": (2, 2), "dkdv": (2, 4), "dq": (3, 2), BACKWARD: (3, 4)}
"""Tensors that a launch reads or writes: of query rows (q, out, dout, dq), of kept rows (k, v, dk, dv)."""


@dataclass(frozen=True)
class Preset:
    """A set of calls to tune, and how thoroughly.

    Attributes:
        workloads: By name.
        dtypes: Of the workloads' these alone; all where none is named.
        grid: With the calls around the workloads.
        candidates: A task at most, the most promising.
        steps: Candidates that the step around the best adds at most.
    """

    workloads: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    grid: bool = False
    candidates: int = 12
    steps: int = 4


PRESETS = {
    "standard": Preset(tuple(WORKLOADS), grid=True, candidates=7, steps=3),
    "quick": Preset(("longnet", "core"), ("bf16",), candidates=8, steps=3),
}
GRID = "grid"
"""In the place of a workload."""
MOST_ENTRIES = 400
"""Of a preset on a device: as many fit into the ten minutes that a new GPU may take, and into a review."""


@dataclass(frozen=True)
class Task:
    """One launch to tune.

    Attributes:
        key: What its winner is stored under.
        problem: A call of what the launch computes alone: a branch, or several that it computes in one pass.
        op: "fwd", "dkdv", "dq" or "bwd".
        merge: It merges into what an earlier branch wrote, as it does in the call that it comes from.
        workload: Where it comes from.
        weight: Its share of the run's work, 0..1; nothing where it is tuned as a part of a joint launch alone.
    """

    key: ProblemKey
    problem: Problem
    op: str
    merge: bool
    workload: str
    weight: float = 0.0

    @property
    def flops(self) -> float:
        """Multiplications and additions of the launch; half of them where it is causal."""
        problem = self.problem
        pairs = problem.batch * problem.heads * sum(map(self._pairs, range(len(problem.branches))))
        return PRODUCTS[self.op] * pairs * problem.head_dim * (1 if problem.causal else 2)

    @property
    def bytes(self) -> float:
        """What the launch reads and writes if it touches every kept row of its tensors once."""
        problem = self.problem
        asked = problem.batch * problem.heads * self._rows(query_rows(problem, 0))
        kept = problem.batch * problem.kv_heads * self._rows(problem.rows(0))
        by_query, by_key = TENSORS[self.op]
        rows = by_query * asked + by_key * kept
        return rows * problem.head_dim * DTYPE_BYTES[problem.dtype]

    def _pairs(self, branch: int) -> int:
        """(query, key) pairs of a head; of a wider branch in a pass those that the narrower one does not hold."""
        problem = self.problem
        pairs = problem.length * query_rows(problem, branch) // problem.segment(branch) * problem.rows(branch)
        if branch == 0:
            return pairs
        return pairs - problem.length * problem.segment(branch - 1) // problem.branches[branch][1] ** 2

    def _rows(self, of_segment: int) -> int:
        return self.problem.length * of_segment // self.problem.segment(0)


def parts(task: Task) -> list[ProblemKey]:
    """What the launches are measured under that a joint one stands in for; none of another."""
    problem = task.problem
    return [key_of(problem, op, *branches) for op, branches in stood_in_for(task.op, every_branch(problem))]


def every_branch(problem: Problem) -> tuple[int, ...]:
    """The branches that the launch of a task computes."""
    return tuple(range(len(problem.branches)))


def launched(
    problem: Problem,
    op: str,
    config: LaunchConfig,
    texts: frozenset[str],
    *,
    branches: tuple[int, ...] = (),
    merge: bool = False,
) -> Choice:
    """The launch of some branches, or of all, with a configuration, whether or not it fits the device."""
    branches = branches or every_branch(problem)
    variant = text_for(problem, branches, op, config, texts)
    assert variant is not None, "the plan of the task found a text"
    return Choice.of(op, branches, variant, config, "config", "tuning", merge=merge)


def default_config(task: Task, device: Device) -> LaunchConfig:
    """The untuned configuration that the ladder would come to, the floor included."""
    problem = task.problem
    found = untuned(problem, every_branch(problem), task.op, device.arch, generated.names())
    fitting = (config for config in (*found, *heuristics.FLOOR) if _fits(problem, task.op, config, device))
    return next(fitting, heuristics.FLOOR[-1])


def _fits(problem: Problem, op: str, config: LaunchConfig, device: Device) -> bool:
    """By the estimate."""
    return heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, device.arch) <= device.shared_bytes


def of_calls(calls: Iterable[tuple[str, Problem]], device: Device) -> list[Task]:
    """The launches of (workload, call) pairs, one a key, by weight; what a joint one stands in for comes before it."""
    tasks: dict[ProblemKey, Task] = {}
    work: dict[ProblemKey, float] = {}
    on_cpu = device.arch == CPU
    for workload, problem in calls:
        order = launch_order(problem, frozenset() if on_cpu else generated.names())
        launches = [
            (op, place, branches)
            for place, branches in enumerate(order)
            for op in (CALL_OPS if on_cpu else _operations(problem, branches, device))
        ]
        for op, place, branches in launches:
            for part_op, part, merge in _with_parts(op, branches, place > 0):
                alone = replace(problem, branches=tuple(problem.branches[branch] for branch in part))
                key = key_of(alone, part_op, *every_branch(alone))
                task = Task(key, alone, part_op, merge, workload)
                if key not in tasks or task.flops > tasks[key].flops:
                    tasks[key] = task  # of several calls with one key the largest is measured
                is_launched = (part_op, part) == (op, branches)
                work[key] = work.get(key, 0.0) + (crude_us(task, device) if is_launched else 0.0)
    total = sum(work.values())
    weighed = [replace(task, weight=work[key] / total) for key, task in tasks.items()]
    return _parts_first(sorted(weighed, key=lambda task: -task.weight))


def _operations(problem: Problem, branches: tuple[int, ...], device: Device) -> tuple[str, ...]:
    """The launches of some branches; one for the whole backward where there is a text that may pay."""
    for config in untuned(problem, branches, BACKWARD, device.arch, generated.names()):
        if not _fits(problem, BACKWARD, config, device):
            continue
        variant = text_for(problem, branches, BACKWARD, config, generated.names())
        if variant is not None and may_give_all_gradients(problem, branches, config, variant) is None:
            return ("fwd", BACKWARD)
    return OPS


def _with_parts(op: str, branches: tuple[int, ...], merge: bool) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """A launch, and those that it stands in for: operation, branches, and whether it merges."""
    yield op, branches, merge
    begun: set[str] = set()
    for part_op, part in stood_in_for(op, branches):
        yield from _with_parts(part_op, part, merge or part_op in begun)
        begun.add(part_op)


def _parts_first(tasks: list[Task]) -> list[Task]:
    by_key = {task.key: task for task in tasks}
    ordered: dict[ProblemKey, Task] = {}

    def place(task: Task) -> None:
        for key in parts(task):
            if key in by_key:
                place(by_key[key])
        ordered.setdefault(task.key, task)

    for task in tasks:
        place(task)
    return list(ordered.values())


def crude_us(task: Task, device: Device) -> float:
    """A crude time on an equal scale for all tasks: products at 100 flops a byte of bandwidth, or memory's."""
    bandwidth = device.bandwidth or 1000.0
    return max(task.flops / 100, task.bytes) / bandwidth / 1e3


def calls_of(names: Iterable[str], dtypes: tuple[str, ...] = ()) -> list[tuple[str, Problem]]:
    """Every call of the named workloads, each once, of these dtypes alone where any are named.

    Raises:
        ArgumentError: There is no workload of a name.
    """
    return [
        (name, problem)
        for name in dict.fromkeys(names)
        for problem in named(name).problems()
        if not dtypes or problem.dtype in dtypes
    ]


def preset(name: str) -> list[tuple[str, Problem]]:
    """The calls of a preset."""
    chosen = PRESETS[name]
    around = [(GRID, problem) for problem in grid.calls()] if chosen.grid else []
    return [*calls_of(chosen.workloads, chosen.dtypes), *around]


def shard(tasks: list[Task], part: tuple[int, int]) -> list[Task]:
    """The i-th of n hosts' tasks: every n-th, so that each gets heavy and light ones; a joint one and its parts as one.

    Args:
        tasks: As `of_calls` has them, parts first.
        part: i and n.
    """
    index, count = part
    families: dict[ProblemKey, dict[ProblemKey, None]] = {}
    for task in tasks:
        family = {task.key: None}
        for key in parts(task):
            family |= families.get(key, {key: None})
        families.update(dict.fromkeys(family, family))
    turns = {id(family): turn for turn, family in enumerate({id(f): f for f in families.values()}.values())}
    return [task for task in tasks if turns[id(families[task.key])] % count == index]
