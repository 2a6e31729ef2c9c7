"""The plan: each rung walked, everything fits the device, refusals are sentences, nothing depends on the process."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dilated_attention_pytorch import _layout, device, heuristics
from dilated_attention_pytorch.config import OPS, LaunchConfig, Problem
from dilated_attention_pytorch.database import Database
from dilated_attention_pytorch.device import INTERPRETER, Toolchain
from dilated_attention_pytorch.errors import ArgumentError, ConfigError, DatabaseMiss, UnsupportedError
from dilated_attention_pytorch.runtime import plan as plans
from dilated_attention_pytorch.runtime.options import Options, options
from dilated_attention_pytorch.runtime.plan import LADDER, Choice, Plan, plan
from dilated_attention_pytorch.workloads import WORKLOADS

from ..measurements import KERNEL, PROBLEM, TOOLCHAIN, database_at, entry

H100 = device.simulated("h100")
MINE = LaunchConfig(32, 32, num_stages=1)
OLD = "abcdefabcdef"


def planned(committed: Database, asked: Problem = PROBLEM, on: device.Device | None = H100, **more: object) -> Plan:
    return plan(asked, on, toolchain=TOOLCHAIN, committed=committed, **more)  # type: ignore[arg-type]


def fwd(found: Plan) -> Choice:
    return found.fwd[0]


def choices(found: Plan) -> list[Choice]:
    return list(found.launches)


@pytest.fixture
def nothing(tmp_path: Path) -> Database:
    """A database without an entry."""
    return database_at(tmp_path / "nothing", {})


# ---- The ladder ------------------------------------------------------------------------------------------------------


def test_each_rung_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rung out of order, or one that is never reached, looks fine on every GPU that somebody tuned."""
    near = entry(config=LaunchConfig(16, 64), branches=((512, 2),))
    entries = {"h100": [entry(config=LaunchConfig(16, 16)), near], "h200": [entry(config=LaunchConfig(16, 32))]}
    committed = database_at(tmp_path / "committed", entries)
    database_at(tmp_path / "mine", {"h100": [entry(config=LaunchConfig(32, 16))]})
    # The overlay is loaded by its path, with the kernels that are really committed.
    monkeypatch.setattr("dilated_attention_pytorch.database.rendered_kernels", lambda: {"0123456789ab": ("general",)})
    overlay = Options(database=tmp_path / "mine")
    explicit = replace(overlay, config=(("fwd", MINE),))

    def at(name: str) -> Database:
        return database_at(tmp_path / name, {name: entries.get(name, [near])})

    stale = database_at(tmp_path / "stale", {"h100": [entry(kernel=OLD)]})
    walked = {
        "config": planned(committed, options=explicit),
        "overlay": planned(committed, options=overlay),
        "exact": planned(committed),
        "silicon": planned(at("h200")),
        "nearest": planned(database_at(tmp_path / "near", {"h100": [near]})),
        "arch": planned(at("l4"), on=device.simulated("rtx-4090")),
        "stale": planned(stale),
        "heuristic": planned(database_at(tmp_path / "empty", {})),
        "floor": planned(database_at(tmp_path / "void", {}), on=replace(H100, shared_bytes=14_000)),
    }
    assert list(walked) == list(LADDER)
    assert {rung: fwd(found).rung for rung, found in walked.items()} == {rung: rung for rung in LADDER}
    for rung, found in walked.items():
        above = list(LADDER)[: list(LADDER).index(rung)]
        assert {name for name, _ in fwd(found).passed} == set(above), f"{rung} does not say why not the ones above"
    last = planned(committed, on=replace(H100, shared_bytes=1000))
    assert (last.backend, last.rung, last.launches) == ("torch", "torch", ())
    assert "not even the smallest tiles fit" in last.refusals[0][1]


