"""What there is to tune, and what may be tried for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dilated_attention_pytorch import device, generated, heuristics
from dilated_attention_pytorch.config import EVERY_OP, OPS, LaunchConfig
from dilated_attention_pytorch.runtime.variants import text_for
from dilated_attention_pytorch.tuning import problems, space
from dilated_attention_pytorch.tuning.problems import Task
from dilated_attention_pytorch.variant import Variant
from dilated_attention_pytorch.workloads import WORKLOADS

H100 = device.simulated("h100")
EVERY = problems.of_calls(problems.preset("standard"), H100)


def title(task: Task) -> str:
    """A test's name."""
    return f"{task.workload}-{task.op}-{task.key.dtype}-{'x'.join(map(str, task.key.branches[0]))}"


def test_every_launch_of_every_workload_is_a_task_once() -> None:
    """A workload left out; one key measured twice; a branch whose backward nobody tunes."""
    assert {task.workload for task in EVERY} == {*WORKLOADS, "grid"}
    assert len({task.key for task in EVERY}) == len(EVERY)
    by_kind: dict[object, set[str]] = {}
    for task in EVERY:
        by_kind.setdefault((task.key.branches, task.key.dtype, task.key.causal, task.key.order), set()).add(task.op)
    assert all(set(OPS) <= ops <= set(EVERY_OP) for ops in by_kind.values())


def test_the_weightiest_come_first_and_weights_are_shares() -> None:
    """A run that is stopped early has tuned what hardly matters."""
    assert sum(task.weight for task in EVERY) == pytest.approx(1.0)
    needed = {key for task in EVERY for key in problems.parts(task)}
    weights = [task.weight for task in EVERY if task.key not in needed]
    assert weights == sorted(weights, reverse=True)


def test_what_a_joint_launch_stands_in_for_is_tuned_before_it() -> None:
    """A pass that is compared with branches at their defaults would win by what nobody has tuned yet."""
    places = {task.key: place for place, task in enumerate(EVERY)}
    joint = [task for task in EVERY if task.key.is_joint]
    assert {task.op for task in joint} == set(EVERY_OP)
    for task in joint:
        keys = problems.parts(task)
        if task.op == "bwd":
            assert [(key.op, key.branches) for key in keys] == [(op, task.key.branches) for op in ("dkdv", "dq")]
        else:
            assert [(key.op, key.branches) for key in keys] == [(task.op, (pair,)) for pair in task.key.branches]
        assert all(places[key] < places[task.key] for key in keys), title(task)
    first = next(task for task in joint if task.op == "fwd")
    alone = {task.key: task for task in problems.of_calls([("one", first.problem)], H100)}
    assert [(alone[key].weight, alone[key].merge) for key in problems.parts(first)] == [
        (0.0, place > 0) for place in range(len(first.key.branches))
    ]


@pytest.mark.parametrize("gpu", ["h100", "a100", "l4", "rtx-5090", "t4", "mi300x"])
def test_every_candidate_for_all_gradients_gives_them(gpu: str) -> None:
    """The smallest tiles, taken for want of larger ones that fit, in a text that never writes dq."""
    on = device.simulated(gpu)
    asked = [task for task in problems.of_calls(problems.preset("quick"), on) if task.op == "bwd"]
    for task in asked:
        every = space.space(task, on)
        assert all(space._gives_all_gradients(task, on, candidate.config) for candidate in every), title(task)
    assert asked or gpu == "t4"


def test_hosts_share_all_tasks() -> None:
    """A problem that no host tunes, or two do."""
    shared = [task for host in range(3) for task in problems.shard(EVERY, (host, 3))]
    assert sorted(map(title, shared)) == sorted(map(title, EVERY))


def test_launches_apart_are_read_back_from_a_journal() -> None:
    """A field of a configuration that is lost on the way to the measuring process, which then times other tiles."""
    configs = LaunchConfig(64, 32, num_warps=8, maxnreg=168), LaunchConfig(32, 32, loads="descriptor")
    launches = [("dkdv", (0, 1), configs[0]), ("dq", (2,), configs[1])]
    candidate = space.Candidate.apart(launches)
    again = space.Candidate(space.APART, tuple(json.loads(json.dumps(dict(candidate.choices))).items()))
    assert again == candidate and again.launches == launches
    assert candidate.name == f"apart dkdv 0+1={configs[0].name}, dq 2={configs[1].name}"


