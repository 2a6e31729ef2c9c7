"""docs/performance.md: drawn from result files alone, told when it is not; goals held against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import __main__ as command
from benchmarks import figures, goals, report, results
from benchmarks.cases import selected
from benchmarks.contenders import COMPILED_CUDNN, CUDNN, DENSE, OURS, TORCHSCALE, UNORDERED

CEILINGS = {"matmul_tflops": 790.0, "copy_tb_s": 3.02}
SLOWER = {CUDNN: 1.2, COMPILED_CUDNN: 1.7, TORCHSCALE: 4.0, UNORDERED: 0.9, DENSE: 9.0}
"""So many times our time."""


def times(limit: float, factor: float) -> list[float]:
    """Ours reaches two thirds of the limit."""
    return [round(1.5 * factor * limit * share, 6) for share in (1.0, 0.99, 1.01)]


def document() -> results.Document:
    """As a run writes it, of a case of each kind."""
    names = ("kernel-n128-d64-r1", "kernel-n2048-d64-r4", "kernel-n2048-d64-r1-hilbert", "op-longnet")
    names += ("scale-wide-65536", "scale-wide-131072", "latency-longnet-compiled")
    cases = {}
    for case in (case for name in names for case in selected(pattern=name)):
        problem = case.problem
        peers = {"kernels": [CUDNN], "operations": [COMPILED_CUDNN, TORCHSCALE], "latency": [COMPILED_CUDNN]}
        limits = results.limits_ms(problem, 790.0, 3.02)
        tensor = 2 * problem.batch * problem.length * problem.heads * problem.head_dim
        rows: dict[str, dict[str, object]] = {}
        for who in [OURS, *peers.get(case.level, [DENSE]), *([UNORDERED] if case.order else [])]:
            factor = SLOWER.get(who, 1.0)
            if case.level == "latency":
                state = {"forward_ms": 900.0, "both_ms": 1800.0, "second_both_ms": 4.0}
                rows[who] = {"cold": state, "warm": state}
                continue
            second = "backward" if case.level == "kernels" else "both"
            rows[who] = {f"{what}_ms": times(limits[what], factor) for what in ("forward", second)}
            if case.level != "kernels":
                rows[who]["peak_bytes"] = {"forward": tensor, "both": int((4 + 0.25 * factor**4) * tensor)}
            if case.level == "operations":
                rows[who]["host_us"] = {"forward": 19.0, "autograd forward": 14.0, "backward": 41.0}
        rows["FlexAttention"] = {"failed": "NotImplementedError: a | b"}
        cases[case.name] = {"run": 0, **results.record(case, rows, CEILINGS, 1.0)}
    environment = {"commit": "0123abc", "torch": "2.11.0", "triton": "3.6.0", "cpu": "a", "gpu": "NVIDIA H100"}
    ran = {
        "commands": ["python -m benchmarks --tier 1"],
        "environment": environment,
        "settings": {"rounds": 21},
        "zero_rows": results.ZERO_ROWS,
        "ceilings": CEILINGS,
        "left_out": ["op-wide"],
    }
    return {"what": "", "runs": [ran], "cases": cases, "spoiled": {}}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page to write to."""
    copied = tmp_path / "performance.md"
    copied.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return copied


def draw(page: Path, found: results.Document) -> list[Path]:
    """Write what is stale."""
    wanted = report.files({"bench_h100.json": found}, page, page.with_name("README.md"))
    old = [path for path, text in wanted.items() if report.is_stale(path, text)]
    for path in old:
        path.parent.mkdir(exist_ok=True)
        text = wanted[path]
        path.write_text(text if isinstance(text, str) else text.svg(), encoding="utf-8")
    return old


