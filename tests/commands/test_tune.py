"""`dilated-attention tune` and `screen`: what they say before anything is measured."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import _layout, cli, device
from dilated_attention_pytorch.config import EVERY_OP, OPS
from dilated_attention_pytorch.errors import ArgumentError
from dilated_attention_pytorch.tuning import problems, screening
from dilated_attention_pytorch.tuning.tune import Settings
from dilated_attention_pytorch.workloads import named


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as it is asked."""
    monkeypatch.setattr(device, "current", lambda where=None: device.simulated("h100"))


def test_without_a_gpu_the_torch_backend_is_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback from the first launch; or a processor's measurements in the database that is committed."""
    assert cli.main(["tune", "--workload", "readme", "--dry-run", "--json", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == device.cpu().name
    assert found["database"] == str(_layout.user_db_dir())
    assert len(found["problems"]) == 12  # three branches, forward and backward, causal or not
    assert {candidate.split()[0] for problem in found["problems"] for candidate in problem["candidates"]} == {"torch"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "1"], "`dilated-attention screen --arch sm_90`"),
        (["--preset", "quick"], "would take hours on a CPU"),
    ],
)
def test_without_a_gpu_it_says_what_can_be_done(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that nobody would wait for, or a refusal without a way out."""
    assert cli.main(["tune", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("on_an_h100")
def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A look that tunes, or that leaves half of it out."""
    given = ["tune", "--preset", "quick", "--dry-run", "--json", "--db", str(tmp_path), "--runs", str(tmp_path)]
    assert cli.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "nvidia-h100-80gb-hbm3"
    # Of longnet a chain, its three branches and two others, causal or not, and the core's three: each by every kernel;
    # all gradients at once of the core.
    assert len(found["problems"]) == (2 * 6 + 3) * len(OPS) + 3
    assert sum(problem["weight"] for problem in found["problems"]) == pytest.approx(1.0)
    assert {len(problem["candidates"]) for problem in found["problems"]} <= {*range(13)}
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(
    "command", [["tune", "--dry-run"], ["screen", "--gpu", "h100"], ["db", "coverage", "--gpu", "h100"]]
)
def test_workloads_are_named_together_or_one_by_one(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--workload a b` of which b is a stray argument, or `--workload a --workload b` that forgets a."""
    monkeypatch.setattr(screening, "Pool", _nothing_compiles)
    told = []
    for names in (["core", "readme"], ["core", "--workload", "readme"], ["core", "readme", "--workload", "core"]):
        assert cli.main([*command, "--workload", *names, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] == told[2]
    assert cli.main([*command, "--workload", "core", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) != told[0]


def _nothing_compiles(device: object, processes: object) -> Any:
    waiting: list[Any] = []

    def answers() -> list[Any]:
        found = [(label, screening.Compiled("compile")) for label in waiting]
        waiting.clear()
        return found

    return SimpleNamespace(
        submit=lambda label, job: waiting.append(label), answers=answers, workers=(), stop=lambda: None
    )


@pytest.mark.usefixtures("on_an_h100")
def test_the_standard_preset_takes_ten_minutes_at_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grid that nobody waits for, or that goes before the models; limits that hold for all runs or for none."""
    monkeypatch.setattr(screening, "cores", lambda: 16)

    def dry(*given: str) -> dict[str, Any]:
        assert cli.main(["tune", *given, "--dry-run", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    standard = dry()
    most = problems.PRESETS["standard"].candidates
    assert len(standard["problems"]) <= problems.MOST_ENTRIES
    assert max(len(problem["candidates"]) for problem in standard["problems"]) == most
    assert standard["seconds"] <= 600
    of_grid = [problem["problem"].startswith("grid ") for problem in standard["problems"]]
    assert of_grid == sorted(of_grid) and {*of_grid} == {True, False}
    assert max(len(problem["candidates"]) for problem in dry("--candidates", "2")["problems"]) == 2
    assert min(len(problem["candidates"]) for problem in dry("--workload", "longnet")["problems"]) > most


@pytest.mark.usefixtures("on_an_h100")
def test_misses_are_a_list_of_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of what ran unmeasured that nobody can tune from."""
    misses = tmp_path / "misses.jsonl"
    misses.write_text(json.dumps(asdict(named("gigapath").problem())) + "\n", encoding="utf-8")
    assert cli.main(["tune", "--from-misses", str(misses), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 5 * len(OPS)  # of five branches


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--workload", "lognet"], "'lognet' is no workload"),
        (["--gpus", "first"], "--gpus must be all, cpu or indices"),
        (["--workload", "longnet", "--dtype", "fp32"], "there is nothing to tune"),
        (["--resume", "--runs", "."], "--resume found no run"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or a run of something else."""
    assert cli.main(["tune", *given]) == 2
    assert said in capsys.readouterr().err


def test_gpus_that_differ_are_tuned_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What an L4 measures is recorded as an H100's, and compared with what one measured."""
    gpus = [device.simulated(name) for name in ("h100", "l4", "h100")]
    monkeypatch.setattr(device, "current", lambda where=None: gpus[where or 0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = ["tune", "--preset", "quick", "--dry-run"]
    assert cli.main([*given, "--gpus", "all"]) == 2
    said = capsys.readouterr().err
    assert "0, 2: nvidia-h100-80gb-hbm3 (sm_90" in said and "1: nvidia-l4 (sm_89" in said
    assert "tune each in a run of its own: --gpus 0,2 and --gpus 1\n" in said
    assert cli.main([*given, "--gpus", "0,2"]) == 0
    assert "and 2 GPUs" in capsys.readouterr().out


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(("given", "resumed"), [([], ""), (["--shard", "2/4"], "-2of4"), (["--shard", "0/2"], None)])
def test_resume_takes_its_own_run(
    given: list[str],
    resumed: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run of all problems goes on in the journal of a shard, whose name begins as its own and sorts behind it."""

    def stop(tasks: object, device: object, run: object, settings: Settings, **rest: object) -> None:
        raise ArgumentError(f"journal {settings.journal.name}.")

    monkeypatch.setattr("dilated_attention_pytorch.tuning.tune.tune", stop)
    name = "nvidia-h100-80gb-hbm3"
    for part, second in itertools.product(("", "-2of4", "-20of40"), (1, 2)):
        (tmp_path / f"{name}{part}-20261122T14200{second}000000Z.jsonl").touch()
    for other in (f"{name}-20261122T142003000000Z-of-mine.jsonl", f"{name}-mig-20261122T142003000000Z.jsonl"):
        (tmp_path / other).touch()
    assert cli.main(["tune", "--resume", "--runs", str(tmp_path), "--preset", "quick", *given]) == 2
    said = "found no run" if resumed is None else f"journal {name}{resumed}-20261122T142002000000Z.jsonl."
    assert said in capsys.readouterr().err


@pytest.mark.compile
def test_screening_ranks_what_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list in which a candidate that spills or is too large stands before one that fits, or that tune cannot read."""
    output = tmp_path / "ranked.json"
    given = ["--workload", "core", "--dtype", "fp16", "--candidates", "2", "--output", str(output)]
    assert cli.main(["screen", "--arch", "sm_120", *given]) == 2  # the core has no fp16
    assert "there is nothing to tune" in capsys.readouterr().err
    misses = tmp_path / "misses.jsonl"
    core = replace(named("core").problem(dtype="bf16"), branches=((64, 1),))
    misses.write_text(json.dumps(asdict(core)) + "\n", encoding="utf-8")
    given[:4] = ["--from-misses", str(misses)]
    assert cli.main(["screen", "--arch", "sm_120", *given, "--processes", "2"]) == 0
    ranked = json.loads(output.read_text(encoding="utf-8"))
    # By each kernel, and by one launch for all gradients.
    assert ranked["arch"] == "sm_120" and len(ranked["problems"]) == len(EVERY_OP)
    for problem in ranked["problems"]:
        spills = [row["resources"]["spills"] for row in problem["candidates"]]
        assert spills == sorted(spills) and len(spills) + len(problem["failed"]) >= 2
        assert all(row["resources"]["shared_bytes"] <= device.SHARED_BYTES["sm_120"] for row in problem["candidates"])
