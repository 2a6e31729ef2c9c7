"""`options(miss_log=...)`: what ran without a measurement becomes the next list to tune."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import device
from dilated_attention_pytorch.device import Toolchain
from dilated_attention_pytorch.errors import ArgumentError, ArgumentTypeError
from dilated_attention_pytorch.runtime import misses
from dilated_attention_pytorch.runtime.plan import plan

from ..measurements import PROBLEM, TOOLCHAIN, database_at, entry

H100 = device.simulated("h100")


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> None:
    forget()


def forget() -> None:
    """As a process that has just started."""
    misses._append.cache_clear()
    misses._known.cache_clear()


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(length: int, **words: object) -> None:
    q = torch.zeros(1, length, 4, 16, dtype=torch.float16)
    dap.explain(q, q, q, [64, 256], [1, 2], **words)  # type: ignore[arg-type]


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are planned as on an H100 that has no measurements, with a Triton that measured none."""
    monkeypatch.setattr(device, "current", lambda where=None: H100)
    monkeypatch.setattr(Toolchain, "current", classmethod(lambda cls: TOOLCHAIN))


@pytest.mark.usefixtures("on_h100")
def test_a_miss_is_written_once(tmp_path: Path) -> None:
    """A line a call fills the disk; a line a length is a list of one problem."""
    log = tmp_path / "misses.jsonl"
    with dap.options(miss_log=log):
        for length in (1000, 1000, 1003, 2048):
            call(length)
        call(1000, is_causal=True)
    call(4096)
    assert [(line["length"], line["causal"]) for line in lines(log)] == [(1000, False), (2048, False), (1000, True)]
    found = misses.read(log)
    assert [(problem.length, problem.branches) for problem in found][:2] == [
        (1000, ((64, 1), (256, 2))),
        (2048, ((64, 1), (256, 2))),
    ]
    assert found[0].head_dim == 16 and found[2].causal


def test_a_pass_that_was_passed_over_by_a_guess_is_a_miss(tmp_path: Path) -> None:
    """Branches that are measured one by one, and go so after a measurement of another problem, for good."""
    asked = replace(PROBLEM, length=32768, branches=((2048, 1), (4096, 2), (8192, 4)))
    chain = entry("fwd", asked, branch=(0, 1, 2), apart=90.0)
    near = replace(chain, key=replace(chain.key, grid=chain.key.grid // 2))
    for number, joint in enumerate((chain, near)):
        measured = [joint, *(entry("fwd", asked, branch=branch) for branch in (0, 1, 2))]
        committed = database_at(tmp_path / str(number), {"h100": measured})
        planned = plan(asked, H100, toolchain=TOOLCHAIN, committed=committed)
        assert [choice.branches for choice in planned.fwd] == [(0,), (1,), (2,)]
        misses.note(tmp_path / f"{number}.jsonl", planned, backward=False)
    assert [(tmp_path / f"{number}.jsonl").exists() for number in (0, 1)] == [False, True]


@pytest.mark.usefixtures("on_h100")
def test_another_process_goes_on_where_one_ended(tmp_path: Path) -> None:
    """Every restart of a job, and every rank, would write its own copy of the list."""
    log = tmp_path / "misses.jsonl"
    with dap.options(miss_log=log):
        call(1000)
        forget()
        call(1000)
        call(2048)
    assert [line["length"] for line in lines(log)] == [1000, 2048]


def test_what_was_measured_is_no_miss(tmp_path: Path) -> None:
    """The next list to tune would hold what was tuned."""
    log = tmp_path / "misses.jsonl"
    committed = database_at(tmp_path / "db", {"h100": [entry()]})
    found = plan(PROBLEM, H100, toolchain=TOOLCHAIN, committed=committed)
    misses.note(log, found, backward=False)
    assert not log.exists()
    misses.note(log, found, backward=True)
    assert misses.read(log) == [PROBLEM]
    misses.note(log, plan(replace(PROBLEM, head_dim=24), None), backward=True)
    assert misses.read(log) == [PROBLEM], "a CPU has no launches to tune"


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that meets every length would write for ever."""
    monkeypatch.setattr(misses, "LIMIT", 5)
    log = tmp_path / "misses.jsonl"
    committed = database_at(tmp_path / "db", {})
    for head_dim in range(8, 88, 8):
        problem = replace(PROBLEM, head_dim=head_dim)
        misses.note(log, plan(problem, H100, toolchain=TOOLCHAIN, committed=committed), backward=False)
    assert [problem.head_dim for problem in misses.read(log)] == [8, 16, 24, 32, 40]


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    """Half of one line in another is a list that `tune` refuses."""
    log = tmp_path / "misses.jsonl"
    committed = database_at(tmp_path / "db", {})
    plans = [
        plan(replace(PROBLEM, head_dim=8 * d), H100, toolchain=TOOLCHAIN, committed=committed) for d in range(1, 33)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda found: misses.note(log, found, backward=True), plans * 3))
    assert {problem.head_dim for problem in misses.read(log)} == set(range(8, 264, 8))
    assert len(lines(log)) == 32


def test_a_log_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    """A full disk must cost the list, and not the run."""
    gone = tmp_path / "gone" / "misses.jsonl"
    found = plan(PROBLEM, H100, toolchain=TOOLCHAIN, committed=database_at(tmp_path / "db", {}))
    with pytest.warns(UserWarning, match="cannot be written to: No such file or directory; misses are lost"):
        misses.note(gone, found, backward=True)
    with pytest.warns(UserWarning, match="cannot be written to: Is a directory; misses are lost"):
        misses.note(tmp_path, found, backward=True)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"branches": [[1]]}',
        '{"dtype": "half"}',
        misses.line(PROBLEM).replace("batch", "bunch"),
        "\xff",
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str) -> None:
    """A list that was edited by hand: a traceback without a line number."""
    log = tmp_path / "misses.jsonl"
    log.write_text(misses.line(PROBLEM) + text + "\n", encoding="latin-1")
    with pytest.raises(ArgumentError, match=r"misses\.jsonl:2: this is no problem"):
        misses.read(log)


def test_a_line_holds_the_whole_problem(tmp_path: Path) -> None:
    """A field that is lost on the way is another problem that is tuned."""
    rich = replace(PROBLEM, order="snake", row_width=37, prefix=5, mask=True, dropout=True, padding="zeros", kv_heads=2)
    log = tmp_path / "misses.jsonl"
    log.write_text(misses.line(rich) + misses.line(replace(rich, query_range=(3, 70), head_dim=8)))
    assert misses.read(log) == [rich, replace(rich, query_range=(3, 70), head_dim=8)]


def test_the_option_is_checked(tmp_path: Path) -> None:
    """A typing error in the path would be found when the run is over."""
    with (
        pytest.raises(ArgumentError, match=r"miss_log '.*nowhere/log' is no file in a folder that exists"),
        dap.options(miss_log=tmp_path / "nowhere" / "log"),
    ):
        pass
    with pytest.raises(ArgumentTypeError, match="miss_log must be a path, got 3"), dap.options(miss_log=3):  # type: ignore[arg-type]
        pass
    with dap.options(miss_log=tmp_path / "log") as outer, dap.options(on_miss="error") as inner:
        assert outer.miss_log == inner.miss_log == (tmp_path / "log").resolve()