def test_the_committed_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of a result file that is no longer the one in the repository."""
    assert command.main(["report", "--check"]) == 0, capsys.readouterr().out


def test_a_page_is_drawn_once(page: Path) -> None:
    """A date or a random name in a figure: every run would be a change to commit. Or a change that passes unseen."""
    found = document()
    assert [path.suffix for path in draw(page, found)] == [".md", ".svg", ".svg", ".svg"]
    text = page.read_text(encoding="utf-8")
    assert draw(page, json.loads(json.dumps(found))) == []
    assert page.read_text(encoding="utf-8") == text
    assert text.startswith(report.PAGE.read_text(encoding="utf-8").partition(report.BEGIN)[0])
    assert report.NOTHING not in text
    for picture in figures.pictures(found):
        path = page.parent / "figures" / f"bench_h100_{picture.name}.svg"
        assert f"figures/{path.name}" in text
        assert ElementTree.fromstring(path.read_text(encoding="utf-8")) is not None
        assert picture.name != "operations" or path.read_text(encoding="utf-8") == picture.svg()
    found["cases"]["op-longnet"]["rows"][OURS]["both_ms"] = [9.0, 8.9, 9.1]
    assert [path.name for path in draw(page, found)] == ["performance.md", "bench_h100_operations.svg"]


def test_tables_say_what_was_measured(page: Path) -> None:
    """A ratio upside down, a best peer that is ours, a failure that vanishes or breaks its table."""
    text = report.files({"bench_h100.json": document()}, page, page.with_name("README.md"))[page]
    assert isinstance(text, str)
    lines = text.splitlines()
    (both,) = (line for line in lines if line.startswith("| `op-longnet` forward + backward"))
    cells = [cell.strip() for cell in both.strip("|").split("|")]
    assert cells[2].endswith("(cuDNN, gathered, compiled)")
    assert cells[3:6] == ["1.7", "4", "67%"]
    ours, peers = (float(number) for number in cells[6].split(" of "))
    assert peers == pytest.approx(1.7**4 * ours, rel=0.05)
    (kernel,) = (line for line in lines if line.startswith("| `n128-d64-r1` |"))
    assert "(cuDNN) | 1.2 | 67%" in kernel
    assert any("NotImplementedError: a \\| b" in line and "6 more" in line for line in lines)
    assert any(line.startswith("| wide, 131072 |") for line in lines)
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_the_readme_says_what_tuning_is_worth(page: Path) -> None:
    """A mean of ratios where their product counts, a model left out of the sum, or the other table drawn over."""
    readme = page.with_name("README.md")
    places = f"{report.BEGIN}\n\n{report.END}\n\nBetween.\n\n{report.TUNING}\n\nold\n\n{report.END}\n\nMore.\n"
    readme.write_text(f"# Name\n\n{places}", encoding="utf-8")
    gains = [("longnet", 1.0), ("longnet", 4.0), ("wide", 1.0), ("wide", None)]
    problems = [{"workload": workload, "gain": gain} for workload, gain in gains]
    tuned = {"tune_standard_h100.json": {"run": {"device": "h100"}, "problems": problems}}
    text = report.files({"bench_h100.json": document()}, page, readme, tuned=tuned)[readme]
    assert isinstance(text, str)
    first, _, second = text.partition("Between.")
    assert "`longnet` forward" in first and "old" not in second and second.endswith("More.\n")
    lines = [line for line in second.splitlines() if line.startswith("|")]
    assert lines[2:] == ["| `longnet` | 2 | 2 | 4 |", "| `wide` | 1 | 1 | 1 |", "| in all | 3 | 1.59 | 4 |"]


def test_the_readme_s_table_has_all_gpus(page: Path) -> None:
    """A column under another GPU's name, or a README that is drawn into without a place for it."""
    readme = page.with_name("README.md")
    h100, h200 = document(), document()
    h200["runs"][0]["environment"]["gpu"] = "NVIDIA H200"
    h200["cases"]["op-longnet"]["rows"][OURS]["forward_ms"] = [0.1] * 3
    both = {"bench_h100.json": h100, "bench_h200.json": h200}
    readme.write_text("# Name\n", encoding="utf-8")
    assert readme not in report.files(both, page, readme)
    readme.write_text(f"# Name\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nMore.\n", encoding="utf-8")
    text = report.files(both, page, readme)[readme]
    assert isinstance(text, str)
    assert text.startswith("# Name\n") and text.endswith("More.\n") and "old" not in text
    head, _, forward, _ = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert [cell for cell in head if "NVIDIA" in cell] == ["NVIDIA H100, ms", "NVIDIA H200, ms"]
    assert forward[0] == "| `longnet` forward"
    assert forward[3] == "1.7"
    assert forward[4] == "0.1"


