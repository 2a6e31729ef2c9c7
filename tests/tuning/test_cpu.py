"""The whole loop on a CPU, with real timings: the torch backend's own choices are tuned, kept, and used afterwards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import database, device, reference
from dilated_attention_pytorch.call_config import OPS, CallConfig
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.errors import ConfigError, DatabaseError
from dilated_attention_pytorch.runtime.torch_calls import Budget
from dilated_attention_pytorch.tuning import machine, measure, space
from dilated_attention_pytorch.tuning.journal import Journal
from dilated_attention_pytorch.tuning.problems import Task, of_calls
from dilated_attention_pytorch.tuning.routes import Route
from dilated_attention_pytorch.tuning.tune import Settings, tune

PROBLEM = Problem("fp32", batch=1, length=110, heads=4, kv_heads=4, head_dim=8, branches=((50, 3),))


def patient(
    where: str, measured: device.Device, routes: Mapping[str, Route]
) -> Callable[[measure.Job], measure.Answer]:
    """A measuring process to which no spread is too wide: what else runs on this machine is not the tuner's fault."""
    measure.SPREAD = math.inf
    return measure.bench(where, measured, routes)


class Tuned(NamedTuple):
    """A finished run."""

    tasks: list[Task]
    journal: Journal
    root: Path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder, cpu = tmp_path_factory.mktemp("tuned"), device.cpu()
    tasks = of_calls([("test", PROBLEM)], cpu)
    settings = Settings(
        journal=folder / "run.jsonl",
        root=folder / "db",
        gpus=("cpu",),
        limit=3,
        race_us=2e3,
        finals_us=5e3,
        measurer=patient,
        compiler=None,
    )
    return Tuned(tasks, tune(tasks, cpu, machine.run_row(cpu, "test"), settings), folder / "db")


def test_every_stage_is_gone_through(tuned: Tuned) -> None:
    """A stage that a CPU skips, a candidate that is timed and was not checked, or a rival in the place of ours."""
    stages = Counter((row.key.op, row.stage) for row in tuned.journal.measurements)
    for op in OPS:
        assert [stages[op, stage] for stage in ("screen", "race")] == [3, 3]
        assert stages[op, "check"] >= 4 and stages[op, "finals"]  # whoever wins is checked on ragged sizes too
    assert {(row.route, row.status) for row in tuned.journal.measurements} == {("torch", "ok")}
    assert all(row.error is not None for row in tuned.journal.measurements if row.stage == "check")
    assert tuned.journal.ends[-1].finished


def test_the_pick_is_used_afterwards(tuned: Tuned) -> None:
    """What was measured is kept where no call looks, or is laid aside as measured on something else."""
    picks = {(pick.key.op, 0): CallConfig(**pick.config) for pick in tuned.journal.picks}  # type: ignore[arg-type]
    q, k, v = torch.randn(3, 1, PROBLEM.length, 4, 8)
    with dap.options(database=tuned.root):
        plan = dap.explain(q, k, v, 50, 3)
        out = dap.dilated_attention(q, k, v, 50, 3)
    assert {(choice.op, choice.branch): choice.config for choice in plan.calls} == picks
    assert len(picks) == 2 and all(config.name in str(plan) for config in picks.values())
    assert dap.explain(q, k, v, 50, 3).calls == ()
    torch.testing.assert_close(out, reference.dilated_attention(q, k, v, [50], [3])[0].float())


def kept(tuned: Tuned, root: Path, config: CallConfig) -> Path:
    """A database with another configuration for the same problems."""
    path = tuned.root / device.CPU / device.cpu().name
    entries = [replace(entry, config=config) for op in OPS for entry in database.read(path / f"{op}.yaml").values()]
    database.save(device.cpu(), entries, root)
    return root


def test_a_measured_configuration_cuts_the_calls(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` tells of a configuration that the backend does not ask for."""
    odd, asked = CallConfig("pack", pairs=3, share=5), []
    budget = Budget.of
    monkeypatch.setattr(Budget, "of", lambda config, *args, **kw: asked.append(config) or budget(config, *args, **kw))
    q, k, v = (torch.randn(1, PROBLEM.length, 4, 8, requires_grad=True) for _ in range(3))
    with dap.options(database=kept(tuned, tmp_path, odd)):
        dap.dilated_attention(q, k, v, 50, 3).sum().backward()
    assert asked == [odd, odd]
    dap.dilated_attention(q, k, v, 50, 3)
    assert asked[2] == CallConfig.untuned("fwd", PROBLEM, 0) != odd


def test_what_was_measured_on_another_backend_text_is_laid_aside(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration outlives the code that it was measured on."""
    root = kept(tuned, tmp_path, CallConfig("pack", share=16))
    monkeypatch.setattr(database, "rendered_kernels", lambda: {"0123456789ab": (database.TORCH,)})
    database.load.cache_clear()
    with dap.options(database=root):
        assert dap.explain(*torch.randn(3, 1, PROBLEM.length, 4, 8), 50, 3).calls == ()
    database.load.cache_clear()


def test_calls_and_launches_do_not_mix(tuned: Tuned, tmp_path: Path) -> None:
    """A GPU's lookup comes upon a configuration that no kernel takes."""
    source = tuned.root / device.CPU / device.cpu().name / "fwd.yaml"
    path = tmp_path / "sm_90" / device.cpu().name / "fwd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(source.read_text())
    with pytest.raises(DatabaseError, match=r"fwd.yaml:\d+: .*calls of the torch backend lie under cpu"):
        database.read(path)


def test_candidates_cut_differently_and_the_default_leads() -> None:
    """Time spent on two names of the same calls, or nothing to choose from."""
    cpu = device.cpu()
    whole, sparse = (
        of_calls([("test", replace(PROBLEM, length=400, branches=(branch,)))], cpu) for branch in ((50, 1), (80, 3))
    )
    assert [task.op for task in sparse] == sorted(OPS)
    assert [len(space.space(task, cpu)) for task in whole] == [1, 1]
    for task in sparse:
        found = space.space(task, cpu)
        assert found[0] == space.Candidate.of(CallConfig.untuned(task.op, task.problem, 0))
        assert len({space._cut(task, candidate.call_config) for candidate in found}) == len(found) >= 4


@pytest.mark.parametrize("values", [("copy", 1, 4), ("view", 0, 4), ("view", 1, 2.0)])
def test_a_configuration_refuses_nonsense(values: tuple[str, int, int]) -> None:
    """A typo in a file of measurements that would be taken for a choice."""
    with pytest.raises(ConfigError, match=r"rows must|must be an integer"):
        CallConfig(*values)
