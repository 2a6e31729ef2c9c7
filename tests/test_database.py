"""The tuning database: what it refuses to read, how it saves, and what each rung of a lookup finds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dilated_attention_pytorch import _layout, database, device
from dilated_attention_pytorch.config import LaunchConfig, ProblemKey
from dilated_attention_pytorch.database import Database, Lookup
from dilated_attention_pytorch.errors import DatabaseError, MissingPackageError

from . import measurements
from .measurements import KERNELS, PROBLEM, TOOLCHAIN, database_at, entry

L4 = device.simulated("l4")
H100 = device.simulated("h100")


def key(op: str = "fwd") -> ProblemKey:
    return ProblemKey.of(PROBLEM, op, 0)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def written(tmp_path: Path) -> Path:
    """A good file with two entries."""
    (path,) = database.save(L4, [entry(), entry(branches=((512, 2),))], tmp_path)
    return path


FAULTS = {
    "unknown field": ("spills: 0", "spills: 0, cheers: 1", 6, "cheers is no field"),
    "missing field": (", spills: 0", "", 6, "lacks spills"),
    "missing size": (", num_warps: 4", "", 5, "lacks num_warps"),
    "missing part": ("  check: {error: 1.00e-04, tolerance: 5.00e-04}\n", "", 4, "lacks check"),
    "duplicate field": ("registers: 128", "registers: 128, registers: 64", 6, "given twice"),
    "duplicate key": ("[[512, 2]]", "[[256, 2]]", 10, "the key of an earlier entry"),
    "unquoted version": ('triton: "3.6.0"', "triton: 3.10", 9, 'must be quoted, got 3.10; write "3.10"'),
    "unquoted hash": (f'"{measurements.KERNEL}"', "12e456789012", 9, "must be quoted"),
    "conflict marker": ("entries:\n", "entries:\n<<<<<<< ours\n", 4, "merge was left unresolved"),
    "newer schema": ("schema: 1", "schema: 2", 1, "newer than the 1 read here; upgrade"),
    "python tag": ("registers: 128", "registers: !!python/name:os.system", 6, "carries the tag"),
    "python object": ("registers: 128", "registers: !!python/object/apply:os.abort []", 6, "carries the tag"),
    "alias": ("op: fwd,", "op: &a fwd, dtype: *a,", 4, "through an alias"),
    "bomb of aliases": ("op: fwd,", "op: &a [x, x, x], dtype: [*a, *a], a: [*a, *a],", 4, "through an alias"),
    "bomb of levels": ("registers: 128", f"registers: {'[' * 50_000}", 6, "nests more than 32 levels deep"),
    "bomb of digits": ("registers: 128", f"registers: {'9' * 5000}", 6, "must be a decimal integer"),
    "endless error": ("error: 1.00e-04", "error: 1.00e+999", 8, "must be a finite number"),
    "other device": ("device: nvidia-l4", "device: nvidia-l40s", 2, "in the folder nvidia-l4"),
    "other op": ("op: fwd", "op: dq", 4, "measures dq in fwd.yaml; move it to dq.yaml"),
    "unknown dtype": ("dtype: fp16", "dtype: half", 4, "must be one of bf16, fp16"),
    "unknown flag": ("flags: []", "flags: [fast]", 4, "must be one of"),
    "unsorted flags": ("flags: []", "flags: [mask, full]", 4, "must be sorted"),
    "unreachable rows": ("[[256, 2]]", "[[257, 2]]", 4, "has 257 rows; keys hold 288"),
    "unreachable grid": ("grid: 512", "grid: 200", 4, "must be a power of two up to 512"),
    "triple": ("[[256, 2]]", "[[256, 2, 3]]", 4, "a [rows, stride] pair, got 3"),
    "no branches": ("[[256, 2]]", "[]", 4, "is empty"),
    "impossible config": ("block_m: 64", "block_m: 96", 5, "block_m must be a power of two, got 96"),
    "wrong order of times": ("low: 99.00", "low: 200.00", 7, "0 < low <= median <= high"),
    "negative time": ("median: 100.00", "median: -1.00", 7, "not negative"),
    "time of nothing": ("second: null", "second: null, apart: 90.00", 7, "stands in for no others; remove apart"),
    "no time": ("median: 100.00", "median: null", 7, "must be a number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    """Each of these would be read as another number, or as nothing, and the tuning would be lost without a word."""
    old, new, line, complaint = FAULTS[fault]
    path = written(tmp_path)
    text = path.read_text()
    count = 2 if fault == "other op" else 1
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, count))
    with pytest.raises(DatabaseError) as raised:
        Database(tmp_path).entries("sm_89", "nvidia-l4", "fwd")
    assert complaint in str(raised.value)
    assert str(raised.value).startswith(f"{path}:{line}: ")


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    """A file that was cut by a crash, or compressed: an error of Python's, without its name, at the first launch."""
    path = written(tmp_path)
    path.write_bytes(b"\x1f\x8b" + path.read_bytes())
    with pytest.raises(DatabaseError, match=r"fwd\.yaml:1: this is no text in UTF-8; restore the file"):
        database.read(path)


