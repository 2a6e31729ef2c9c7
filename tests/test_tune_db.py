"""Every committed measurement, proven without a GPU: read, found by its own key, fit for its device, compiled again.

Compiling all of it takes a while: ordinary runs draw a few entries, by the digest of the database, and `make prove`
(PROVE=all) takes every one.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dilated_attention_pytorch import cli, database, device, generated
from dilated_attention_pytorch.config import OPS, LaunchConfig, ProblemKey
from dilated_attention_pytorch.database import Database, Entry, Resources
from dilated_attention_pytorch.device import Toolchain
from dilated_attention_pytorch.errors import DatabaseError
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.runtime.variants import text_for
from dilated_attention_pytorch.tuning import ledger
from dilated_attention_pytorch.tuning.ledger import Row
from dilated_attention_pytorch.variant import Variant

from .kernels import ops_of, pattern_case, pattern_config
from .measurements import PROBLEM, entry

PARTS = 8
"""So that a proof of everything is spread over the cores."""
DRAWN = None if os.environ.get("PROVE") == "all" else 1
"""Entries a part; None is all of them."""

compiles = [
    pytest.mark.compile,
    pytest.mark.toolchain,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def part_of(rows: list[Row], part: int, seed: str) -> list[Row]:
    """The entries of one part, in an order that nobody chose."""
    mixed = random.Random(seed).sample(rows, len(rows))
    return mixed[part::PARTS][:DRAWN]


def test_every_committed_entry_is_read_reachable_and_fit() -> None:
    """An entry that no call ever finds, or that its own GPU cannot launch, is tuning that helps nobody."""
    committed = database.load()
    assert ledger.unread(committed) == []
    assert ledger.faults(ledger.rows(committed), committed) == []


@pytest.mark.parametrize("part", [pytest.param(part, marks=compiles) for part in range(PARTS)])
def test_a_committed_entry_compiles_to_what_it_claims(part: int) -> None:
    """Written by hand, or measured on a kernel that this compiler turns into another one."""
    committed, toolchain = database.load(), Toolchain.current()
    rows = [row for row in ledger.rows(committed, toolchain) if row.status != database.KERNEL_STALE]
    drawn = part_of(rows, part, committed.digest())
    wrong = {row.title: ledger.recompilation(row, committed.kernels, toolchain) for row in drawn}
    assert {name: complaint for name, complaint in wrong.items() if complaint} == {}


def test_the_parts_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that leaves out what is last."""
    rows = [Row(Path("a"), entry(median=float(median)), database.FRESH) for median in range(100, 137)]
    monkeypatch.setattr(f"{__name__}.DRAWN", None)
    parts = [row for part in range(PARTS) for row in part_of(rows, part, "seed")]
    assert sorted(parts, key=lambda row: row.entry.time_us.median) == rows
    monkeypatch.setattr(f"{__name__}.DRAWN", 1)
    assert part_of(rows, 0, "seed") != part_of(rows, 0, "another")


# ---- The proofs themselves -------------------------------------------------------------------------------------------


def hand_made(root: Path, gpu: str, *entries: Entry) -> list[Row]:
    """A database of entries of the general text, as it is rendered now."""
    (digest,) = [digest for digest, names in database.rendered_kernels().items() if "general" in names]
    current = [replace(each, provenance=replace(each.provenance, kernel=digest)) for each in entries]
    database.save(device.simulated(gpu), current, root)
    return ledger.rows(Database(root))


def claiming(row: Row, shared_bytes: int, triton: str | None) -> Row:
    measured = row.entry
    return replace(
        row,
        entry=replace(
            measured,
            resources=Resources(shared_bytes, registers=128, spills=0),
            provenance=replace(measured.provenance, triton=str(triton)),
        ),
    )


