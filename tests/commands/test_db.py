"""`dilated-attention db`: what it finds wrong, what it shows, how it joins, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import _layout, cli, database, device
from dilated_attention_pytorch.config import LaunchConfig, ProblemKey
from dilated_attention_pytorch.database import Database, Entry
from dilated_attention_pytorch.runtime import misses
from dilated_attention_pytorch.runtime import plan as plans
from dilated_attention_pytorch.runtime.variants import acting_order
from dilated_attention_pytorch.tuning import grid, ledger
from dilated_attention_pytorch.tuning.changes import contents, merged
from dilated_attention_pytorch.workloads import WORKLOADS

from ..measurements import KERNEL, PROBLEM, entry

NESTED = replace(PROBLEM, length=32768, branches=((2048, 1), (4096, 2), (8192, 4)))
"""What a rendered text computes in one pass."""
H100 = device.simulated("h100")
L4 = device.simulated("l4")
ROOT = _layout.tune_db_dir().parent


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invented kernel of the entries is the general text or a pass, and Triton is the one that measured them."""
    monkeypatch.setattr(database, "rendered_kernels", lambda: {KERNEL: ("general", "s2048_4096_8192_d1_2_4")})
    monkeypatch.setattr(device, "_triton_version", lambda: "3.6.0")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["db", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def saved(root: Path, *entries: Entry, on: device.Device = H100) -> Path:
    database.save(on, entries, root)
    return root


# ---- check -----------------------------------------------------------------------------------------------------------


def test_what_is_in_order_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A check that complains of what is right is switched off."""
    root = saved(tmp_path, entry(), entry("dq"), entry(problem=replace(PROBLEM, causal=True, mask=True)))
    assert run(capsys, "check", "--db", root) == (0, f"{root}: 3 fresh; no faults\n", "")


UNREACHABLE = {
    "several branches": {"branches": ((256, 2), (256, 4))},
    "grid of one, segments of many": {"grid": 1},
    "an order that changes nothing": {"branches": ((256, 1),), "order": "hilbert", "flags": ("full",)},
    "a head dimension that no kernel takes": {"head_dim": 264},
    "a dtype that no kernel takes": {"dtype": "fp64"},
}
FAULTS = {
    "wrong": (entry(error=6e-4), "its result was wrong by 0.0006, 0.0005 is allowed"),
    "too large": (entry(shared_bytes=232_449), "takes 232,449 bytes of shared memory, and its device has 232,448"),
    "slower than nothing": (
        replace(entry(), time_us=database.Times(106.0, 105.0, 107.0, default=100.0, second=None)),
        "takes 106 us, and the untuned default 100 us",
    ),
    **{
        name: (replace(entry(), key=replace(entry().key, **change)), "no call")  # type: ignore[arg-type]
        for name, change in UNREACHABLE.items()
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str) -> None:
    """39 committed files of another project were found by no lookup for 14 months, and no check said so."""
    wrong, complaint = FAULTS[fault]
    root = saved(tmp_path, wrong, entry("dq"))
    code, out, _ = run(capsys, "check", "--db", root)
    assert code == 1
    assert f"{H100.name} {ledger.title(wrong.key)}: " in out and complaint in out
    assert "1 fault\n" in out
    report = json.loads(run(capsys, "check", "--db", root, "--json")[1])
    assert [complaint in found["problem"] for found in report["faults"]] == [True]


def test_every_broken_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A check that stops at the first file is run as often as there are faults."""
    root = saved(tmp_path, entry(), entry("dq"))
    for path in Database(root).files():
        path.write_text(path.read_text().replace("entries:\n", "entries:\n<<<<<<< ours\n"))
    code, out, _ = run(capsys, "check", "--db", root)
    assert code == 1
    assert out.count("a merge was left unresolved here") == 2
    stray = root / "sm_90" / "NVIDIA H100" / "fwd.yaml"
    stray.parent.mkdir()
    stray.write_text("schema: 1\n")
    assert "no lookup would find this file" in run(capsys, "check", "--db", root)[1]


def test_a_committed_device_has_its_facts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What nobody knows the limits of cannot be proven to fit; one's own folder may hold its entries all the same."""
    unlisted = replace(H100, name="nvidia-h800")
    root = saved(tmp_path, entry(), on=unlisted)
    assert run(capsys, "check", "--db", root)[0] == 0
    (root / "devices.yaml").write_text((_layout.tune_db_dir() / "devices.yaml").read_text())
    code, out, _ = run(capsys, "check", "--db", root)
    assert (code, "its device is not in devices.yaml" in out) == (1, True)


def test_a_file_under_another_architecture_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Lookups go by architecture: the files of a folder that was copied to the wrong one serve nobody."""
    root = saved(tmp_path, entry(), on=replace(H100, arch="sm_80"))
    assert "lies under sm_80, and its device is sm_90; move the file" in run(capsys, "check", "--db", root)[1]


def test_an_entry_that_sends_calls_elsewhere_is_of_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What says that branches are faster apart leads to no launch of its own, and would be removed as unreachable."""
    root = saved(tmp_path, entry("fwd", NESTED, branch=(0, 1, 2), apart=90.0))
    assert run(capsys, "check", "--db", root)[:2] == (0, f"{root}: 1 fresh; no faults\n")


def test_stale_entries_fail_on_request_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A change of a template would block every merge until a GPU is at hand."""
    root = saved(tmp_path, entry(kernel="abcdefabcdef"), entry("dq", triton="3.5.1"))
    code, out, _ = run(capsys, "check", "--db", root)
    assert (code, "1 kernel-stale" in out, "1 toolchain-stale" in out) == (0, True, True)
    assert run(capsys, "check", "--db", root, "--fresh")[0] == 1


def test_every_key_of_the_workloads_leads_back_to_a_call() -> None:
    """A key that the proof cannot ask for would be reported as unreachable, with all its measurements."""
    for workload in WORKLOADS.values():
        for problem in workload.problems():
            for branch in range(len(problem.branches)):
                key = replace(ProblemKey.of(problem, "fwd", branch), order=acting_order(problem, branch))
                assert ledger.asking(key) is not None, (workload.name, key)


# ---- show, stale, digest, coverage -----------------------------------------------------------------------------------


def test_show_filters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A filter that is parsed and forgotten shows another GPU's entry."""
    root = saved(tmp_path, entry(), entry("dq"), entry(problem=replace(PROBLEM, head_dim=80)))
    saved(root, entry(kernel="abcdefabcdef"), on=L4)

    def keys(*filters: str) -> list[tuple[str, str, int]]:
        code, out, _ = run(capsys, "show", "--db", root, "--json", *filters)
        assert code == 0
        return [(row["device"], row["key"]["op"], row["key"]["head_dim"]) for row in json.loads(out)]

    assert len(keys()) == 4
    assert keys("--gpu", "l4") == keys("--status", "kernel-stale") == [(L4.name, "fwd", 64)]
    assert keys("--op", "dq") == [(H100.name, "dq", 64)]
    assert keys("--head-dim", "80") == [(H100.name, "fwd", 80)]
    assert keys("--dtype", "bf16") == []
    header, *lines = run(capsys, "show", "--db", root, "--gpu", "h100")[1].splitlines()
    assert " ".join(header.split()) == "device problem config us interval gain apart error date status"
    assert all("64x32_w4_s2" in line and "1.25x" in line and "fresh" in line for line in lines)
    joint = saved(tmp_path / "joint", entry("fwd", NESTED, branch=(0, 1, 2), apart=90.5))
    assert " 1.25x  90.50  1.0e-04 " in run(capsys, "show", "--db", joint)[1]


def test_stale_entries_become_a_list_to_tune(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Knowing that something is stale, and not what to run."""
    old = entry(kernel="abcdefabcdef")
    root = saved(tmp_path / "db", old, entry("dq"), entry("dkdv", triton="3.5.1"))
    code, out, _ = run(capsys, "stale", "--db", root)
    assert code == 1
    assert out.startswith("1 ") and "1 kernel-stale" in out and "kernel abcdefabcdef, Triton 3.6.0, 2026-11-22" in out
    assert "dilated-attention tune --from-misses again.jsonl" in out
    again = tmp_path / "again.jsonl"
    run(capsys, "stale", "--db", root, "--problems", again)
    (problem,) = misses.read(again)
    assert ProblemKey.of(problem, "fwd", 0) == old.key
    assert run(capsys, "stale", "--db", saved(tmp_path / "fresh", entry()))[:2] == (0, "1 fresh\n")


def test_what_is_measured_again_is_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Another call of the same key: a new time beside an old one of half as many rows, a text without tails for one
    with them."""
    ragged = next(problem for problem in grid.calls() if problem.length % 3 and problem.head_dim == 64)
    root = saved(tmp_path / "db", entry("dq", ragged, kernel="abcdefabcdef"))
    again = tmp_path / "again.jsonl"
    run(capsys, "stale", "--db", root, "--problems", again)
    assert misses.read(again) == [ragged]


def test_the_digest_is_the_one_that_ranks_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two numbers for one thing."""
    import dilated_attention_pytorch as dap

    code, out, _ = run(capsys, "digest")
    assert (code, out.strip()) == (0, dap.db_digest())
    with dap.options(database=saved(tmp_path, entry())):
        mine = dap.db_digest()
    assert mine not in (dap.db_digest(), run(capsys, "digest", "--db", tmp_path)[1].strip())


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package whose user has measured something."""
    root = _layout._root()
    monkeypatch.setattr(_layout, "_root", lambda: root)
    monkeypatch.setattr(_layout, "is_checkout", lambda: False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    plans._own_database.cache_clear()
    _layout.own_db_dir().mkdir(parents=True)
    yield _layout.own_db_dir()
    plans._own_database.cache_clear()


def test_the_digest_tells_who_measured_for_himself(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    """Ranks of which one has a database of its own agree by their digests, and launch different kernels."""
    import dilated_attention_pytorch as dap

    came = database.load().digest()
    assert run(capsys, "digest")[1].strip() == dap.db_digest() == came  # an empty folder changes no launch
    saved(own, entry())
    assert run(capsys, "digest")[1].strip() == dap.db_digest() != came
    assert dap.db_digest() != run(capsys, "digest", "--db", own)[1].strip()
    with dap.options(database=own):
        assert dap.db_digest() == run(capsys, "digest")[1].strip()


def test_what_the_user_measured_is_shown(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    """An hour of tuning that serves every call, and that no command shows, calls stale or counts."""
    problem = WORKLOADS["core"].problem()
    mine = entry("fwd", problem)
    saved(own, replace(mine, key=replace(mine.key, order="none")), entry("dq", kernel="abcdefabcdef"))
    came = len(json.loads(run(capsys, "show", "--json", "--db", _layout.tune_db_dir())[1]))
    shown = json.loads(run(capsys, "show", "--json")[1])
    assert [row["key"]["op"] for row in shown if row["database"] == str(own)] == ["dq", "fwd"]
    assert len(shown) == came + 2
    lines = run(capsys, "show", "--gpu", "h100")[1].splitlines()
    assert lines[0] == f"{own}:" and f"{_layout.tune_db_dir()}:" in lines
    code, out, _ = run(capsys, "stale", "--json")
    stale = [row["key"]["op"] for row in json.loads(out)["stale"] if row["provenance"]["kernel"] == "abcdefabcdef"]
    assert (code, stale) == (1, ["dq"])
    told = json.loads(run(capsys, "coverage", "--gpu", "h100", "--workload", "core", "--json")[1])
    assert ledger.title(replace(mine.key, order="none")) not in told["entries"]["missing"]


def test_coverage_tells_measured_from_borrowed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A borrowed config that counts as measured hides what is to be tuned."""
    problem = WORKLOADS["gigapath"].problem()
    root = saved(tmp_path, entry("fwd", problem))
    saved(root, replace(entry("dq", problem), key=replace(entry("dq", problem).key, branches=((512, 1),))))
    code, out, _ = run(capsys, "coverage", "--gpu", "h200", "--workload", "gigapath", "--db", root, "--json")
    launches = json.loads(out)["workloads"]["gigapath"]
    rungs = {launch["key"]["op"]: launch["rung"] for launch in launches if launch["key"]["branches"] == [[1024, 1]]}
    assert (code, rungs) == (0, {"fwd": "silicon", "dkdv": "heuristic", "dq": "nearest"})
    assert json.loads(out)["measured_percent"] == pytest.approx(100 / len(launches))
    own = json.loads(run(capsys, "coverage", "--gpu", "h100", "--workload", "gigapath", "--db", root, "--json")[1])
    assert own["entries"]["asked"] - len(own["entries"]["missing"]) == 1
    assert ledger.title(replace(entry("fwd", problem).key, order="none")) not in own["entries"]["missing"]
    asked = ("coverage", "--gpu", "h200", "--workload", "gigapath", "--db", root)
    code, out, _ = run(capsys, *asked, "--fail-under", "50")
    assert code == 1
    assert f"of {len(launches)} launches measured" in out.splitlines()[-1]
    assert out.splitlines()[-2] == f"gigapath: 0 of {own['entries']['asked']} entries of nvidia-h200 are there"


def test_the_commands_of_the_documents_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that shows an option which is no more."""
    monkeypatch.undo()
    page = (_layout.tune_db_dir() / "README.md").read_text(encoding="utf-8")
    shown = [
        line.partition("#")[0].split()[2:] for line in page.splitlines() if line.startswith("dilated-attention db")
    ]
    assert {words[0] for words in shown} == {"check", "show", "coverage", "stale", "diff", "digest"}
    for words in shown:
        if "--compile" not in words:  # tests/test_tune_db.py compiles
            code, _, err = run(capsys, *words)
            assert (code in (0, 1), err) == (True, ""), words


# ---- diff ------------------------------------------------------------------------------------------------------------


def test_diff_shows_old_and_new(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A ratio the wrong way round sells a slower config as a faster one."""
    faster = entry(median=50.0, config=LaunchConfig(128, 64))
    old = saved(tmp_path / "old", entry(), entry("dq"), entry("dkdv"))
    new = saved(tmp_path / "new", faster, entry("dq"), entry("dq", replace(PROBLEM, causal=True)))
    code, out, _ = run(capsys, "diff", old, new, "--markdown")
    assert code == 0
    assert f"| {H100.name} | {ledger.title(faster.key)} | 64x32_w4_s2 | 100.00 | 128x64_w4_s2 | 50.00 | 0.500 |" in out
    assert "| 64x32_w4_s2 | 100.00 | - | - | - |" in out and "| - | - | 64x32_w4_s2 | 100.00 | - |" in out
    assert out.endswith("\n\n3 changed, 1 unchanged; new / old, geometric mean: 0.500\n")
    found = json.loads(run(capsys, "diff", old, new, "--json")[1])
    assert (found["unchanged"], [change["ratio"] for change in found["changes"]]) == (1, [None, None, 0.5])
    assert run(capsys, "diff", old, old)[1] == "0 changed, 3 unchanged\n"


def test_diff_tells_what_calls_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An entry whose configuration stays, and after which calls launch something else: a diff of nothing."""
    old, new = (saved(tmp_path / str(us), entry("fwd", NESTED, branch=(0, 1, 2), apart=us)) for us in (125.0, 80.0))
    out = run(capsys, "diff", old, new, "--markdown")[1]
    assert "| 64x32_w4_s2 | 100.00 | apart | 80.00 | 0.800 |" in out


def git(folder: Path, *words: object) -> str:
    name = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(
        ["git", *name, *map(str, words)], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a tune_db of one entry, which the package takes for its checkout."""
    git(tmp_path, "init", "-q", "-b", "main")
    saved(tmp_path / "tune_db", entry())
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    git(tmp_path, "add", ".gitattributes", "tune_db/sm_90")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(_layout, "tune_db_dir", lambda: tmp_path / "tune_db")
    return tmp_path


def test_diff_against_a_revision(capsys: pytest.CaptureFixture[str], checkout: Path) -> None:
    """A reviewer would have to check out both sides by hand."""
    saved(checkout / "tune_db", entry(median=200.0))
    assert "2.000" in run(capsys, "diff")[1]
    git(checkout, "commit", "-qam", "two")
    assert run(capsys, "diff")[1] == "0 changed, 1 unchanged\n"
    assert "0.500" in run(capsys, "diff", "HEAD", "HEAD~1")[1]
    code, _, err = run(capsys, "diff", "no-such-branch")
    assert (code, "'no-such-branch' is no folder and no git revision" in err) == (2, True)
    assert run(capsys, "diff", "--", "--output=x")[0] == 2


# ---- merge -----------------------------------------------------------------------------------------------------------


FASTER_APART_OR_NOT: tuple[dict[str, float], ...] = ({"median": 100.0, "apart": 80.0}, {"median": 99.0})


def medians(root: Path, on: device.Device = H100) -> dict[str, float]:
    found = contents(Database(root))
    return {key.op: measured.time_us.median for (_, name, key), measured in found.items() if name == on.name}


def test_merge_takes_the_measured_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two branches that tuned: whoever resolves the conflict by hand keeps one side whole, or mixes two entries."""
    ours = saved(tmp_path / "ours", entry(median=90.0), entry("dq", median=80.0, kernel="abcdefabcdef"))
    theirs = saved(tmp_path / "theirs", entry(median=70.0), entry("dq", median=99.0), entry("dkdv", median=60.0))
    saved(theirs, entry(median=50.0), on=L4)
    code, out, _ = run(capsys, "merge", ours, theirs)
    assert (code, out) == (0, f"4 files changed in {ours}\n")
    assert medians(ours) == {"fwd": 70.0, "dq": 99.0, "dkdv": 60.0}
    assert medians(ours, L4) == {"fwd": 50.0}
    assert run(capsys, "merge", ours, theirs)[1] == f"0 files changed in {ours}\n"


def test_merge_goes_by_what_calls_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A joint launch that is a little faster takes away the measurement after which something else is faster still."""
    apart, joint = (entry("fwd", NESTED, branch=(0, 1, 2), **times) for times in FASTER_APART_OR_NOT)
    for number, (ours, theirs) in enumerate([(apart, joint), (joint, apart)]):
        sides = [saved(tmp_path / f"{side}{number}", kept) for side, kept in (("ours", ours), ("theirs", theirs))]
        assert run(capsys, "merge", *sides)[0] == 0
        assert list(contents(Database(sides[0])).values()) == [apart]


def test_merge_from_a_base_keeps_what_was_removed_removed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without the base an entry that was deleted for good reason comes back from the other branch."""
    both = entry(), entry("dq"), entry("dkdv")
    base = saved(tmp_path / "base", *both)
    ours = saved(tmp_path / "ours", entry(median=300.0), both[2])
    theirs = saved(tmp_path / "theirs", *both[:2], entry("dkdv", median=200.0))
    assert run(capsys, "merge", base, ours, theirs)[0] == 0
    assert medians(ours) == {"fwd": 300.0, "dkdv": 200.0}


_times = st.sampled_from([90.0, 100.0, 110.0])
_entries = st.builds(
    lambda median, error, kernel, rows: entry(median=median, error=error, kernel=kernel, branches=((rows, 2),)),
    _times,
    st.sampled_from([1e-4, 6e-4]),
    st.sampled_from([KERNEL, "abcdefabcdef"]),
    st.sampled_from([128, 256]),
)
_sides = st.lists(_entries, max_size=3).map(lambda found: {("sm_90", H100.name, each.key): each for each in found})


@settings(max_examples=200, derandomize=True, deadline=None)
@given(_sides, _sides, _sides)
def test_a_merge_is_the_same_from_either_side(a, b, c) -> None:  # type: ignore[no-untyped-def]
    """Who merges whom decides what is launched: two maintainers end with different databases."""
    kernels = {KERNEL}
    assert merged(c, a, b, kernels) == merged(c, b, a, kernels)
    assert merged({}, a, a, kernels) == a
    one, two = merged({}, merged({}, a, b, kernels), c, kernels), merged({}, a, merged({}, b, c, kernels), kernels)
    assert one == two


def test_git_merges_with_it(checkout: Path) -> None:
    """A driver that git cannot run leaves conflict markers in the file, and every launch on a GPU fails."""
    command = f"{sys.executable} -m dilated_attention_pytorch.cli db merge %O %A %B"
    git(checkout, "config", "merge.tune_db.driver", f"env PYTHONPATH={ROOT / 'src'} {command}")
    for branch, median in {"a": 70.0, "b": 80.0}.items():
        git(checkout, "checkout", "-q", "-b", branch, "main")
        mine = entry(problem=replace(PROBLEM, causal=branch == "a", mask=True))
        saved(checkout / "tune_db", entry(median=median, config=LaunchConfig(32, 32)), mine)
        git(checkout, "commit", "-qam", branch)
    git(checkout, "merge", "-q", "-m", "both", "a")
    found = Database(checkout / "tune_db").entries("sm_90", H100.name, "fwd")
    assert {key.causal for key in found if "mask" in key.flags} == {True, False}
    assert found[entry().key].time_us.median == 70.0


def test_files_that_both_sides_added_are_joined(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Git gives an empty base for them, and names that no database has."""
    base, ours, theirs = (tmp_path / name for name in (".merge_file_O", ".merge_file_A", ".merge_file_B"))
    base.touch()
    ours.write_text(database.dump(H100.name, [entry(median=90.0)]))
    theirs.write_text(database.dump(H100.name, [entry(median=80.0), entry(grid=64)]))
    assert run(capsys, "merge", base, ours, theirs)[0] == 0
    assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize(
    ("sides", "complaint"),
    [
        (["one"], "merge takes OURS THEIRS or BASE OURS THEIRS, got 1 paths"),
        (["one/sm_90/nvidia-h100-80gb-hbm3/fwd.yaml", "nowhere.yaml"], "nowhere.yaml is no file"),
        (["one/sm_90/nvidia-h100-80gb-hbm3/fwd.yaml", "two/sm_89/nvidia-l4/fwd.yaml"], "merge files of one device"),
        (["one", "broken"], "merge was left unresolved"),
    ],
)
def test_what_cannot_be_merged_is_left_alone(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sides: list[str],
    complaint: str,
) -> None:
    """A merge that fails half-way must leave our side as it was, and tell git by its exit code."""
    monkeypatch.chdir(tmp_path)
    saved(Path("one"), entry())
    saved(Path("two"), entry(), on=L4)
    (path,) = Database(saved(Path("broken"), entry())).files()
    path.write_text(path.read_text() + "<<<<<<< ours\n")
    before = contents(Database(Path("one")))
    code, _, err = run(capsys, "merge", *sides)
    assert (code, complaint in err) == (2, True), err
    assert contents(Database(Path("one"))) == before