def test_the_plan_carries_its_lowest_rung(tmp_path: Path) -> None:
    """A plan that is exact but for one launch would pass for a tuned one."""
    committed = database_at(tmp_path, {"h100": [entry("fwd"), entry("dq")]})
    found = planned(committed)
    assert [choice.rung for choice in choices(found)] == ["exact", "heuristic", "exact"]
    assert found.rung == "heuristic"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shared_bytes": 232_449}, "invalid"),
        ({"error": 1.0}, "invalid"),
        ({"kernel": OLD}, "measured on a kernel text that has changed since"),
    ],
)
def test_an_entry_that_cannot_be_trusted_is_passed_over(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    """A wrong kernel, or one that cannot be launched, must not run because it has the right key."""
    fresh = entry(branches=((512, 2),), config=MINE)
    found = fwd(planned(database_at(tmp_path, {"h100": [entry(**change), fresh]})))  # type: ignore[arg-type]
    assert (found.rung, found.config) == ("nearest", MINE)
    assert any(rung == "exact" and complaint in sentence for rung, sentence in found.passed)


def test_a_pick_that_gained_little_elsewhere_does_not_leave_home(tmp_path: Path) -> None:
    """Tiles that were a hair faster than the default on a small sequence, and lose an eighth to it on a larger one."""
    tied = entry(branches=((512, 2),), config=MINE)
    tied = replace(tied, time_us=replace(tied.time_us, default=102.0))
    found = fwd(planned(database_at(tmp_path / "tied", {"h100": [tied]})))
    assert found.rung == "heuristic"
    assert any("no reason to leave the untuned default, which took 102 us there" in why for _, why in found.passed)
    unrivalled = replace(tied, time_us=replace(tied.time_us, default=None))
    assert fwd(planned(database_at(tmp_path / "unrivalled", {"h100": [unrivalled]}))).rung == "nearest"
    here = replace(entry(config=MINE), time_us=tied.time_us)
    assert fwd(planned(database_at(tmp_path / "here", {"h100": [here]}))).rung == "exact"


def test_an_entry_of_another_gpu_must_fit_this_one(tmp_path: Path) -> None:
    """A config measured on a GPU with more shared memory cannot be launched here."""
    committed = database_at(tmp_path, {"h200": [entry(shared_bytes=200_000)]})
    assert fwd(planned(committed)).rung == "silicon"
    found = fwd(planned(committed, on=replace(H100, shared_bytes=100_000)))
    assert found.rung == "heuristic"
    assert any("needs 200,000 bytes of shared memory a block" in sentence for _, sentence in found.passed)


def test_what_an_installed_package_measured_goes_before_what_it_came_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing: Database
) -> None:
    """`tune` without a checkout, which writes to a folder that nobody reads."""
    root = _layout._root()
    monkeypatch.setattr(_layout, "_root", lambda: root)
    monkeypatch.setattr("dilated_attention_pytorch.database.rendered_kernels", lambda: {"0123456789ab": ("general",)})
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(_layout, "is_checkout", lambda: False)
    mine = _layout.own_db_dir()
    assert mine.is_relative_to(tmp_path)
    mine.mkdir(parents=True)
    database_at(mine, {"h100": [entry(config=MINE)]})
    for known in (plans._own_database, plans._plan):
        known.cache_clear()
    try:
        found = fwd(planned(nothing))
    finally:
        plans._own_database.cache_clear()
        plans._plan.cache_clear()
    assert (found.rung, found.config) == ("overlay", MINE)


def test_a_measurement_with_another_triton_is_used_and_said(tmp_path: Path) -> None:
    """Refusing it would untune everybody with each release of Triton; hiding it would mislead."""
    found = fwd(planned(database_at(tmp_path, {"h100": [entry(triton="3.5.1")]})))
    assert found.rung == "exact"
    assert "toolchain-stale" in found.why


def test_a_config_that_cannot_be_launched_is_refused_to_who_asked(nothing: Database) -> None:
    """Falling down the ladder in silence, the user would time something else."""
    big = LaunchConfig(256, 256, num_warps=8, num_stages=4)
    asked = Options(config=(("dkdv", big),))
    with pytest.raises(ConfigError, match=r"for dkdv: 256x256_w8_s4 needs [\d,]+ bytes .* smaller blocks"):
        planned(nothing, options=asked)
    forward_only = planned(nothing, options=asked, backward=False)
    assert forward_only.of("dkdv")[0].rung == "heuristic"


