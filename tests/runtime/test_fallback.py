"""Whatever was measured wherever: no plan holds a launch that its device has not the shared memory or the threads for.

Problems, toolchains and databases are drawn for every device of devices.yaml. What a launch really takes is made up
here, by a rule that the plan does not know: `takes`. Entries claim what it says of the text and the device that they
were measured on. Ordinary runs draw some plans of each device, `make prove` (PROVE=all) 25 times as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from dilated_attention_pytorch import database, device, generated, heuristics
from dilated_attention_pytorch.config import BACKWARD, EVERY_OP, IN_GLUON, OPS, LaunchConfig, Problem, ProblemKey
from dilated_attention_pytorch.config import next_power_of_two as power
from dilated_attention_pytorch.database import Database, Entry
from dilated_attention_pytorch.device import Device, Toolchain
from dilated_attention_pytorch.errors import ConfigError
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Choice, Plan, plan, step_down
from dilated_attention_pytorch.runtime.variants import chain, key_of, may_give_all_gradients, rows_of_class
from dilated_attention_pytorch.variant import Variant

from ..measurements import KERNEL, PROBLEM, TOOLCHAIN, entry

DEVICES = sorted(device.known().values(), key=lambda found: found.name)
PROVE = os.environ.get("PROVE") == "all"
DRAWS = 1000 if PROVE else 40
"""Plans of each device; three times as many of those that have texts in Gluon besides."""
THREADS = 1024
"""Of a block, on every GPU there is."""
ONE_TILE, CHAIN, RING, GONE = "1tile1tile1t", "chainchainch", "ringringring", "gonegonegone"
_VARIANTS = [Variant.from_name(name) for name in sorted(generated.names() - {"delta"})]


def text_of(variant: Variant) -> str:
    """The hash that entries of a text of this kind bear."""
    if variant.wider:
        return CHAIN
    return RING if variant.ring else ONE_TILE if variant.one_tile else KERNEL


KERNELS = {kind: tuple(v.name for v in _VARIANTS if text_of(v) == kind) for kind in (KERNEL, ONE_TILE, CHAIN, RING)}
SHARE = {KERNEL: 1.0, ONE_TILE: 1 / 3, CHAIN: 7 / 8, RING: 1.0, GONE: 1.0}
"""Of what the plan estimates, as the compiler of this file has it: each text takes what its kind does."""


def takes(op: str, problem: Problem, config: LaunchConfig, arch: str, kind: str) -> int:
    """Bytes of shared memory that a text of a kind takes."""
    return int(heuristics.shared_bytes(op, problem.head_dim, problem.dtype, config, arch) * SHARE[kind])


class InMemory(Database):
    """A database of entries by device that is on no disk."""

    def __init__(self, entries: Mapping[str, list[Entry]]) -> None:
        super().__init__(Path("on no disk"), lambda: KERNELS)
        for name, measured in entries.items():
            shelf = self._arches.setdefault(device.simulated(name).arch, {}).setdefault(name, {})
            for found in measured:
                shelf[found.key.op] = {**shelf.get(found.key.op, {}), found.key: found}

    def configs(self, arch: str, op: str) -> set[LaunchConfig | object]:
        """What was measured of an op on an architecture."""
        return {found.config for name in self.devices(arch) for found in self.entries(arch, name, op).values()}


CHAINS = sorted({variant.levels for variant in _VARIANTS if variant.wider})
SHORT = [(64, 1), (64, 2), (128, 1), (128, 2), (256, 2), (256, 4)]
"""Whose gradients one launch may give."""
LONG = [(16, 1), (500, 7), (2048, 1), (2048, 2), (4096, 2), (2048, 4), (1 << 17, 4)]
APART = [((1024, 1), (3072, 6)), ((2048, 2), (512, 1))]
"""Branches that no text computes in one pass."""


def problem_of(chance: Random) -> Problem:
    """Half of them are what chains, rings, descriptors and joint gradients are for; the others whatever a call asks."""
    return _plain(chance) if chance.random() < 0.5 else _mixed(chance)


def _plain(chance: Random) -> Problem:
    heads = chance.choice([4, 8])
    return Problem(
        dtype=chance.choice(["bf16", "fp16"]),
        batch=chance.choice([1, 2]),
        length=chance.choice([8192, 8192, 65536, 65536, 65536 - 3]),
        heads=heads,
        kv_heads=chance.choice([heads, heads, heads, heads // 2]),
        head_dim=chance.choice([32, 64, 64, 128, 128, 128]),
        branches=chance.choice([(chance.choice(SHORT),), chance.choice(CHAINS), (chance.choice(LONG),), *APART]),
        causal=chance.random() < 0.5,
    )


def _mixed(chance: Random) -> Problem:
    order = chance.choice(["none", "none", "snake", "hilbert"])
    heads = chance.choice([1, 3, 8, 12])
    dtype = chance.choice(["bf16", "fp16", "fp32"])
    return Problem(
        dtype=dtype,
        batch=chance.randint(1, 4),
        length=chance.choice([1, 37, 128, 1024, 4099, 65536]),
        heads=heads,
        kv_heads=chance.choice([heads, 1]),
        head_dim=8 * chance.randint(1, 32),
        branches=tuple(chance.choice([*SHORT, *LONG]) for _ in range(chance.randint(1, 2))),
        queries=chance.choice(["dilated", "all"]),
        order=order,
        row_width=chance.choice([5, 64]) if order == "snake" else 0,
        causal=chance.random() < 0.5,
        mask=chance.random() < 0.5,
        dropout=chance.random() < 0.2,
        tf32=dtype == "fp32" and chance.random() < 0.5,
    )


def config_of(chance: Random, op: str, problem: Problem, branch: int) -> LaunchConfig:
    """Tiles; those of all gradients often hold a segment."""
    loads = chance.choice(["pointer", "descriptor", "descriptor", "ring", "producer"])
    if loads == "producer":
        return LaunchConfig(128, chance.choice([64, 128]), 8, chance.randint(1, 4), loads=loads)
    if loads == "ring":
        config = LaunchConfig(chance.choice([64, 128]), chance.choice([64, 128]), 4, chance.randint(1, 4), loads=loads)
    else:
        block_m, block_n = chance.choices([16, 32, 64, 64, 128, 256], k=2)
        warps = chance.choice([2, 4, 4, 8, 8, 32])
        config = LaunchConfig(block_m, block_n, warps, chance.randint(1, 5), loads=loads)
    side = max(power(problem.rows(branch)), 16)
    if op == BACKWARD and side <= 256 and chance.random() < 0.8:
        return replace(config, block_m=chance.choice([config.block_m, side]), block_n=side)
    return config


Question = tuple[Problem, Device, InMemory, Toolchain, Options]


def question_of(named: Device, number: int) -> Question:
    """A problem, the device, perhaps with less memory than its name says, and what was measured there and elsewhere."""
    chance = Random(f"{named.name} {number}")
    problem, asked = problem_of(chance), named
    if chance.random() < 0.3:
        asked = replace(asked, shared_bytes=chance.randint(1, asked.shared_bytes))
    near = [found for found in DEVICES if found.arch == asked.arch]
    together = chain(problem, generated.names())
    entries: dict[str, list[Entry]] = {}
    for _ in range(chance.randint(0, 10)):
        where = chance.choice([named, chance.choice(near), chance.choice(near), chance.choice(DEVICES)])
        op = chance.choice(EVERY_OP)
        branches: tuple[int, ...] = (chance.randrange(len(problem.branches)),)
        if together and op in OPS and chance.random() < 0.7:
            branches = together
        config = config_of(chance, op, problem, branches[0])
        own = CHAIN if len(branches) > 1 else RING if config.loads in IN_GLUON else KERNEL
        kind = chance.choice([own, own, own, ONE_TILE, GONE])
        claims = takes(op, problem, config, where.arch, kind)
        measured = entry(op, problem, branch=branches, config=config, shared_bytes=claims, kernel=kind)
        key = key_of(problem, op, *branches)
        if chance.random() < 0.4:
            (rows, stride), *wider = key.branches
            key = replace(key, branches=((2 * rows, stride), *wider))
        entries.setdefault(where.name, []).append(replace(measured, key=key))
    chosen: tuple[tuple[str, LaunchConfig], ...] = ()
    if chance.random() < 0.1:
        op = chance.choice(EVERY_OP)
        chosen = ((op, config_of(chance, op, problem, 0)),)
    triton = chance.choice([TOOLCHAIN.triton, TOOLCHAIN.triton, TOOLCHAIN.triton, "3.7.1", "3.5.0"])
    return problem, asked, InMemory(entries), Toolchain(triton), Options(config=chosen)


def choices(found: Plan) -> list[Choice]:
    return list(found.launches)


def exceeded(choice: Choice, question: Question) -> str | None:
    """The limit of its device that a launch goes beyond."""
    problem, asked, committed, toolchain, _ = question
    config, arch = choice.config, asked.arch
    need = takes(choice.op, problem, config, arch, text_of(choice.variant))
    if need > asked.shared_bytes:
        return f"{need:,} bytes of shared memory, of {asked.shared_bytes:,}"
    if config.num_warps * asked.warp_size > THREADS:
        return f"{config.num_warps * asked.warp_size:,} threads"
    if choice.variant.ring != (config.loads in IN_GLUON):
        return f"{config.loads} for the text {choice.variant.name}"
    if choice.variant.ring and not (arch == "sm_90" and heuristics.takes_rings(arch, problem.head_dim, problem.dtype)):
        return f"a ring on {arch} at head_dim {problem.head_dim} in {problem.dtype}"
    if choice.variant.ring and toolchain.triton == "3.5.0":
        return "a text in Gluon, which this Triton does not compile"
    if choice.op == BACKWARD and may_give_all_gradients(problem, choice.branches, config, choice.variant):
        return "all gradients of a segment that no tile holds"
    if choice.wider and rows_of_class(problem, choice.branches) % max(config.block_m, config.block_n):
        return "tiles across the segments of a chain"
    untuned = choice.rung in ("heuristic", "floor", "config")
    known = untuned or config in committed.configs(arch, choice.op)
    return None if known else f"a configuration that nobody measured on {arch}, of rung {choice.rung}"


def drawn(asked: Device, numbers: range) -> Counter[str]:
    """What the draws of one device came to: backends, rungs, operations, loads; each plan within the limits."""
    reached: Counter[str] = Counter()
    for number in numbers:
        question = question_of(asked, number)
        problem, where, committed, toolchain, options = question
        try:
            found = plan(problem, where, None, options, toolchain=toolchain, committed=committed)
        except ConfigError as error:
            assert options.config and "options(config=...)" in str(error)
            reached["refused"] += 1
            continue
        reached.update((found.backend, asked.name))
        for choice in choices(found):
            told = (
                f"draw {number} of {asked.name}: {choice.op} {choice.variant.name} {choice.config.name}, {choice.rung}"
            )
            assert exceeded(choice, question) is None, f"{told}: {exceeded(choice, question)}"
            reached.update((choice.rung, choice.op, choice.config.loads, f"{choice.op} {choice.config.loads}"))
            if choice.wider:
                reached[f"chain {choice.config.loads}"] += 1
            if where is asked and choice.op != BACKWARD:  # what runs if the launch fails nevertheless
                smaller = step_down(problem, choice)
                assert exceeded(smaller, question) is None, f"{told}, stepped down: {exceeded(smaller, question)}"
    return reached


EVERYWHERE = {
    "exact",
    "stale",
    "heuristic",
    "floor",
    "config",
    "refused",
    "triton",
    "torch",
    *EVERY_OP,
    "chain pointer",
}
ON_HOPPER = {"silicon", "nearest", "descriptor", "ring", "producer", "chain descriptor", "bwd ring"}
"""What draws have to come to: those that never find a measurement prove nothing of measurements."""
GROUPS = [[asked] for asked in DEVICES] if PROVE else [DEVICES]


@pytest.mark.parametrize("asked", GROUPS, ids=lambda group: group[0].name if len(group) == 1 else "every device")
def test_no_launch_exceeds_its_device(asked: list[Device]) -> None:
    """A config of a large GPU on a small one, of another architecture, or of a text that takes less: no launch."""
    union: Counter[str] = Counter()
    for found in asked:
        union += drawn(found, range(DRAWS * (3 if found.arch == "sm_90" else 1)))
    assert {found.name for found in asked} <= {*union}
    assert {*union} >= EVERYWHERE
    assert "arch" in union or len(asked) == 1  # no device of another chip
    if any(found.arch == "sm_90" for found in asked):
        assert {*union} >= ON_HOPPER


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
            assert takes(choice.op, PROBLEM, choice.config, asked.arch, KERNEL) <= asked.shared_bytes


def test_a_near_entry_of_one_tile_is_weighed_as_the_text_that_runs() -> None:
    """Compiled for sm_90, these tiles take 49,152 bytes in the text of one tile, and 114,688 in the one with a loop."""
    problem = Problem("bf16", 4, 5000, 8, 8, 64, branches=((1024, 1),), queries="all")
    config = LaunchConfig(128, 128, num_warps=8, num_stages=3)
    asked = device.simulated("h100")
    key = replace(ProblemKey.of(problem, "fwd", 0), branches=((512, 1),))
    claimed = takes("fwd", problem, config, asked.arch, ONE_TILE)
    small = replace(asked, shared_bytes=claimed + 1000)
    measured = replace(entry("fwd", problem, config=config, shared_bytes=claimed, kernel=ONE_TILE), key=key)
    committed = InMemory({asked.name: [measured]})
    chosen = plan(problem, small, toolchain=TOOLCHAIN, committed=committed).fwd[0]
    assert chosen.rung in ("heuristic", "floor")
    assert "bytes of shared memory" in dict(chosen.passed)["nearest"]
    assert plan(problem, asked, toolchain=TOOLCHAIN, committed=committed).fwd[0].rung == "nearest"