@pytest.mark.parametrize("gpu", [pytest.param(gpu, marks=compiles) for gpu in ("h100", "mi300x")])
def test_a_wrong_claim_is_seen(tmp_path: Path, gpu: str) -> None:
    """A comparison that compares nothing passes on every database."""
    (row,) = hand_made(tmp_path, gpu, entry("dq"))
    kernels, toolchain = database.rendered_kernels(), Toolchain.current()
    takes = ledger.recompiled(row, kernels).shared_bytes
    assert takes > 0
    assert ledger.recompilation(claiming(row, takes, toolchain.triton), kernels, toolchain) is None
    complaint = ledger.recompilation(claiming(row, takes + 16, toolchain.triton), kernels, toolchain)
    assert complaint == f"takes {takes:,} bytes of shared memory, and claims {takes + 16:,}; tune it again"
    # Another compiler may allocate otherwise, as long as it fits.
    assert ledger.recompilation(claiming(row, takes + 16, "3.5.0"), kernels, toolchain) is None


@pytest.mark.parametrize("gpu", [pytest.param("l4", marks=compiles)])
def test_check_compiles_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path, gpu: str) -> None:
    """CI asks the command, and reads its exit code."""
    measured = claiming(Row(tmp_path, entry(), ""), 40_000, Toolchain.current().triton).entry
    hand_made(tmp_path, gpu, measured)
    assert cli.main(["db", "check", "--db", str(tmp_path)]) == 0
    assert cli.main(["db", "check", "--db", str(tmp_path), "--compile"]) == 1
    assert "bytes of shared memory, and claims 40,000; tune it again" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [pytest.param("l4", marks=compiles)])
def test_what_another_compiler_makes_too_large_is_seen(tmp_path: Path, gpu: str) -> None:
    """It would be found by whoever upgrades, at the first launch."""
    large = entry(problem=replace(PROBLEM, head_dim=128), config=LaunchConfig(128, 128, num_warps=8, num_stages=3))
    (row,) = hand_made(tmp_path, gpu, large)
    complaint = ledger.recompilation(claiming(row, 100_000, "3.5.0"), database.rendered_kernels(), Toolchain.current())
    assert complaint is not None
    assert "bytes of shared memory with Triton" in complaint and "of 101,376" in complaint


def test_an_entry_of_no_kernel_cannot_be_compiled(tmp_path: Path) -> None:
    """It must not be compiled from another text, and found right."""
    (row,) = hand_made(tmp_path, "h100", entry())
    with pytest.raises(DatabaseError, match=r"no kernel has the text .*; tune it again"):
        ledger.recompiled(row, {})


@pytest.mark.parametrize("name", sorted(generated.names() - {"delta"}))
def test_the_call_that_is_proven_runs_the_text_that_was_measured(name: str) -> None:
    """Another text of the same tiles takes other shared memory: the proof would be of something else."""
    variant = Variant.from_name(name)
    case = pattern_case(variant, heads=4, dtype="bf16")
    measured = case.problem if variant.order != "snake" else replace(case.problem, order="snake", row_width=37)
    for op in ops_of(variant):
        tiles = (pattern_config(variant) or dict.fromkeys(OPS, LaunchConfig(16, 16)))[op]
        branches = tuple(range(len(measured.branches)))
        key = replace(ProblemKey.of(measured, op, *branches), order=variant.order)
        problem = ledger.asking(key, variant)
        assert problem is not None
        assert text_for(problem, branches, op, tiles, generated.names()) == variant


def gradients(root: Path, tiles: LaunchConfig, text: str, apart: float) -> list[Row]:
    """A database of a backward by one launch and by two."""
    asked = replace(PROBLEM, length=8192, branches=((128, 2),))
    digests = {name: digest for digest, names in database.rendered_kernels().items() for name in names}
    joint = entry("bwd", asked, config=tiles, apart=apart, kernel=digests[text], shared_bytes=100_000)
    apart_tiles = LaunchConfig(16, 32)
    alone = [entry(op, asked, config=apart_tiles, kernel=digests["general_even"]) for op in ("dkdv", "dq")]
    database.save(device.simulated("h100"), [joint, *alone], root)
    return ledger.rows(Database(root), Toolchain("3.6.0"))


HOLDING = LaunchConfig(32, 64, num_stages=3, loads="descriptor")