def test_on_miss_error_takes_no_guess(tmp_path: Path) -> None:
    """Production asked for what was measured, and would run a default for months."""
    committed = database_at(tmp_path, {"h100": [entry("fwd"), entry("dq", branches=((512, 2),))]})
    strict = Options(on_miss="error")
    assert planned(committed, options=strict, backward=False).fwd[0].rung == "exact"
    with pytest.raises(DatabaseMiss, match=r'on_miss="error": nvidia-h100-80gb-hbm3 has no measurement for .*dkdv'):
        planned(committed, options=strict)


def test_a_branch_without_a_use_for_its_order_is_looked_up_unordered(tmp_path: Path) -> None:
    """It runs the unordered text: a measurement of the ordered one says nothing of it."""
    ordered = replace(PROBLEM, branches=((8765, 1),), order="hilbert")
    unordered = replace(ordered, order="none")
    found = planned(database_at(tmp_path, {"h100": [entry(problem=unordered)]}), ordered)
    assert (fwd(found).rung, fwd(found).variant.name) == ("exact", "full_d1")


@pytest.mark.parametrize(
    ("text", "loads", "length", "taken"),
    [
        ("general_even", "descriptor", 8192, True),
        ("general_even", "descriptor", 8765, False),
        ("general_even", "pointer", 8765, False),
        ("general", "pointer", 8765, True),
        ("general", "pointer", 8192, False),
    ],
)
def test_whole_tiles_and_ragged_ones_are_measured_apart(
    tmp_path: Path, text: str, loads: str, length: int, taken: bool
) -> None:
    """Tiles that won by descriptor, run by pointers on a sequence of another length: a fifth slower than untuned."""
    asked = replace(PROBLEM, length=length)
    database_at(tmp_path, {"h100": [entry(problem=asked, config=LaunchConfig(64, 128, loads=loads))]})
    found = fwd(planned(Database(tmp_path, lambda: {KERNEL: (text,)}), asked))
    assert found.rung == ("exact" if taken else "heuristic")
    assert ("tiles, which are loaded otherwise" in dict(found.passed).get("exact", "")) != taken


def test_determinism_asks_for_the_same_measurement(tmp_path: Path) -> None:
    """No kernel has atomics: whoever excludes them would run untuned for nothing."""
    committed = database_at(tmp_path, {"h100": [entry()]})
    assert fwd(planned(committed, replace(PROBLEM, deterministic=True))).rung == "exact"


def test_branches_are_launched_by_dilation(nothing: Database) -> None:
    """The first launch writes zeros wherever its branch keeps no step: r = 16 first would write 15 of 16 twice."""
    asked = replace(PROBLEM, branches=((8192, 16), (512, 1), (2048, 4)))
    found = planned(nothing, asked)
    assert [(choice.op, choice.branch) for choice in found.launches] == [
        *(("fwd", branch) for branch in (1, 2, 0)),
        *((op, branch) for branch in (1, 2, 0) for op in ("dkdv", "dq")),
    ]
    assert [choice.merge for choice in found.launches] == [False, True, True, False, False, *[True] * 4]


# ---- Branches in one pass, or one by one -----------------------------------------------------------------------------

NESTED = replace(PROBLEM, length=32768, branches=((2048, 1), (4096, 2), (8192, 4), (16384, 6)))
"""Three branches that a rendered text computes in one pass, and one beside them."""
CHAIN = (0, 1, 2)


def passes(found: Plan) -> dict[str, list[tuple[int, ...]]]:
    return {op: [choice.branches for choice in found.of(op)] for op in OPS}


