"""Every choice is a candidate by being declared here: what a launch may look like, and what could run in its place.

Pure: a task and a device in, candidates out. A candidate that this file lets through may still fail to compile, spill
or be slow; one that it leaves out is never tried, so its rules are hard ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from .. import generated, heuristics
from ..call_config import ROWS, CallConfig
from ..config import BACKWARD, BY_KEYS, IN_GLUON, LaunchConfig, head_offsets, next_power_of_two
from ..device import CPU, Device
from ..runtime.plan import untuned
from ..runtime.refusals import cudnn_runs, cudnn_takes
from ..runtime.torch_calls import Budget, calls
from ..runtime.variants import may_give_all_gradients, query_rows, refuses_ring, rows_of_class, stood_in_for, text_for
from ..variant import Variant
from .problems import Task, default_config, every_branch

KERNEL, TORCH, CUDNN, APART = "kernel", "torch", "cudnn", "apart"

RIVAL_FLOPS = 2e10
"""Launches of more work are not timed by the torch backend, which takes a second for them on a GPU."""

SMALLEST = LaunchConfig(16, 16)
"""If any tiles fill a segment, these do."""

Value = int | str | bool | None
Launched = tuple[str, tuple[int, ...], LaunchConfig]
"""A launch of ours: its operation, its branches among a task's, and its configuration."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One way to run a task.

    Attributes:
        route: "kernel" (ours), "apart" (ours, several launches in the place of a joint one), or an external route:
            "torch", which is ours on a CPU, or "cudnn".
        choices: Values by name; those of a `LaunchConfig` for a kernel, of a `CallConfig` for the torch backend, of
            several `LaunchConfig`s for launches apart, as `dq 0+1 block_m`: operation, branches and field.
    """

    route: str
    choices: tuple[tuple[str, int | str], ...] = ()

    @classmethod
    def of(cls, config: LaunchConfig | CallConfig) -> Candidate:
        """Our kernel, or the torch backend, with this configuration."""
        return cls(KERNEL if isinstance(config, LaunchConfig) else TORCH, tuple(config.to_dict().items()))

    @property
    def config(self) -> LaunchConfig:
        """The configuration of a kernel."""
        return LaunchConfig(**dict(self.choices))  # type: ignore[arg-type]

    @property
    def call_config(self) -> CallConfig | None:
        """The configuration of the torch backend; None where it takes its own default."""
        return CallConfig(**dict(self.choices)) if self.choices else None  # type: ignore[arg-type]

    @classmethod
    def apart(cls, launches: Iterable[Launched]) -> Candidate:
        """Launches of ours, one after the other."""
        found: list[tuple[str, int | str]] = []
        for op, branches, config in launches:
            launch = f"{op} {'+'.join(map(str, branches))}"
            found += [(f"{launch} {field}", value) for field, value in config.to_dict().items()]
        return cls(APART, tuple(found))

    @property
    def launches(self) -> list[Launched]:
        """The launches of ours, where they are several."""
        configs: dict[str, dict[str, int | str]] = {}
        for name, value in self.choices:
            launch, _, field = name.rpartition(" ")
            configs.setdefault(launch, {})[field] = value
        split = ((launch.split(), LaunchConfig(**fields)) for launch, fields in configs.items())  # type: ignore[arg-type]
        return [(op, tuple(map(int, branches.split("+"))), config) for (op, branches), config in split]

    @property
    def name(self) -> str:
        """`128x64_w8_s3` for a kernel, `apart dq 0=64x64_w4_s3`, `torch views=1` for others."""
        if self.route == KERNEL:
            return self.config.name
        if self.route == APART:
            named = (f"{op} {'+'.join(map(str, branches))}={config.name}" for op, branches, config in self.launches)
            return ", ".join([f"{APART} {next(named)}", *named])
        return " ".join([self.route, *(f"{name}={value}" for name, value in self.choices)])


@dataclass(frozen=True)
class Coordinate:
    """One field of a configuration.

    Attributes:
        name: The field.
        values: What a search tries from the start.
        steps: All that a step around a good candidate may move to, in order; `values` are among them.
    """

    name: str
    values: Callable[[Task, Device], tuple[Value, ...]]
    steps: Callable[[Task, Device], tuple[Value, ...]]


def _tiles(most_rows: Callable[[Task], int], sizes: tuple[int, ...]) -> Callable[[Task, Device], tuple[Value, ...]]:
    """Tile sizes up to the first that holds a whole segment."""

    def values(task: Task, device: Device) -> tuple[Value, ...]:
        most = max(next_power_of_two(most_rows(task)), 16)
        return tuple(size for size in sizes if size <= most) or (most,)

    return values


def _queries(task: Task) -> int:
    return _class(task) or query_rows(task.problem, 0)


def _keys(task: Task) -> int:
    return _class(task) or task.problem.rows(0)


def _class(task: Task) -> int | None:
    """Rows that tiles of several branches have to divide."""
    branches = every_branch(task.problem)
    return rows_of_class(task.problem, branches) if len(branches) > 1 else None


def _fixed(*values: Value) -> Callable[[Task, Device], tuple[Value, ...]]:
    return lambda task, device: values


def _warps(task: Task, device: Device) -> tuple[Value, ...]:
    """Segments of a few rows make tiles for a warp or two."""
    return (1, 2, 4) if _keys(task) <= 64 else (4, 8)


def _stages(*values: Value) -> Callable[[Task, Device], tuple[Value, ...]]:
    """Turing has no asynchronous copies to pipeline."""
    return lambda task, device: (1,) if device.arch == "sm_75" else values


def _registers(task: Task, device: Device) -> tuple[Value, ...]:
    """Caps at which two, three or four blocks share an SM; AMD's compiler takes none."""
    return (None,) if device.arch.startswith("gfx") else (128, 168, None)