@pytest.mark.parametrize("apart", [80.0, 125.0])
@pytest.mark.parametrize(("tiles", "text"), [(LaunchConfig(64, 64), "general_one_even"), (HOLDING, "general_even")])
def test_entries_of_one_launch_and_of_two_are_reachable(
    tmp_path: Path, tiles: LaunchConfig, text: str, apart: float
) -> None:
    """A database that CI refuses because calls launch what is faster, and pass over what that was compared with."""
    measured = gradients(tmp_path, tiles, text, apart)
    assert [row.entry.key.op for row in measured] == ["bwd", "dkdv", "dq"]
    assert ledger.faults(measured, Database(tmp_path)) == []


@pytest.mark.parametrize(
    ("tiles", "text"),
    [
        pytest.param(LaunchConfig(64, 64, num_stages=1), "general_one_even", marks=compiles),
        pytest.param(HOLDING, "general_even", marks=compiles),
    ],
)
def test_an_entry_for_all_gradients_is_compiled_as_it_runs(tmp_path: Path, tiles: LaunchConfig, text: str) -> None:
    """dK and dV alone compiled in the name of all gradients."""
    joint, *_ = gradients(tmp_path, tiles, text, 125.0)
    assert 0 < ledger.recompiled(joint, database.rendered_kernels()).shared_bytes <= 100_000


def test_what_is_proven_is_what_a_call_takes(tmp_path: Path) -> None:
    """A proof that asks the database, and not the plan, passes where the plan never looks."""
    rows = hand_made(tmp_path, "h100", entry(), entry("dkdv"), entry("dq"))
    committed = Database(tmp_path)
    assert ledger.faults(rows, committed) == []
    found = plan(PROBLEM, device.simulated("h100"), toolchain=Toolchain("3.6.0"), committed=committed)
    assert [choice.rung for choice in found.launches] == ["exact"] * 3
    for row in rows:
        problem = ledger.asking(row.entry.key, Variant.from_name("general"))
        assert problem is not None
        assert (
            plan(problem, device.simulated("h100"), toolchain=Toolchain("3.6.0"), committed=committed).rung == "exact"
        )


def test_an_entry_that_its_own_key_passes_over_is_seen(tmp_path: Path) -> None:
    """Tiles that no call of this key can run: every lookup reads the entry, and launches something else."""
    masked = replace(PROBLEM, length=8192, mask=True)
    ring = LaunchConfig(64, 64, num_warps=4, num_stages=2, loads="ring")
    (row,) = hand_made(tmp_path, "h100", entry(problem=masked, config=ring))
    (fault,) = ledger.faults([row], Database(tmp_path))
    assert fault.where == row.title
    assert re.fullmatch(
        r"its own key leads to \S+ from rung '(heuristic|nearest)': 64x64_w4_s2_ring on \S+: a ring of tiles knows no "
        r"mask or dropout, .*; tune it again",
        fault.problem,
    )


def test_an_entry_that_another_stands_for_is_seen(tmp_path: Path) -> None:
    """A file that was read before it was written again: what is told of it holds for other tiles."""
    (row,) = hand_made(tmp_path, "h100", entry())
    stale = replace(row, entry=replace(row.entry, config=LaunchConfig(32, 64)))
    told = "its own key leads to 64x32_w4_s2 from rung 'exact': ; tune it again"
    assert [fault.problem for fault in ledger.faults([row, stale], Database(tmp_path))] == [told]


def test_an_entry_is_reachable_through_itself_alone(tmp_path: Path) -> None:
    """The untuned default takes the very tiles of an entry that no lookup finds: no proof that somebody finds it."""
    (row,) = hand_made(tmp_path / "its own", "l4", entry())
    (other,) = hand_made(tmp_path / "without it", "l4", entry("dq"))
    problem = ledger.asking(row.entry.key, Variant.from_name("general"))
    assert problem is not None
    without = Database(tmp_path / "without it")
    untuned = plan(problem, device.simulated("l4"), toolchain=Toolchain("3.6.0"), committed=without).fwd[0]
    assert untuned.rung == "heuristic"
    same = replace(row, entry=replace(row.entry, config=untuned.config))
    (fault,) = ledger.faults([same], without)
    assert fault.problem.startswith(f"its own key leads to {untuned.config.name} from rung 'heuristic': ")
    assert ledger.faults([other], without) == []