def test_whether_branches_share_a_pass_is_as_measured(tmp_path: Path) -> None:
    """A pass that is slower than its branches apart, and runs; or one measurement that decides for all operations."""
    times = {"fwd": 125.0, "dkdv": 80.0, "dq": None}
    entries = [entry(op, NESTED, branch=CHAIN, apart=apart) for op, apart in times.items()]
    found = planned(database_at(tmp_path, {"h100": entries}), NESTED)
    together, apart = [CHAIN, (3,)], [(0,), (1,), (2,), (3,)]
    assert passes(found) == {"fwd": together, "dkdv": apart, "dq": together}
    for op in OPS:
        assert [choice.merge for choice in found.of(op)] == [False] + [True] * (len(found.of(op)) - 1), op
    assert [(choice.op, choice.branches) for choice in found.beaten] == [("dkdv", CHAIN)]
    told = found.explain()
    assert "not dkdv of branches 0, 1, 2 in one pass: faster apart; 64x32_w4_s2  exact: 100 us (99 to 101, " in told
    assert "untuned 125, apart 80) on nvidia-h100" in told and "apart 125) on nvidia-h100" in told
    assert "faster apart" not in found.explain(backward=False)


def test_a_measurement_nearby_decides_too(tmp_path: Path) -> None:
    """A sequence of twice the length, which nobody tuned, goes back to the slower way."""
    near = entry("dq", replace(NESTED, length=16384), branch=CHAIN, apart=80.0, grid=128)
    found = planned(database_at(tmp_path, {"h200": [near]}), NESTED)
    assert found.beaten[0].rung == "nearest"
    assert [branches for branches in passes(found).items() if branches[1] != [CHAIN, (3,)]] == [
        ("dq", [(0,), (1,), (2,), (3,)])
    ]


def test_no_text_is_proposed_that_is_there(tmp_path: Path) -> None:
    """Somebody renders a text again and again, and calls go on without it, since it is slower."""
    entries = [entry(op, NESTED, branch=CHAIN, apart=80.0) for op in OPS]
    found = planned(database_at(tmp_path, {"h100": entries}), NESTED)
    assert {choice.wider for choice in found.launches} == {()}
    assert "could share a pass" not in found.explain()


def test_the_launches_apart_come_down_the_ladder(tmp_path: Path) -> None:
    """Branches that run apart, with tiles that nobody measured although somebody did."""
    entries = [entry("fwd", NESTED, branch=CHAIN, apart=80.0), entry("fwd", NESTED, branch=1, config=MINE)]
    found = planned(database_at(tmp_path, {"h100": entries}), NESTED)
    assert [(choice.branch, choice.config == MINE) for choice in found.fwd if choice.rung == "exact"] == [(1, True)]


def test_what_was_asked_for_is_launched_in_one_pass(tmp_path: Path) -> None:
    """Tiles that somebody asked for, launched for each branch, because a measurement of other tiles says so."""
    committed = database_at(tmp_path, {"h100": [entry("fwd", NESTED, branch=CHAIN, apart=80.0)]})
    assert passes(planned(committed, NESTED, options=Options(config=(("fwd", MINE),))))["fwd"] == [CHAIN, (3,)]


# ---- Everything fits -------------------------------------------------------------------------------------------------


def drawn(source: random.Random) -> Problem:
    heads = source.choice((1, 3, 8, 12))
    branches = [(source.randint(1, 40_000), source.randint(1, 20)) for _ in range(source.randint(1, 3))]
    return Problem(
        dtype=source.choice(("bf16", "fp16", "fp32")),
        batch=source.randint(1, 4),
        length=source.randint(1, 100_000),
        heads=heads,
        kv_heads=heads,
        head_dim=source.choice((64, 64, source.randrange(8, 257, 8))),
        branches=tuple(branches),
        queries=source.choice(("dilated", "dilated", "all")),
        order=source.choice(("none", "none", "hilbert")),
        causal=source.random() < 0.2,
    )