@pytest.mark.parametrize(
    "stray",
    ["sm_89/nvidia-l4/fwd.yml", "sm_89/NVIDIA L4/fwd.yaml", "sm_89/nvidia-l4/forward.yaml", "nvidia-l4/fwd.yaml"],
)
def test_a_file_that_no_lookup_would_find_is_refused(tmp_path: Path, stray: str) -> None:
    """A space in a name once hid 39 committed files of another project for 14 months."""
    path = tmp_path / stray
    path.parent.mkdir(parents=True)
    path.write_text("schema: 1\n")
    with pytest.raises(DatabaseError, match="no lookup would find this file"):
        Database(tmp_path).digest()


def test_saving_without_filelock_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only who tunes needs it: an installation without it must not end in a bare ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dilated-attention-kernels\[tune\]'"):
        database.save(L4, [entry()], tmp_path)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    """A field that is dropped or rounded away on the way to disk is evidence lost."""
    config = LaunchConfig(128, 64, num_warps=8, num_stages=3, maxnreg=168, loads="descriptor")
    capped = entry(config=replace(config, maxnreg=168), grid=128)
    mine = [entry(config=config), capped, entry("dq"), entry(problem=replace(PROBLEM, causal=True, mask=True))]
    mine.append(entry(branches=((256, 2), (256, 4)), apart=120.5))
    beside = entry(grid=32)
    mine.append(replace(beside, time_us=replace(beside.time_us, cudnn=98.25)))
    mine.append(replace(entry(grid=64), time_us=database.Times(6.12, 6.01, 7.0, default=None, second=6.5)))
    found = database_at(tmp_path, {"l4": mine})
    read = [*found.entries("sm_89", "nvidia-l4", "fwd").values(), *found.entries("sm_89", "nvidia-l4", "dq").values()]
    assert sorted(read, key=repr) == sorted(mine, key=repr)


def test_importing_and_opening_reads_nothing(tmp_path: Path) -> None:
    """The database of all GPUs would be parsed at import, on every rank."""
    written(tmp_path).write_text("no measurements at all")
    assert Database(tmp_path).entries("sm_90", "nvidia-h200", "fwd") == {}


def test_a_missing_folder_is_named() -> None:
    """An overlay that is silently empty looks like tuning that does not help."""
    with pytest.raises(DatabaseError, match="nowhere is no folder"):
        database.load(Path("nowhere"))


# ---- Saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"median": 104.9}, "old"),
        ({"median": 95.1}, "old"),
        ({"median": 105.1}, "new"),
        ({"median": 94.9}, "new"),
        ({"config": LaunchConfig(32, 32)}, "new"),
        ({"kernel": "abcdefabcdef"}, "new"),
        ({"triton": "3.7.0"}, "new"),
    ],
)
def test_tuning_again_what_is_fine_changes_no_file(tmp_path: Path, change: dict[str, object], kept: str) -> None:
    """Noise in every entry makes a diff that nobody reviews; a real change must not be swallowed with it."""
    path = written(tmp_path)
    before = path.read_text()
    changed = database.save(L4, [entry(**change)], tmp_path)  # type: ignore[arg-type]
    assert changed == ([] if kept == "old" else [path])
    assert (path.read_text() == before) == (kept == "old")


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(None, None, "old"), (None, 150.0, "new"), (150.0, None, "old"), (150.0, 157.0, "old"), (150.0, 90.0, "new")],
)
def test_what_a_joint_launch_stands_in_for_counts_as_its_time(
    tmp_path: Path, before: float | None, after: float | None, kept: str
) -> None:
    """The launches apart have become faster, or were timed for the first time, and calls go on as before."""
    both = ((256, 2), (256, 4))
    (path,) = database.save(L4, [entry(branches=both, apart=before)], tmp_path)
    changed = database.save(L4, [entry(branches=both, median=101.0, apart=after)], tmp_path)
    assert changed == ([] if kept == "old" else [path])


def test_entries_are_sorted_whatever_came_first(tmp_path: Path) -> None:
    """Two tuners would write one set of entries as two different files."""
    several = [entry(grid=grid, branches=((rows, 2),)) for grid in (512, 64) for rows in (1024, 256)]
    one = database.save(L4, several, tmp_path / "a")[0].read_text()
    for each in reversed(several):
        (two,) = database.save(L4, [each], tmp_path / "b")
    assert two.read_text() == one


