"""The journal: what was measured stays, whatever happens to who measures."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dilated_attention_pytorch.config import ProblemKey
from dilated_attention_pytorch.database import Resources
from dilated_attention_pytorch.errors import DatabaseError
from dilated_attention_pytorch.tuning import journal
from dilated_attention_pytorch.tuning.journal import End, Measurement, Pick, ProblemRow, Row, Run, Writer

from ..measurements import PROBLEM

KEY = ProblemKey.of(PROBLEM, "dkdv", 0)
CONFIG = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
ROWS: tuple[Row, ...] = (
    Run("cpu", "cpu", 2, 0, None, None, "2.13.0+cpu", None, "dilated-attention tune", "2026-11-22T14:20:00+00:00"),
    ProblemRow(KEY, "longnet", 0.25, 1e9, 2e6, CONFIG, None),
    Measurement(KEY, CONFIG, "kernel", "s512_d2", "race", "ok", 10.5, 10.0, 11.0, Resources(1, 2, 3), 1e-4, 5e-4),
    Measurement(KEY, {}, "cudnn", None, "check", "illegal_access", message="Xid 31\nof the GPU"),
    Pick(KEY, CONFIG, "kernel", "tie: default", 10.5, 10.0, 11.0, 10.6, None, 40),
    Pick(replace(KEY, head_dim=128), CONFIG, "kernel", "fastest", 10.5, 10.0, 11.0, None, 11.2, 40, apart_us=9.5),
    End(12.5, finished=False),
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """A field lost, a tuple that came back as a list, a message with a newline that became two lines."""
    with Writer(tmp_path / "runs" / "a.jsonl") as writer:
        for row in ROWS:
            writer.add(row)
    found = journal.read(tmp_path / "runs" / "a.jsonl")
    assert (*found.runs, *found.problems, *found.measurements, *found.picks, *found.ends) == ROWS


def test_a_line_of_json_is_what_its_readers_expect() -> None:
    """A key spelt otherwise than in the database, or a kind that nobody knows."""
    values = json.loads(journal.to_json(ROWS[2]))
    assert values["kind"] == "measurement"
    assert values["key"]["branches"] == [[256, 2]] and values["key"]["flags"] == []
    assert values["resources"] == {"shared_bytes": 1, "registers": 2, "spills": 3}


def test_a_torn_line_is_ignored_and_then_cut_off(tmp_path: Path) -> None:
    """Killed while writing, a run would leave a journal that nobody can read or that glues two rows together."""
    path = tmp_path / "a.jsonl"
    whole = f"{journal.to_json(ROWS[0])}\n{journal.to_json(ROWS[1])}\n"
    for torn in ('{"kind": "measu', "x" * (3 * journal.BLOCK), ""):
        path.write_text(whole + torn)
        assert journal.read(path).problems == [ROWS[1]]
        with Writer(path) as writer:
            writer.add(ROWS[4])
        assert path.read_text() == f"{whole}{journal.to_json(ROWS[4])}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "guess"}', "guess"),
        ('{"kind": "end", "seconds": 1.0}', "finished"),
        ('{"kind": "end", "seconds": 1.0, "finished": true, "mood": 1}', "'mood' is no field"),
        ("[]", "no row"),
        ("{", "no row"),
        (journal.to_json(ROWS[0]).replace('"schema": 1', '"schema": 2'), "newer"),
    ],
)
def test_what_is_no_row_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    """A journal edited by hand would be believed in part."""
    path = tmp_path / "a.jsonl"
    path.write_text(f"{journal.to_json(ROWS[0])}\n{line}\n{journal.to_json(ROWS[5])}\n")
    with pytest.raises(DatabaseError, match=rf"a\.jsonl:2: .*{said}"):
        journal.read(path)


def _begin(path: Path, told: Connection) -> None:
    with Writer(path) as writer:
        writer.add(ROWS[0])
        told.send("begun")
        told.recv()
        writer.add(ROWS[1])


def test_a_journal_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs go on with one journal: their lines mix, and each measures what the other does."""
    monkeypatch.setattr(journal, "GONE_S", 0.1)
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(path, theirs))
    process.start()
    assert ours.recv() == "begun"
    with pytest.raises(DatabaseError, match=r"a\.jsonl is being written by another run.* without --resume"):
        Writer(path)
    assert journal.read(path).runs == [ROWS[0]]
    ours.send("go on")
    process.join(30)
    with Writer(path) as writer:
        writer.add(ROWS[4])
    found = journal.read(path)
    assert (found.runs, found.problems, found.picks) == ([ROWS[0]], [ROWS[1]], [ROWS[4]])


def test_a_writer_that_was_killed_is_not_waited_for_in_vain(tmp_path: Path) -> None:
    """A lock that outlives its owner: nothing goes on with the run until somebody finds the file and removes it."""
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(path, theirs))
    process.start()
    assert ours.recv() == "begun"
    process.kill()
    with Writer(path) as writer:
        writer.add(ROWS[1])
    assert journal.read(path).problems == [ROWS[1]]
    process.join(30)
