"""Two databases side by side: what changed between them, and what they make of each other.

Both are pure functions of their contents. A merge does not depend on which side is called ours.
"""

from __future__ import annotations

import io
import math
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import _layout, database
from ..config import ProblemKey
from ..database import Database, Entry
from ..errors import DatabaseError

Place = tuple[str, str, ProblemKey]
"""Where an entry lies: architecture, device, key."""
Entries = Mapping[Place, Entry]


@dataclass(frozen=True)
class Change:
    """One place whose entry differs; None where a side has none."""

    place: Place
    old: Entry | None
    new: Entry | None

    @property
    def ratio(self) -> float | None:
        """New time over old, of what a call runs; None where a side has no entry."""
        if self.old is None or self.new is None:
            return None
        return self.new.time_us.dispatched / self.old.time_us.dispatched


def contents(found: Database) -> Entries:
    """Every entry of a database by its place.

    Raises:
        DatabaseError: A file breaks its schema.
    """
    return {
        (path.parent.parent.name, path.parent.name, key): entry
        for path in found.files()
        for key, entry in database.read(path).items()
    }


def changes(old: Entries, new: Entries) -> list[Change]:
    """What differs, by place."""
    pairs = ((place, old.get(place), new.get(place)) for place in sorted({*old, *new}))
    return [Change(place, before, after) for place, before, after in pairs if before != after]


def geometric_mean(found: Collection[Change]) -> float | None:
    """Of the ratios; None where no place has two times."""
    ratios = [change.ratio for change in found if change.ratio is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def merged(base: Entries, ours: Entries, theirs: Entries, kernels: Collection[str]) -> dict[Place, Entry]:
    """Both sides in one.

    An entry that one side alone changed since `base`, or removed, is as that side has it. Where both did, the better
    of the two stays, see `better`; an entry that one side removed and the other measured again stays.

    Args:
        base: What both started from; empty where that is not known, and then nothing counts as removed.
        ours: One side.
        theirs: The other.
        kernels: Hashes of the kernel texts that there are.
    """
    result: dict[Place, Entry] = {}
    for place in {*ours, *theirs}:
        before, mine, yours = base.get(place), ours.get(place), theirs.get(place)
        if mine == before or yours == before:
            kept = yours if mine == before else mine
        elif mine is None or yours is None:
            kept = mine or yours
        else:
            kept = better(mine, yours, kernels)
        if kept is not None:
            result[place] = kept
    return result


def better(a: Entry, b: Entry, kernels: Collection[str]) -> Entry:
    """The entry to keep of two for one problem, whichever is named first.

    One whose result was right goes before one that was wrong; one whose kernel text is still there before one of a text
    that is gone, since times of other texts say nothing of this one; then the shorter time of what a call would run,
    the launch or those that it stands in for; then one that tells of both; then the later day.
    """

    def rank(entry: Entry) -> tuple[bool, bool, float, bool]:
        wrong, times = entry.check.error > entry.check.tolerance, entry.time_us
        return wrong, entry.provenance.kernel not in kernels, times.dispatched, times.apart is None

    if rank(a) != rank(b):
        return min(a, b, key=rank)
    return max(a, b, key=lambda entry: (entry.provenance.date, repr(entry)))


def merge_folders(base: Path | None, ours: Path, theirs: Path) -> list[Path]:
    """Merges two databases into the first; other writers wait.

    Args:
        base: What both started from, or None.
        ours: The folder that is written to.
        theirs: The other.

    Returns:
        The files that changed, sorted.

    Raises:
        DatabaseError: A file breaks its schema, or `ours` cannot be written to.
    """
    kernels = database.rendered_kernels()
    with database.locked(ours):
        before, mine, yours = ({} if root is None else contents(database.load(root)) for root in (base, ours, theirs))
        files: dict[Path, list[Entry]] = {ours / a / name / f"{key.op}.yaml": [] for a, name, key in mine}
        for (arch, name, key), entry in merged(before, mine, yours, kernels).items():
            files.setdefault(ours / arch / name / f"{key.op}.yaml", []).append(entry)
        written = [path for path, found in sorted(files.items()) if database.write(path, path.parent.name, found)]
    database.load.cache_clear()
    return written


def merge_files(base: Path | None, ours: Path, theirs: Path) -> None:
    """Merges two files of one device into the first, wherever they lie; git calls it with temporary names.

    Args:
        base: What both started from; None, or an empty file, where they did not.
        ours: The file that is written to.
        theirs: The other.

    Raises:
        DatabaseError: A file breaks the schema, or they are of several devices.
    """
    found = [_file(path) for path in (base, ours, theirs)]
    names = {name for name, entries in found if entries}
    if len(names) > 1:
        raise DatabaseError(f"{ours} and {theirs} are of {' and '.join(sorted(names))}; merge files of one device")
    before, mine, yours = ({("", "", key): entry for key, entry in entries.items()} for _, entries in found)
    database.write(ours, found[1][0], merged(before, mine, yours, database.rendered_kernels()).values())


def _file(path: Path | None) -> tuple[str, Mapping[ProblemKey, Entry]]:
    if path is None or (path.exists() and not path.stat().st_size):
        return "", {}
    if not path.is_file():
        raise DatabaseError(f"{path} is no file; merge two files, or two folders")
    return database.read_as(path)


@contextmanager
def revision(name: str) -> Iterator[Path]:
    """A database folder by its path, or a git revision's tune_db, laid out for as long as the context lasts.

    Args:
        name: A folder, or what git takes for a commit of the checkout: a branch, a tag, `HEAD~1`.

    Raises:
        DatabaseError: It is neither.
    """
    if Path(name).is_dir():
        yield Path(name)
        return
    done = None
    if _layout.is_checkout() and not name.startswith("-"):
        command = ["git", "archive", "--format=tar", name, "tune_db"]
        done = subprocess.run(command, cwd=_layout.tune_db_dir().parent, capture_output=True, check=False)
    if done is None or done.returncode:
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0] if done else "this is no checkout"
        raise DatabaseError(f"{name!r} is no folder and no git revision with a tune_db ({reason}); name one of them")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            if stream is not None:
                path = Path(scratch, member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
        yield Path(scratch, "tune_db")
