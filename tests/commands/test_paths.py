"""Every path that a command line can name, where nothing is, where a folder is, and below a file: always a sentence."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dilated_attention_pytorch import cli, device
from dilated_attention_pytorch.tuning import screening, tune
from dilated_attention_pytorch.tuning.journal import to_json

from ..tuning.made_up import RUN

READ = [
    ["tune", "--dry-run", "--from-misses", "PATH"],
    ["tune", "--from-screen", "PATH", "--runs", "RUNS", "--db", "RUNS"],
    ["tune", "--resume", "--runs", "PATH"],
    ["screen", "--arch", "sm_90", "--from-misses", "PATH"],
    ["db", "merge", "EMPTY", "PATH"],
    ["db", "merge", "PATH", "EMPTY"],
    ["report", "PATH"],
]
FOLDERS_READ = [
    *(["db", verb, "--db", "PATH"] for verb in ("check", "show", "stale", "digest")),
    ["db", "coverage", "--gpu", "h100", "--db", "PATH"],
    ["db", "diff", "PATH"],
    ["db", "diff", "HEAD", "PATH"],
    ["explain", "--gpu", "h100", "--workload", "core", "--database", "PATH"],
]
WRITTEN = [
    ["screen", "--arch", "sm_90", "--workload", "core", "--output", "PATH"],
    ["db", "stale", "--problems", "PATH"],
    ["report", "JOURNAL", "--html", "PATH"],
]
FOLDERS_WRITTEN = [
    ["tune", "--workload", "core", "--db", "PATH", "--runs", "RUNS"],
    ["tune", "--workload", "core", "--runs", "PATH", "--db", "RUNS"],
]
CASES = [
    *itertools.product(READ, ("nowhere", "folder", "below a file", "no text")),
    *itertools.product(FOLDERS_READ, ("nowhere", "below a file", "no text")),
    *itertools.product(WRITTEN, ("nowhere", "folder", "below a file")),
    *itertools.product(FOLDERS_WRITTEN, ("below a file", "no text")),
]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A machine with a GPU as far as it is asked, on which nothing is compiled or measured."""

    def begun(*given: object) -> None:
        pytest.fail("the work begins although its path is no good")

    monkeypatch.setattr(device, "current", lambda where=None: device.simulated("h100"))
    monkeypatch.setattr(screening, "Pool", begun)
    monkeypatch.setattr(tune, "_Tuning", begun)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "a file").write_bytes(b"\xff\xfe\x00\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.jsonl").write_text(f"{to_json(RUN)}\n")
    return {
        "nowhere": tmp_path / "no" / "such" / "x",
        "folder": tmp_path / "folder",
        "below a file": tmp_path / "a file" / "x",
        "no text": tmp_path / "a file",
    }


@pytest.mark.parametrize(("words", "place"), CASES, ids=[f"{' '.join(words)}-{place}" for words, place in CASES])
def test_a_path_that_is_no_good_is_a_sentence(
    words: list[str], place: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, after the work at worst: nobody learns from it what to name instead."""
    path, empty = places[place], tmp_path / "empty"
    empty.touch()
    named = {"PATH": path, "RUNS": tmp_path / "runs", "EMPTY": empty, "JOURNAL": tmp_path / "run.jsonl"}
    assert cli.main([str(named.get(word, word)) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dilated-attention {words[0]}: ") and said.count("\n") == 1
    assert str(path) in said or str(empty) in said
    assert not (tmp_path / "no").exists() and not empty.read_text()


@pytest.mark.parametrize("verb", ["show", "stale", "digest", "check"])
def test_a_folder_in_a_files_place_is_a_sentence(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A database that was copied wrongly ends every command that reads it in a traceback, and every launch."""
    (tmp_path / "sm_90" / "nvidia-h100-80gb-hbm3" / "fwd.yaml").mkdir(parents=True)
    assert cli.main(["db", verb, "--db", str(tmp_path)]) == (1 if verb == "check" else 2)
    said = capsys.readouterr()
    assert "cannot be read: Is a directory; mend or re" in said.out + said.err


def test_an_empty_list_of_misses_says_so(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`no call has these dtypes`, although none were named."""
    (tmp_path / "misses.jsonl").touch()
    assert cli.main(["tune", "--from-misses", str(tmp_path / "misses.jsonl")]) == 2
    assert "misses.jsonl is empty: no call ran unmeasured" in capsys.readouterr().err


def test_what_is_tried_is_left_as_it_was(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A screening that is stopped leaves an empty list, or has emptied the last one."""
    monkeypatch.setattr(screening, "Pool", _stopped)
    before = tmp_path / "before.json"
    before.write_text("{}")
    for output in (before, tmp_path / "new.json"):
        assert cli.main(["screen", "--arch", "sm_90", "--workload", "core", "--output", str(output)]) == 130
    assert before.read_text() == "{}" and not (tmp_path / "new.json").exists()


def _stopped(*given: object) -> None:
    raise KeyboardInterrupt