WRITER = """
import sys, time
from pathlib import Path
from tests.measurements import entry
from dilated_attention_pytorch import database, device
write = database.write
def slowly(*arguments):
    time.sleep(0.05)
    return write(*arguments)
database.write = slowly
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
for rows in range(int(sys.argv[2]), 2048, 256):
    database.save(device.simulated("l4"), [entry(branches=((rows, 2),))], Path(sys.argv[1]))
"""


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each reads the file, adds its own and writes: without a lock the later one drops what the other added.

    They begin when both are there, and wait between reading and writing: by themselves they would hardly meet.
    """
    root = _layout.tune_db_dir().parent
    here, there = str(tmp_path / ".here"), str(tmp_path / ".there")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), *given], cwd=root, env=environment())
        for given in (("128", here, there), ("256", there, here))
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert len(Database(tmp_path).entries("sm_89", "nvidia-l4", "fwd")) == 16 - 1
    assert [path.name for path in (tmp_path / "sm_89" / "nvidia-l4").iterdir()] == ["fwd.yaml"]


def test_threads_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    """A lock of the process alone, or a half-written file of one name for all, holds between processes and not here."""
    with ThreadPoolExecutor(4) as pool:
        for rows in range(128, 2048, 128):
            pool.submit(database.save, L4, [entry(branches=((rows, 2),))], tmp_path)
    assert len(Database(tmp_path).entries("sm_89", "nvidia-l4", "fwd")) == len(range(128, 2048, 128))


FOREVER = """
import sys
from pathlib import Path
from tests.measurements import entry
from dilated_attention_pytorch import database, device
turn = 0
while True:
    turn += 1
    several = [entry(branches=((rows, 2),), median=100.0 * turn) for rows in range(128, 1024, 128)]
    database.save(device.simulated("l4"), several, Path(sys.argv[1]))
    print(turn, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    """Half a file refuses every launch on that GPU; a lock that stays refuses every tuner after it."""
    command = [sys.executable, "-c", FOREVER, str(tmp_path)]
    root = _layout.tune_db_dir().parent
    with subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.kill()
    (path,) = Database(tmp_path).files()
    assert len({found.time_us.median for found in database.read(path).values()}) == 1
    assert database.save(L4, [entry(branches=((1024, 2),))], tmp_path) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a thing of Linux")
@pytest.mark.parametrize("there", [True, False], ids=["over an old file", "as a new file"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    """A file that is cut where the disk ended, in place of hours of tuning."""
    path = tmp_path / "sm_89" / "nvidia-l4" / "fwd.yaml"
    before = written(tmp_path).read_bytes() if there else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".fwd.yaml.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(DatabaseError, match="cannot be written to: No space left on device; what it held is as it was"):
        database.save(L4, [entry(median=200.0)], tmp_path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert [found.name for found in path.parent.iterdir()] == ["fwd.yaml"] * there


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A database of one entry in a folder that nobody may write to, not even who runs these tests."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        root = Path(scratch, "db")
        (path,) = database.save(L4, [entry()], root)
        folders = [root, path.parent.parent, path.parent]
        (root / ".lock").unlink(missing_ok=True)
        for folder in folders:
            folder.chmod(0o555)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # root may write anywhere
        yield root
        if me == 0:
            os.seteuid(me)
        for folder in folders:
            folder.chmod(0o755)


def test_a_read_only_database_is_read_and_not_written(read_only: Path) -> None:
    """A container's image, a cluster's shared folder: lookups must not want to write, and a save must say why not."""
    assert len(Database(read_only).entries("sm_89", "nvidia-l4", "fwd")) == 1
    assert re.fullmatch("[0-9a-f]{12}", Database(read_only).digest())
    with pytest.raises(DatabaseError, match=r"cannot be written to: Permission denied; .* save to another folder"):
        database.save(L4, [entry("dq")], read_only)
    assert [path.name for path in Database(read_only).files()] == ["fwd.yaml"]


def environment() -> dict[str, str]:
    """For a process of its own: the package from this checkout, and nothing that a test set."""
    return {**os.environ, "PYTHONPATH": str(_layout.tune_db_dir().parent / "src")}


def test_the_digest_tells_databases_apart(tmp_path: Path) -> None:
    """Ranks with different files would launch different kernels and believe they agree."""
    found = database_at(tmp_path, {"l4": [entry()]})
    before = found.digest()
    assert re.fullmatch("[0-9a-f]{12}", before)
    assert Database(tmp_path).digest() == before
    database.save(L4, [entry(median=200.0)], tmp_path)
    assert found.digest() != before


# ---- Looking up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, database.FRESH),
        ({"triton": "3.5.1"}, database.TOOLCHAIN_STALE),
        ({"kernel": "abcdefabcdef"}, database.KERNEL_STALE),
        ({"kernel": "abcdefabcdef", "triton": "3.5.1"}, database.KERNEL_STALE),
        ({"error": 6e-4}, database.INVALID),
        ({"shared_bytes": 101_377}, database.INVALID),
    ],
)
def test_status_is_computed(change: dict[str, object], expected: str) -> None:
    """A stored status is right on the day it is written; a config that was wrong must never run."""
    assert database.status(entry(**change), "sm_89", TOOLCHAIN, KERNELS) == expected  # type: ignore[arg-type]


def test_distance_is_in_log_space() -> None:
    """The rule of the documents, in numbers; a different kind of problem must never be near."""
    here = key()
    assert database.distance(here, here) == 0
    assert database.distance(here, replace(here, branches=((512, 2),))) == 1
    assert database.distance(here, replace(here, branches=((128, 8),))) == 2
    assert database.distance(here, replace(here, grid=here.grid // 16)) == 1
    two = replace(here, branches=((256, 2), (256, 2)))
    assert database.distance(two, replace(two, branches=((256, 2), (1024, 4)))) == 1.25
    assert database.distance(here, replace(here, dtype="bf16")) == 0.25
    for other in ({"dtype": "fp32"}, {"head_dim": 72}, {"causal": True}, {"order": "snake"}, {"flags": ("mask",)}):
        assert database.distance(here, replace(here, **other)) is None  # type: ignore[arg-type]
    assert database.distance(here, two) is None


def lookup(committed: Database, overlay: Database | None = None, asked: device.Device = H100) -> Lookup:
    return Lookup(key(), asked, TOOLCHAIN, committed, overlay)


def test_each_rung_finds_its_own(tmp_path: Path) -> None:
    """A rung that reads a neighbour's shelf gives one GPU's configs to another under a wrong name."""
    near = entry(branches=((512, 2),), median=7.0)
    far = entry(branches=((2048, 2),), median=8.0)
    committed = database_at(
        tmp_path / "committed",
        {"h100": [entry(median=1.0), near, far], "h200": [entry(median=2.0)], "l4": [entry(median=3.0)]},
    )
    overlay = database_at(tmp_path / "mine", {"h100": [entry(median=4.0)]})
    asked = lookup(committed, overlay)

    def medians(hits: list[database.Hit]) -> list[float]:
        return [hit.entry.time_us.median for hit in hits]

    assert medians(asked.in_overlay()) == [4.0]
    assert medians(asked.exact()) == [1.0]
    assert medians(asked.same_silicon()) == [2.0]
    assert medians(asked.nearest()) == [7.0]
    assert medians(asked.other_device()) == medians(asked.stale()) == []
    assert medians(lookup(committed).in_overlay()) == []
    assert medians(lookup(committed, asked=device.simulated("l40s")).other_device()) == [3.0]
    assert medians(lookup(committed, asked=device.simulated("h100-pcie")).same_silicon()) == [1.0, 2.0]
    assert medians(lookup(committed, asked=device.simulated("b200")).other_device()) == []


def test_ties_go_to_the_smaller_problem_and_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    """One octave up and one down are equally near: two ranks must not take one each."""
    committed = database_at(
        tmp_path, {"h100": [entry(branches=((512, 2),)), entry(branches=((128, 2),)), entry(branches=((224, 2),))]}
    )
    assert [hit.entry.key.branches[0][0] for hit in lookup(committed).nearest()] == [224, 128, 512]


def test_the_stale_rung_has_what_the_others_may_not_give(tmp_path: Path) -> None:
    """An entry of an old kernel text must not go before a fresh one, and must not be lost either."""
    old = entry(kernel="abcdefabcdef")
    committed = database_at(tmp_path, {"h100": [old], "h200": [entry(median=2.0)]})
    asked = lookup(committed)
    assert [hit.status for hit in asked.exact()] == [database.KERNEL_STALE]
    assert [hit.entry for hit in asked.stale()] == [old]


# ---- The committed database ------------------------------------------------------------------------------------------


def test_every_committed_file_is_read_and_its_device_is_known() -> None:
    """A committed file that is refused, or whose device has no facts, helps nobody."""
    committed = database.load()
    known = device.known()
    for path in committed.files():
        assert database.read(path)
        assert known[path.parent.name].arch == path.parent.parent.name


def test_the_committed_kernels_have_names() -> None:
    """With no kernel known by its hash every entry would be stale."""
    names = {name for same in database.rendered_kernels().values() for name in same}
    assert "general" in names


def test_the_example_of_the_documents_is_read(tmp_path: Path) -> None:
    """A schema that is described and not read would be copied by whoever writes entries by hand."""
    text = (_layout.tune_db_dir() / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "sm_90" / H100.name / "fwd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    (found,) = database.read(path).values()
    assert database.dump(H100.name, [found]) == path.read_text()