def _loads(task: Task, device: Device) -> tuple[Value, ...]:
    """The better ways: into a ring where there is one, else by descriptor where there are any.

    Of several branches both are tried, as a ring's has but few tiles, and along an order, where rows are copied.
    """
    best, *others = _all_loads(task, device)
    few = _class(task) is not None or task.problem.order != "none"
    both = best == "producer" or (best == "ring" and few)
    return (best, others[0]) if both else (best,)


def _all_loads(task: Task, device: Device) -> tuple[Value, ...]:
    rings: tuple[Value, ...] = ("ring",) if _has_ring(task, device) else ()
    if rings and task.op == "fwd" and task.problem.head_dim == 128:
        rings = ("producer", *rings)  # at 64 three CTAs that load for themselves are faster (CONTRIBUTING.md)
    return (*rings, *(("descriptor",) if _is_described(task, device) else ()), "pointer")


def _is_described(task: Task, device: Device) -> bool:
    problem = task.problem
    if not heuristics.takes_descriptors(device.arch, problem.head_dim, problem.dtype):
        return False
    text = text_for(problem, every_branch(problem), task.op, SMALLEST, generated.names())
    return text is not None and text.described


def _has_ring(task: Task, device: Device) -> bool:
    problem = task.problem
    if not heuristics.takes_rings(device.arch, problem.head_dim, problem.dtype):
        return False
    config = replace(heuristics.RING, block_n=max(problem.rows(0), 64)) if task.op == BACKWARD else heuristics.RING
    return text_for(problem, every_branch(problem), task.op, config, generated.names()) is not None


COORDINATES = (
    Coordinate("block_m", _tiles(_queries, (32, 64, 128)), _tiles(_queries, (16, 32, 64, 128, 256))),
    Coordinate("block_n", _tiles(_keys, (32, 64, 128)), _tiles(_keys, (16, 32, 64, 128, 256))),
    Coordinate("num_warps", _warps, _fixed(1, 2, 4, 8, 16)),
    Coordinate("num_stages", _stages(1, 2, 3, 4), _stages(1, 2, 3, 4, 5)),
    Coordinate("maxnreg", _fixed(None), _registers),
    Coordinate("loads", _loads, _all_loads),
)
"""The fields of a configuration."""


CALL_COORDINATES = (
    Coordinate("rows", _fixed(*ROWS), _fixed(*ROWS)),
    Coordinate("pairs", _fixed(1, 2, 4), _fixed(1, 2, 4)),
    Coordinate("share", _fixed(2, 4, 8, 16), _fixed(2, 4, 8, 16)),
)
"""The fields of a `CallConfig`. Half of q packed takes as much memory again as the output."""


def space(task: Task, device: Device) -> list[Candidate]:
    """Every candidate of a task on a device, the most promising first, the untuned default leading.

    Promising is near the default: so few steps of a factor of two away. One of every other way to load and of every
    other text goes before them: the few steps around the best hardly ever lead there. Candidates are kernels; on a CPU,
    ways to cut a branch into calls of torch's.
    """
    if device.arch == CPU:
        return _ways_to_call(task, device)
    default = default_config(task, device)
    ranked = _nearest_first(_grid(task, device), default)
    return [Candidate.of(c) for c in dict.fromkeys((default, *_of_other_kinds(task, device, default, ranked), *ranked))]