def test_a_joint_launch_and_its_parts_are_one_hosts() -> None:
    """A host that compares a pass with branches which another one is tuning at that time."""
    together = 0
    for host in range(3):
        own = problems.shard(EVERY, (host, 3))
        keys = {task.key for task in own}
        joint = [task for task in own if task.key.is_joint]
        together += sum(keys >= {*problems.parts(task)} for task in joint)
        assert len(own) > len(EVERY) / 4
    assert together == sum(task.key.is_joint for task in EVERY)


@pytest.mark.parametrize("name", ["h100", "a100", "l4", "t4", "mi300x"])
def test_candidates_are_legal_and_the_default_leads(name: str) -> None:
    """A space without the default has nothing to gain on; one that ignores the device compiles in vain."""
    gpu = device.simulated(name)
    for task in EVERY[:: len(EVERY) // 12]:
        candidates = space.space(task, gpu)
        assert candidates[0].config == problems.default_config(task, gpu)
        assert len(set(candidates)) == len(candidates)
        for candidate in candidates[1:]:
            problem = task.problem
            need = heuristics.shared_bytes(task.op, problem.head_dim, problem.dtype, candidate.config, gpu.arch)
            assert need <= 1.1 * gpu.shared_bytes
            assert candidate.config.num_stages == 1 or gpu.arch != "sm_75"


@pytest.mark.parametrize("gpu", ["h100", "rtx-5090"])
@pytest.mark.parametrize("preset", problems.PRESETS)
def test_every_kind_of_launch_is_in_the_race(preset: str, gpu: str) -> None:
    """What loads by pointers is timed nowhere, because tiles near a default in a ring fill the list."""
    on, limit = device.simulated(gpu), problems.PRESETS[preset].candidates
    asked = problems.of_calls(problems.preset(preset), on)
    several = 0
    for task in asked:
        every = space.space(task, on)
        raced = [candidate.config for candidate in every[:limit]]
        loads = {config.loads for config in raced}
        assert loads >= {candidate.config.loads for candidate in every}, title(task)
        assert all(loads_so in loads or not space._grid(task, on, loads_so) for loads_so in space._all_loads(task, on))
        assert _texts(task, raced) == _texts(task, [candidate.config for candidate in every]), title(task)
        several += len(loads) > 1
    assert several > len(asked) / 3


def _texts(task: Task, configs: list[LaunchConfig]) -> set[Variant | None]:
    branches = problems.every_branch(task.problem)
    return {text_for(task.problem, branches, task.op, config, generated.names()) for config in configs}


def test_a_space_is_neither_a_handful_nor_a_day() -> None:
    """Rules that leave the default alone, or a grid that takes an hour a problem."""
    for task in EVERY:
        if task.workload == "longnet":
            assert 25 <= len(space.space(task, H100)) <= 60


def test_a_pair_that_branches_share_is_work_once() -> None:
    """A chain that seems to run at more than its share of the device's peak."""
    whole = next(task for task in EVERY if len(task.problem.branches) == 3 and task.op == "fwd" and not task.key.causal)
    alone = [replace(whole, problem=replace(whole.problem, branches=(branch,))) for branch in whole.problem.branches]
    # Half of what the second and the third hold lies in the segments of the one before.
    first, second, third = (task.flops for task in alone)
    assert whole.flops == first + second / 2 + third / 2


def test_a_step_changes_one_thing() -> None:
    """A step that jumps: what it finds says nothing about why."""
    task = EVERY[0]
    start = space.space(task, H100)[0]
    around = space.neighbours(task, H100, start)
    assert around
    for near in around:
        before, after = start.config, near.config
        changed = [name for name in before.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
        assert len(changed) == 1, (before, after)


def test_rivals_are_what_a_user_could_have_written() -> None:
    """cuDNN asked for what it cannot do: an order, a mask, float32, several branches; or its backward timed twice."""
    calls = problems.preset("standard")
    alone = [(name, replace(problem, branches=(branch,))) for name, problem in calls for branch in problem.branches]
    asked = [task for task in (*EVERY, *problems.of_calls(alone, H100)) if _by_cudnn(task)]
    assert any(task.key.causal for task in asked) and {task.key.queries for task in asked} == {"dilated", "all"}
    assert {task.op for task in asked} == {"fwd", "dkdv"}
    for key in (task.key for task in asked):
        assert key.order == "none" and key.flags in ((), ("full",))
        assert key.queries == "dilated" or key.branches[0][1] == 1  # who keeps every step asks at every step
        assert key.dtype in ("bf16", "fp16") and len(key.branches) == 1


def _by_cudnn(task: Task) -> bool:
    return any(rival.route == space.CUDNN for rival in space.rivals(task, H100))
