"""The console command: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dilated_attention_pytorch import cli, database, device, doctor
from dilated_attention_pytorch.call_config import CallConfig
from dilated_attention_pytorch.runtime.plan import CallChoice, Plan, plan

from .measurements import PROBLEM, TOOLCHAIN, entry


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_explain_simulates_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the documents must print what would run there, on a machine without that GPU."""
    code, out, _ = run(capsys, "explain", "--gpu", "l4", "--workload", "gigapath")
    assert code == 0
    assert "workload gigapath: Prov-GigaPath slide encoder" in out
    assert "nvidia-l4 (sm_89, 58 SMs" in out
    assert "launch 5: branch 4, segment 10213 (of 1048576, N is less), dilation 16, 639 rows" in out
    assert "dkdv" not in out


def test_explain_tells_of_gradients_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    """--backward that is parsed and forgotten. Of an L4 nothing is measured: no launch gives all gradients."""
    _, out, _ = run(capsys, "explain", "--gpu", "l4", "--workload", "core", "--backward")
    assert "dkdv" in out and "dq" in out


def test_what_is_given_replaces_what_the_workload_has(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that is ignored explains another call than the user's."""
    options = "--length 999 --heads 12 --kv-heads 4 --head-dim 80 --batch 3 --dtype fp32 --causal --mask --order snake"
    more = "--segments 100,7 --dilations 3,2 --queries all --head-offset zero --padding zeros --json --gpu a100"
    code, out, _ = run(capsys, "explain", "--workload", "longnet", *options.split(), *more.split())
    problem = json.loads(out)["problem"]
    assert code == 0
    expected = {"length": 999, "heads": 12, "kv_heads": 4, "head_dim": 80, "batch": 3, "dtype": "fp32", "causal": True}
    expected |= {"mask": True, "order": "snake", "row_width": 32, "branches": [[100, 3], [7, 2]], "queries": "all"}
    expected |= {"head_offset": "zero", "padding": "zeros"}
    assert {name: problem[name] for name in expected} == expected


def test_json_holds_every_launch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A script that reads it needs names and numbers, not sentences alone."""
    database.save(device.simulated("h100"), [entry()], tmp_path)
    sizes = f"--batch {PROBLEM.batch} --length {PROBLEM.length} --heads 8 --head-dim 64 --dtype fp16".split()
    sizes += ["--segments", "512", "--dilations", "2"]
    code, out, _ = run(capsys, "explain", "--gpu", "h100", "--json", "--database", str(tmp_path), *sizes, "--backward")
    found = json.loads(out)
    assert (code, found["backend"], found["device"]["name"]) == (0, "triton", "nvidia-h100-80gb-hbm3")
    assert [launch["op"] for launch in found["launches"]] == ["fwd", "dkdv", "dq"]
    # The invented kernel of the entry is in nobody's git: it serves as a fallback alone.
    assert found["launches"][0]["rung"] == "stale"
    assert found["launches"][0]["config"] == {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}


def test_json_tells_what_the_text_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that reads the launches of a call which cuDNN takes, or which the torch backend cuts as measured."""
    problem = replace(PROBLEM, branches=((512, 1), (1024, 1)))
    planned = plan(problem, device.simulated("h100"), toolchain=TOOLCHAIN)
    forward, backward = (CallChoice(op, 1, CallConfig("pack", 2, 8), f"{op} as measured") for op in ("fwd", "dkdv"))
    found = replace(
        planned,
        backend="cudnn",
        refusals=(("triton", "was asked to say no"),),
        external=(("fwd", "80 us, ours 100"), ("bwd", "180 us, ours 200")),
        calls=(forward, backward),
        beaten=planned.launches[:1],
    )
    monkeypatch.setattr(cli, "plan", lambda *given, **options: found)
    command = ["explain", "--gpu", "h100", "--workload", "longnet"]

    def told(*more: str) -> tuple[dict[str, Any], list[str]]:
        lines = run(capsys, *command, *more)[1].splitlines()
        return json.loads(run(capsys, *command, "--json", *more)[1]), lines

    values, lines = told("--backward")
    assert {field.name for field in fields(Plan)} <= values.keys()
    assert values["workload"]["name"] == "longnet" and values["workload"]["model"] in lines[0]
    assert [row["op"] for row in values["external"]] == ["fwd", "bwd"]
    assert [(row["op"], row["config"]) for row in values["calls"]] == [
        (calls.op, {"rows": "pack", "pairs": 2, "share": 8}) for calls in (forward, backward)
    ]
    rows = [row for name in ("external", "refusals", "calls", "launches", "beaten") for row in values[name]]
    passed = [why for row in rows for why in row.get("passed", ())]
    sentences = [row["why"] for row in (*rows, *passed)]
    sentences += [f"its tails are masked: {row['tails']}" for row in rows if row.get("tails")]
    sentences += [f"--add {row['add']}`" for row in rows if row.get("add")]
    sentences += [f"--add {values['could_share']['add']}`"]
    assert {why for why in sentences if not any(why in line for line in lines)} == set()
    asides = (
        "its tails are masked",
        "python -m codegen --add",
        "  not ",
        "cuDNN on views",
        "calls ",
        "untuned default",
    )
    told_aside = [line for line in lines if any(aside in line for aside in asides)]
    assert told_aside and not [line for line in told_aside if not any(why in line for why in sentences)]
    values, lines = told()
    assert [row["op"] for name in ("external", "calls") for row in values[name]] == ["fwd", "fwd"]
    assert {row["op"] for row in values["launches"]} == {"fwd"}


def test_json_holds_every_offer_of_a_rung(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of two entries nearby that were passed over the text tells both, and a mapping by rung the last one."""
    near = [entry(branches=((rows, 2),), kernel="abcdefabcdef") for rows in (192, 320)]
    database.save(device.simulated("h100"), near, tmp_path)
    sizes = f"--length {PROBLEM.length} --heads 8 --head-dim 64 --segments 512 --dilations 2 --dtype fp16".split()
    out = run(capsys, "explain", "--gpu", "h100", "--json", "--database", str(tmp_path), *sizes)[1]
    passed = [row for launch in json.loads(out)["launches"] for row in launch["passed"] if "text that" in row["why"]]
    assert [row["rung"] for row in passed].count("nearest") >= 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--gpu h10 --workload longnet", "did you mean"),
        ("--gpu l4 --workload longent", "'longent' is no workload"),
        ("--gpu l4 --length 5", "name a --workload, or give --heads, --head-dim, --segments, --dilations"),
        ("--gpu l4 --workload longnet --segments 5", "one dilation rate a segment length, got 1 --segments and 5"),
        ("--gpu l4 --workload longnet --heads 12 --kv-heads 5", "a multiple of --kv-heads, got 12 and 5"),
        ("--gpu l4 --workload longnet --length 0", "expected a positive integer, got '0'"),
        ("--gpu l4 --workload longnet --dtype fp64 --backend triton", "float64 runs on the torch backend"),
        ("--gpu l4 --workload longnet --database no/such", "'no/such' is no folder"),
    ],
)
def test_a_wrong_command_line_is_answered_with_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: str, complaint: str
) -> None:
    """A traceback, or exit code 0, where a script expects a plan."""
    code, out, err = run(capsys, "explain", *arguments.split())
    assert (code, out) == (2, "")
    assert complaint in err


def test_without_a_gpu_explain_says_why_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who forgets --gpu on a laptop must not take the answer for a GPU's."""
    monkeypatch.setattr(device, "current", lambda where=None: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, _ = run(capsys, "explain", "--workload", "readme")
    assert code == 0
    assert "device   CPU" in out and "not triton: the tensors are on a CPU" in out


def test_the_exit_code_of_doctor_is_its_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI that asks the doctor reads the code alone."""
    facts = (("versions", "python", "3.11"),)
    for complaints, expected in (((), 0), ((("a fault", "a remedy"),), 1)):
        monkeypatch.setattr(doctor, "examine", lambda found=complaints: doctor.Report(facts, found))
        code, out, _ = run(capsys, "doctor")
        assert code == expected
        assert ("a remedy" in out) == bool(complaints)
        code, out, _ = run(capsys, "doctor", "--json")
        assert json.loads(out)["complaints"] == [list(complaint) for complaint in complaints]


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`dilated-attention explain ... | head` would end in a BrokenPipeError, and again when Python flushes."""
    command = [
        sys.executable,
        "-m",
        "dilated_attention_pytorch.cli",
        "explain",
        "--gpu",
        "l4",
        "--workload",
        "gigapath",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