def test_nothing_that_is_chosen_exceeds_its_device(tmp_path: Path) -> None:
    """One config of an H100 on an L4 fails at launch, on a GPU that nobody here has."""
    source = random.Random(1107)
    devices = list(device.known().values())
    # Entries on every GPU that take all the shared memory it has.
    greedy = {
        found.name: [
            entry(op, replace(PROBLEM, dtype=dtype), branches=((rows, stride),), shared_bytes=found.shared_bytes)
            for op in ("fwd", "dkdv", "dq")
            for dtype in ("bf16", "fp16")
            for rows in (64, 512, 4096)
            for stride in (2, 10)
        ]
        for found in devices
    }
    committed = database_at(tmp_path, greedy)
    measured = 0
    for found, _ in itertools.product(devices, range(12)):
        asked = drawn(source)
        smaller = replace(found, shared_bytes=found.shared_bytes - source.choice((0, 0, 30_000)))
        for choice in choices(planned(committed, asked, smaller)):
            if choice.rung in ("heuristic", "floor"):
                need = heuristics.shared_bytes(choice.op, asked.head_dim, asked.dtype, choice.config, smaller.arch)
            else:
                need = found.shared_bytes
                measured += 1
            assert need <= smaller.shared_bytes, (smaller.name, asked, choice)
    assert measured > 20


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_runs_on_every_gpu_that_knows_its_dtype(nothing: Database, workload: str) -> None:
    """A workload of the field that quietly falls to the torch backend on somebody's GPU."""
    for found, asked in itertools.product(device.known().values(), WORKLOADS[workload].problems()):
        expected = "torch" if (found.arch, asked.dtype) == ("sm_75", "bf16") else "triton"
        assert planned(nothing, asked, found).backend == expected, (found.name, asked)


# ---- Backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "on", "toolchain", "complaint"),
    [
        ({}, H100, Toolchain(None), "triton is not installed"),
        ({}, None, TOOLCHAIN, "on a CPU"),
        ({}, replace(H100, arch="sm_70"), TOOLCHAIN, "is sm_70; kernels need sm_75"),
        ({}, replace(H100, arch="gfx1100"), TOOLCHAIN, "is gfx1100"),
        ({"dtype": "fp64"}, H100, TOOLCHAIN, "float64 runs on the torch backend"),
        ({"dtype": "bf16"}, device.simulated("t4"), TOOLCHAIN, "no bfloat16: use float16"),
        ({"head_dim": 20}, H100, TOOLCHAIN, "a multiple of 8 from 8 to 256, got 20"),
        ({"head_dim": 264}, H100, TOOLCHAIN, "got 264"),
        ({"positive_scale": False}, H100, TOOLCHAIN, "scale must be positive"),
    ],
)
def test_a_refusal_is_a_sentence(
    nothing: Database, changes: dict[str, object], on: device.Device | None, toolchain: Toolchain, complaint: str
) -> None:
    """A problem that kernels cannot take must reach the torch backend with its reason, and the caller who insists."""
    asked = replace(PROBLEM, **changes)  # type: ignore[arg-type]
    found = plan(asked, on, toolchain=toolchain, committed=nothing)
    assert (found.backend, found.rung) == ("torch", "torch")
    assert any(backend == "triton" and complaint in sentence for backend, sentence in found.refusals)
    assert complaint in found.explain()
    with pytest.raises(UnsupportedError, match="the triton backend refuses: "):
        plan(asked, on, "triton", toolchain=toolchain, committed=nothing)


def test_what_no_backend_takes_is_refused_with_every_reason(nothing: Database) -> None:
    """The last rung would compute something else than was asked for."""
    asked = replace(PROBLEM, dtype="fp64", query_range=(3, 9))
    with pytest.raises(UnsupportedError, match=r"no backend takes this; triton: .*float64.*; torch: it computes"):
        plan(asked, None, toolchain=TOOLCHAIN, committed=nothing)
    for backend in ("torch", "reference"):
        with pytest.raises(UnsupportedError, match=f"the {backend} backend refuses: it "):
            plan(asked, H100, backend, toolchain=TOOLCHAIN, committed=nothing)