def _grid(task: Task, device: Device, loads: Value = None) -> list[LaunchConfig]:
    """What the rules allow of the values that are tried from the start; by these loads alone where any are named."""
    values = [(loads,) if c.name == "loads" and loads else c.values(task, device) for c in COORDINATES]
    return [config for found in itertools.product(*values) if _allowed(task, device, config := _config(found))]


def _nearest_first(configs: Iterable[LaunchConfig], default: LaunchConfig) -> list[LaunchConfig]:
    return sorted(configs, key=lambda config: (_steps_away(config, default), config.name))


def _of_other_kinds(
    task: Task, device: Device, default: LaunchConfig, ranked: Iterable[LaunchConfig]
) -> Iterator[LaunchConfig]:
    """The most promising of each way to load, and of each text, that is not the default's: untuned defaults first."""
    branches, texts = every_branch(task.problem), generated.names()
    offered = untuned(task.problem, branches, task.op, device.arch, texts)
    seen: set[Value | Variant] = {default.loads, text_for(task.problem, branches, task.op, default, texts)}
    for config in (*filter(partial(_allowed, task, device), offered), *ranked):
        kinds = {config.loads, text_for(task.problem, branches, task.op, config, texts)}
        if not kinds <= seen:
            seen |= kinds
            yield config
    for loads in _all_loads(task, device):
        if loads not in seen:
            yield from _nearest_first(_grid(task, device, loads), default)[:1]


def neighbours(task: Task, device: Device, candidate: Candidate) -> list[Candidate]:
    """What lies one step of one coordinate away."""
    if candidate.route != KERNEL:
        return []
    config = candidate.config
    found = []
    for coordinate in COORDINATES:
        steps = coordinate.steps(task, device)
        here = getattr(config, coordinate.name)
        if here in steps:
            place = steps.index(here)
            for value in (*steps[max(place - 1, 0) : place], *steps[place + 1 : place + 2]):
                moved = replace(config, **{coordinate.name: value})  # type: ignore[arg-type]
                if _allowed(task, device, moved):
                    found.append(Candidate.of(moved))
    return found


def _ways_to_call(task: Task, device: Device) -> list[Candidate]:
    """Of the torch backend's configurations those that cut otherwise than the ones before."""
    default = CallConfig.untuned(task.op, task.problem, 0)
    grid = itertools.product(*(c.values(task, device) for c in CALL_COORDINATES))
    others = {CallConfig(*values) for values in grid} - {default}  # type: ignore[arg-type]
    ranked = (default, *sorted(others, key=lambda config: (_changes(config, default), config)))
    first = {_cut(task, config): config for config in reversed(ranked)}
    return [Candidate.of(config) for config in ranked if config in first.values()]


def _cut(task: Task, config: CallConfig) -> str:
    """The calls that a configuration makes, as text and but for the tokens that an order has them read."""
    problem = replace(task.problem, order="none")
    rule = "cyclic" if problem.head_offset == "table" else problem.head_offset
    offsets = head_offsets(rule, problem.heads, problem.branches[0][1])
    budget = Budget.of(config, problem.batch * problem.length * problem.heads * problem.head_dim, CPU)
    return repr(list(calls(problem, 0, offsets, None, budget)))


def _changes(config: CallConfig, default: CallConfig) -> float:
    """Steps of a factor of two, and one for rows that are read otherwise."""
    octaves = (abs(math.log2(getattr(config, name) / getattr(default, name))) for name in ("pairs", "share"))
    return sum(octaves) + (config.rows != default.rows)


def apart(task: Task, as_dispatched: Callable[[str, tuple[int, ...]], list[Launched]]) -> Candidate | None:
    """The launches that a joint one stands in for, as a call makes them; None where it stands in for none.

    They are timed in turn with the finalists and recorded beside the winner: which of the two a call makes is a choice
    like any other.

    Args:
        task: The task.
        as_dispatched: What a call makes of an operation and branches of the task.
    """
    found = [launch for part in stood_in_for(task.op, every_branch(task.problem)) for launch in as_dispatched(*part)]
    return Candidate.apart(found) if found else None


