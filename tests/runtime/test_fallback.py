"""Whatever was measured wherever: no plan holds a launch that its device has not the shared memory for.

Problems, devices and databases are drawn. What a launch really takes is made up here, by a rule that the plan does not
know: `takes`. Entries claim what it says of the text and the device that they were measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import database, device, generated, heuristics
from dilated_attention_pytorch.config import OPS, LaunchConfig, Problem, ProblemKey
from dilated_attention_pytorch.database import Database, Entry
from dilated_attention_pytorch.device import Device
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Choice, Plan, plan
from dilated_attention_pytorch.runtime.variants import acting_order
from dilated_attention_pytorch.variant import Variant

from ..measurements import KERNEL, PROBLEM, TOOLCHAIN, entry

DEVICES = sorted(device.known().values(), key=lambda found: found.name)
ONE_TILE = "1tile1tile1t"
GONE = "gonegonegone"
_NAMES = sorted(generated.names() - {"delta"})
KERNELS = {
    KERNEL: tuple(name for name in _NAMES if not Variant.from_name(name).one_tile),
    ONE_TILE: tuple(name for name in _NAMES if Variant.from_name(name).one_tile),
}
DRAWN = settings(max_examples=250, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def takes(op: str, problem: Problem, config: LaunchConfig, arch: str, one_tile: bool) -> int:
    """Bytes of shared memory, as the compiler of this file has it: a text of one tile takes a third."""
    looped = heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, arch)
    return looped // 3 if one_tile else looped


class InMemory(Database):
    """A database of entries by device that is on no disk."""

    def __init__(self, entries: Mapping[str, list[Entry]]) -> None:
        super().__init__(Path("on no disk"), lambda: KERNELS)
        for name, measured in entries.items():
            shelf = self._arches.setdefault(device.simulated(name).arch, {}).setdefault(name, {})
            for found in measured:
                shelf[found.key.op] = {**shelf.get(found.key.op, {}), found.key: found}

    def configs(self, arch: str, op: str) -> set[LaunchConfig]:
        """What was measured of an op on an architecture."""
        return {found.config for name in self.devices(arch) for found in self.entries(arch, name, op).values()}


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    order = draw(st.sampled_from(["none", "none", "snake", "hilbert"]))
    heads = draw(st.sampled_from([1, 3, 8, 12]))
    dtype = draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    branch = st.tuples(st.sampled_from([16, 64, 128, 128, 500, 2048, 1 << 17]), st.sampled_from([1, 1, 2, 4, 7]))
    return Problem(
        dtype=dtype,
        batch=draw(st.integers(1, 4)),
        length=draw(st.sampled_from([1, 37, 128, 1024, 4099, 65536])),
        heads=heads,
        kv_heads=draw(st.sampled_from([heads, 1])),
        head_dim=8 * draw(st.integers(1, 32)),
        branches=tuple(draw(st.lists(branch, min_size=1, max_size=2))),
        queries=draw(st.sampled_from(["dilated", "all"])),
        order=order,
        row_width=draw(st.sampled_from([5, 64])) if order == "snake" else 0,
        causal=draw(st.booleans()),
        mask=draw(st.booleans()),
        tf32=dtype == "fp32" and draw(st.booleans()),
    )


_powers = st.sampled_from([16, 16, 32, 64, 128, 256])
configs = st.builds(LaunchConfig, _powers, _powers, num_warps=st.sampled_from([2, 4, 8]), num_stages=st.integers(1, 5))


@st.composite
def questions(draw: st.DrawFn) -> tuple[Problem, Device, InMemory]:
    """A problem, a device, perhaps with less memory than its name says, and what was measured there and elsewhere."""
    problem, asked = draw(problems()), draw(st.sampled_from(DEVICES))
    if draw(st.booleans()):
        asked = replace(asked, shared_bytes=draw(st.integers(1, asked.shared_bytes)))
    near = [found for found in DEVICES if found.arch == asked.arch]
    entries: dict[str, list[Entry]] = {}
    for _ in range(draw(st.integers(0, 6))):
        where = draw(st.sampled_from(near) if draw(st.booleans()) else st.sampled_from(DEVICES))
        op, config = draw(st.sampled_from(OPS)), draw(configs)
        kernel = draw(st.sampled_from([KERNEL, KERNEL, ONE_TILE, GONE]))
        branch = draw(st.integers(0, len(problem.branches) - 1))
        claims = takes(op, problem, config, where.arch, one_tile=kernel != KERNEL)
        measured = entry(op, problem, branch=branch, config=config, shared_bytes=claims, kernel=kernel)
        key = replace(measured.key, order=acting_order(problem, branch))
        if draw(st.booleans()):
            ((rows, stride),) = key.branches
            key = replace(key, branches=((2 * rows, stride),))
        entries.setdefault(where.name, []).append(replace(measured, key=key))
    return problem, asked, InMemory(entries)


def choices(found: Plan) -> list[Choice]:
    return list(found.launches)


def test_no_launch_exceeds_its_device() -> None:
    """A config of a large GPU on a small one, of another architecture, or of a text that takes less: it cannot launch.

    The draws have to meet every rung: those that never find a measurement prove nothing of measurements.
    """
    reached: set[str] = set()

    @DRAWN
    @given(questions())
    def walk(question: tuple[Problem, Device, InMemory]) -> None:
        problem, asked, committed = question
        found = plan(problem, asked, toolchain=TOOLCHAIN, committed=committed)
        reached.add(found.backend)
        for choice in choices(found):
            reached.add(choice.rung)
            need = takes(choice.op, problem, choice.config, asked.arch, choice.variant.one_tile)
            assert need <= asked.shared_bytes, f"{choice.variant.name} {choice.config.name} from rung {choice.rung}"
            assert choice.rung in ("heuristic", "floor") or choice.config in committed.configs(asked.arch, choice.op)

    walk()
    assert reached >= {"exact", "silicon", "nearest", "arch", "stale", "heuristic", "floor", "triton", "torch"}


@pytest.mark.parametrize("asked", DEVICES, ids=lambda found: found.name)
def test_what_is_too_large_is_passed_over_on_every_device(asked: Device, tmp_path: Path) -> None:
    """Files of a larger GPU, copied under this one's name by hand or by a merge, must not be believed."""
    config = LaunchConfig(256, 256, num_warps=8, num_stages=5)
    large = entry(config=config, shared_bytes=asked.shared_bytes + 1)
    database.save(asked, [large], tmp_path)
    committed = InMemory({asked.name: [large]})
    for options in (Options(), Options(database=tmp_path)):
        for choice in choices(plan(PROBLEM, asked, None, options, toolchain=TOOLCHAIN, committed=committed)):
            assert choice.rung in ("heuristic", "floor")
            assert takes(choice.op, PROBLEM, choice.config, asked.arch, one_tile=False) <= asked.shared_bytes


def test_a_near_entry_of_one_tile_is_weighed_as_the_text_that_runs() -> None:
    """Compiled for sm_90, these tiles take 49,152 bytes in the text of one tile, and 114,688 in the one with a loop."""
    problem = Problem("bf16", 1, 5000, 8, 8, 64, branches=((1024, 1),), queries="all")
    config = LaunchConfig(128, 128, num_warps=8, num_stages=3)
    asked = device.simulated("h100")
    key = replace(ProblemKey.of(problem, "fwd", 0), branches=((512, 1),))
    claimed = takes("fwd", problem, config, asked.arch, one_tile=True)
    small = replace(asked, shared_bytes=claimed + 1000)
    measured = replace(entry("fwd", problem, config=config, shared_bytes=claimed, kernel=ONE_TILE), key=key)
    committed = InMemory({asked.name: [measured]})
    chosen = plan(problem, small, toolchain=TOOLCHAIN, committed=committed).fwd[0]
    assert chosen.rung in ("heuristic", "floor")
    assert "bytes of shared memory" in dict(chosen.passed)["nearest"]
    assert plan(problem, asked, toolchain=TOOLCHAIN, committed=committed).fwd[0].rung == "nearest"