@pytest.mark.parametrize("arch", ["sm_75", "sm_121", "gfx90a", "gfx942", "gfx950"])
def test_every_architecture_since_turing_is_taken(nothing: Database, arch: str) -> None:
    """The pattern that keeps old ones out must not keep new ones out."""
    assert planned(nothing, on=replace(H100, arch=arch)).backend == "triton"


def test_without_a_general_text_the_torch_backend_runs(nothing: Database) -> None:
    """An empty generated/ must not end in a failing import at launch."""
    found = planned(nothing, texts=frozenset({"delta"}))
    assert found.backend == "torch"
    assert "python -m codegen" in found.refusals[0][1]


def test_the_interpreter_takes_cpu_tensors(nothing: Database) -> None:
    """`TRITON_INTERPRET=1` on a machine without a GPU is how kernels are debugged."""
    found = plan(PROBLEM, None, toolchain=Toolchain("3.7.1", interpret=True), committed=nothing)
    assert (found.backend, found.device) == ("triton", INTERPRETER)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_who_asks_for_a_backend_gets_it(nothing: Database, backend: str) -> None:
    """A comparison of backends would compare a backend with itself."""
    assert planned(nothing, backend=backend).backend == backend
    with pytest.raises(ArgumentError, match="got 'cuda'"):
        planned(nothing, backend="cuda")


# ---- Pure ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_kept(nothing: Database) -> None:
    """Every call of the function asks for it."""
    assert planned(nothing) is planned(nothing)


def test_the_options_of_a_call_reach_the_plan(nothing: Database) -> None:
    """A context that is read at import, or by another thread, would not."""
    with options(config={"fwd": MINE}) as chosen:
        assert fwd(planned(nothing, options=chosen)).config == MINE
    assert fwd(planned(nothing, options=Options())).config != MINE


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None
import types
package = types.ModuleType("dilated_attention_pytorch")
package.__path__ = [sys.argv[1]]
sys.modules["dilated_attention_pytorch"] = package
from dilated_attention_pytorch import device, workloads
from dilated_attention_pytorch.runtime.plan import plan
toolchain = device.Toolchain("3.6.0")
print(plan(workloads.named("gigapath").problem(), device.simulated("l4"), toolchain=toolchain).explain())
"""


def test_a_plan_needs_neither_torch_nor_triton() -> None:
    """A laptop that asks what an L4 would run has neither; a lookup must not cost an import of torch."""
    package = _layout.tune_db_dir().parent / "src" / "dilated_attention_pytorch"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(package)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "backend  triton" in done.stdout


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_tells_the_whole_story(tmp_path: Path) -> None:
    """'Why this config' is the question users ask of every tuned library."""
    asked = replace(PROBLEM, branches=((512, 2), (2993, 7), (100_000, 1)), order="hilbert", padding="zeros")
    measured = entry(problem=asked, branches=((288, 2),))
    text = planned(database_at(tmp_path, {"h200": [measured]}), asked).explain()
    for expected in (
        "fp16, B 2, N 8765, H 8, D 64, queries dilated, offset cyclic, order hilbert, phantom keys",
        "nvidia-h100-80gb-hbm3 (sm_90, 132 SMs, 232,448 bytes of shared memory a block, L2 50 MiB, 3352 GB/s)",
        "launch 1: branch 2, segment 8765 (of 100000, N is less), dilation 1, 8765 rows, order none (it changes",
        "general_hilbert  64x32_w4_s2  nearest: 100 us (99 to 101, untuned 125) on nvidia-h200 for [rows, stride]",
        "[[288, 2]], grid 512, at distance 0.17, Triton 3.6.0, 2026-11-22, fresh",
        "silicon  no entry for this problem on another device with this chip",
        "`python -m codegen --add 2993:7:hilbert` renders one",
        "its tails are masked: N 8765 is no multiple of segments of 512",
    ):
        assert expected in text
    assert "dkdv" in text
    assert "dkdv" not in planned(database_at(tmp_path, {}), asked).explain(backward=False)