def test_goals_are_held_against_the_worst_case() -> None:
    """A floor that one case breaks and another hides, or a goal of less that is taken for one of more."""
    found = document()
    told = ((goal, list(goal.find(found))) for goal in goals.GOALS)
    verdicts = {goal.name: report._goal(goal, cases, found) for goal, cases in told if cases}

    def verdict(name: str) -> str:
        (line,) = (line for goal, line in verdicts.items() if goal.startswith(name))
        return line[-1]

    assert verdict("one branch, n = 128, forward") == "above the floor"
    assert verdict("one branch, n ≥ 2048, D 64, backward") == "reached"
    assert verdict("LongNet, forward, ") == "above the floor"
    assert verdict("whole operations, forward + backward") == "above the floor"
    assert verdict("host time a call, forward") == "above the floor"
    assert verdict("host time a call, autograd forward") == "reached"
    assert verdict("host time a call, backward") == "**below the floor**"
    assert verdict("an order beside none, forward") == "above the floor"
    assert verdict("memory above") == "reached"
    found["cases"]["op-longnet-causal"] = json.loads(json.dumps(found["cases"]["op-longnet"]))
    found["cases"]["op-longnet-causal"]["rows"][OURS]["forward_ms"] = [99.0] * 3
    (goal,) = (goal for goal in goals.GOALS if goal.name.startswith("LongNet, forward, "))
    line = report._goal(goal, list(goal.find(found)), found)
    assert line[1] == "`op-longnet-causal`"
    assert line[-1] == "**below the floor**"
    found["cases"]["op-longnet"]["rows"]["another"] = {"failed": "left out: not compiled within the budget"}
    line = report._goal(goal, list(goal.find(found)), found)
    assert line[-1] == "**below the floor**; of the peers that were timed"


BOUNDS = {
    "one branch, n = 128, forward": (1.15, 1.5),
    "one branch, n = 128, backward": (1.15, 1.5),
    "one branch, n = 256, forward": (1.15, 1.3),
    "one branch, n = 256, backward": (1.15, 1.3),
    "one branch, n = 512, forward": (0.95, 1.15),
    "one branch, n = 512, backward": (0.95, 1.15),
    "one branch, n = 1024, forward": (0.95, 1.08),
    "one branch, n = 1024, backward": (0.95, 1.08),
    "one branch, n ≥ 2048, D 64, forward": (0.88, 1.0),
    "one branch, n ≥ 2048, D 64, backward": (0.70, 1.0),
    "one branch, n ≥ 2048, D 128, forward": (0.75, 1.0),
    "one branch, n ≥ 2048, D 128, backward": (0.68, 1.0),
    "an order beside none, forward": (0.85, 0.95),
    "an order beside none, backward": (0.85, 0.95),
}
"""Floor and goal."""


def test_every_kernel_has_its_bounds() -> None:
    """A row of the goals that no case of the first tier fills, or that is held to another's bounds."""
    found = document()
    rows = {
        OURS: {"forward_ms": [1.0] * 3, "backward_ms": [1.0] * 3},
        CUDNN: {"forward_ms": [0.9] * 3, "backward_ms": [0.9] * 3},
    }
    rows[UNORDERED] = rows[CUDNN]
    kernels = selected(("kernels",), tier=1)
    found["cases"] = {case.name: {"run": 0, **results.record(case, rows, CEILINGS, 1.0)} for case in kernels}
    bounds = {goal.name: {(case.floor, case.goal) for case in goal.find(found)} for goal in goals.GOALS}
    assert {name: bounds[name] for name in BOUNDS} == {name: {pair} for name, pair in BOUNDS.items()}


def test_files_of_two_ways_are_not_compared(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio that rose because peers now write zero rows too, taken for a gain; an old file that nobody can read."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    found = document()
    results.save(found, new)
    del found["runs"][0]["zero_rows"]
    results.save(found, old)
    assert command.main(["regress", str(old), str(new)]) == 2
    assert "zero rows of dilated branches are in our time alone in the one file and" in capsys.readouterr().err
    assert command.main(["regress", str(new), str(old)]) == 2
    assert command.main(["regress", str(old), str(old)]) == 0
    text = report.files({"bench_h100.json": results.load(old)}, page, page.with_name("README.md"))[page]
    assert isinstance(text, str) and "zero rows of dilated branches are in our time alone." in text
    text = report.files({"bench_h100.json": results.load(new)}, page, page.with_name("README.md"))[page]
    assert isinstance(text, str) and "zero rows of dilated branches are in the time of all contenders." in text


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code that hides a fall, or a choice of cases that chooses nothing."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    found = document()
    results.save(found, old)
    found["cases"]["op-longnet"]["rows"][OURS]["forward_ms"] = [99.0] * 3
    results.save(found, new)
    assert command.main(["regress", str(old), str(old)]) == 0
    assert command.main(["regress", str(old), str(new)]) == 1
    assert "op-longnet forward" in capsys.readouterr().out
    assert command.main(["--list", "--level", "operations", "--workload", "longnet", "--tier", "1"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["op-longnet", "op-longnet-causal"]