def rivals(task: Task, device: Device) -> list[Candidate]:
    """External routes that could run in a kernel's place: what the user would have written. Timed, never the winner:
    what cuDNN takes is recorded beside it, and where that is attention on plain views, calls go to who was faster.

    Their backward gives all gradients at once. It is timed beside the launch that writes dK and dV, and judged beside
    all launches that it stands for.
    """
    problem = task.problem
    if len(problem.branches) > 1 or device.arch == CPU:
        return []  # what mixes the branches would be another's work; on a CPU the torch backend is what is tuned
    plain = problem.order == "none" and problem.queries == "dilated" and not (problem.mask or problem.dropout)
    whole = problem.length % problem.segment(0) == 0 and problem.segment(0) % problem.branches[0][1] == 0
    together = problem.heads == problem.kv_heads or problem.branches[0][1] == 1  # heads of a group keep the same steps
    views = together and problem.head_offset != "table" and problem.padding == "none"
    strided = plain and whole and views and cudnn_runs(problem.dtype, device)
    cudnn = strided or cudnn_takes(problem, device)
    if task.op != "fwd":
        return [Candidate(CUDNN, (("gradients", "all"),))] if task.op == "dkdv" and cudnn else []
    return [
        *([Candidate(TORCH)] if task.flops < RIVAL_FLOPS else []),
        *([Candidate(CUDNN)] if cudnn else []),
    ]


def _config(values: tuple[Value, ...]) -> LaunchConfig:
    return LaunchConfig(**dict(zip((c.name for c in COORDINATES), values, strict=True)))  # type: ignore[arg-type]


def _allowed(task: Task, device: Device, config: LaunchConfig) -> bool:
    """The hard rules."""
    return all(rule(task, device, config) for rule in RULES)


def _fits(task: Task, device: Device, config: LaunchConfig) -> bool:
    """The estimate is an upper one: what is a little above it may fit, and compiling tells."""
    problem = task.problem
    need = heuristics.shared_bytes(task.op, problem.head_dim, problem.dtype, config, device.arch)
    return need <= 1.1 * device.shared_bytes


def _pipelines_a_loop(task: Task, device: Device, config: LaunchConfig) -> bool:
    """A loop that runs once has nothing to overlap: more than one stage is the same kernel again.

    A ring for all gradients goes on from segment to segment.
    """
    if task.op == BACKWARD and config.loads in IN_GLUON:
        return True
    walked, tile = (_queries(task), config.block_m) if task.op in BY_KEYS else (_keys(task), config.block_n)
    return config.num_stages == 1 or tile < walked


def _keeps_warps_busy(task: Task, device: Device, config: LaunchConfig) -> bool:
    """At least a 16-row fragment of the products a warp; on Hopper a warpgroup takes 64 rows of its own."""
    stay, loop = (config.block_n, config.block_m) if task.op in BY_KEYS else (config.block_m, config.block_n)
    if device.arch in ("sm_90", "sm_100", "sm_103") and config.num_warps >= 8:
        return stay >= 16 * config.num_warps
    return stay * max(loop, heuristics.padded_head_dim(task.problem.head_dim)) >= 256 * config.num_warps


def _holds_its_accumulators(task: Task, device: Device, config: LaunchConfig) -> bool:
    """float32 accumulators and scores of a thread leave room in its 255 registers."""
    width = heuristics.padded_head_dim(task.problem.head_dim)
    tile = config.block_m * config.block_n
    held = {
        "fwd": tile + config.block_m * width,
        "dkdv": tile + 2 * config.block_n * width,
        "dq": tile + config.block_m * width,
        BACKWARD: tile + 2 * config.block_n * width,
    }[task.op]
    threads = config.num_warps * device.warp_size
    return held / threads <= (config.maxnreg or 256)


def _divides_a_class(task: Task, device: Device, config: LaunchConfig) -> bool:
    """No tile of several branches holds rows of two segments."""
    rows = _class(task)
    return rows is None or (rows % config.block_m == 0 and rows % config.block_n == 0)


def _gives_all_gradients(task: Task, device: Device, config: LaunchConfig) -> bool:
    """One tile holds all keys that a query sees."""
    if task.op != BACKWARD:
        return True
    problem, branches = task.problem, every_branch(task.problem)
    text = text_for(problem, branches, task.op, config, generated.names())
    return text is not None and may_give_all_gradients(problem, branches, config, text) is None


def _suits_a_ring(task: Task, device: Device, config: LaunchConfig) -> bool:
    """Warpgroups take 64 rows of what stays; tiles fill the segments."""
    return (
        config.loads not in IN_GLUON or refuses_ring(task.problem, every_branch(task.problem), task.op, config) is None
    )


RULES = (
    _divides_a_class,
    _gives_all_gradients,
    _fits,
    _pipelines_a_loop,
    _keeps_warps_busy,
    _holds_its_accumulators,
    _suits_a_ring,
)


def _steps_away(config: LaunchConfig, default: LaunchConfig) -> float:
    """Steps of a factor of two in blocks and warps, and of one in stages."""

    def octaves(name: str) -> float:
        return abs(math.log2(getattr(config, name) / getattr(default, name)))

    return sum(map(octaves, ("block_m", "block_n", "num_warps"))) + abs(config.num_stages - default.num_stages) / 2
