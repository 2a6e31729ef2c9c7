"""The tuning database: measured launch configurations, read, looked up and saved. tune_db/README.md is its schema.

Files are read at the first lookup in their architecture and kept; importing this module reads nothing. A lookup is a
pure function of the problem's key, the device's facts and the files' bytes: it never times and never tunes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from . import _layout, device
from ._strict_yaml import Field
from ._strict_yaml import load as load_yaml
from .call_config import CallConfig
from .config import DTYPE_BYTES, EVERY_OP, FLAGS, GRID_CAP, SIZES, LaunchConfig, ProblemKey, round_rows
from .device import Device, Toolchain
from .errors import ConfigError, DatabaseError, MissingPackageError
from .source_hash import kernel_hash
from .variant import ORDERS, QUERIES

SCHEMA = 1
FOLD = 0.05
"""A time that moved by no more than this share is the old time: tuning again what is fine changes no file."""
NEAREST = 2.0
"""The largest distance at which a measurement of another problem still speaks for this one."""

TORCH = "torch"
"""In the place of a variant's name, where what was measured is the torch backend."""

FRESH, TOOLCHAIN_STALE, KERNEL_STALE, INVALID = "fresh", "toolchain-stale", "kernel-stale", "invalid"


@dataclass(frozen=True)
class Resources:
    """What the compiled kernel takes: bytes of shared memory a block, registers and spilled registers a thread."""

    shared_bytes: int
    registers: int
    spills: int


@dataclass(frozen=True)
class Times:
    """Microseconds of a launch: the median with its interval, of the untuned default and of the runner-up.

    `default` and `second` are None where the one did not run and where there was no other candidate. `apart` is of the
    launches that a joint one stands in for, one after the other, timed in turn with it; None where that was not timed.
    `cudnn` is of cuDNN's attention on strided views, in dK/dV's entry its whole backward; None where it was not timed.
    """

    median: float
    low: float
    high: float
    default: float | None
    second: float | None
    apart: float | None = None
    cudnn: float | None = None

    @property
    def gain(self) -> float:
        """The untuned default's time over the median; infinite where it did not run."""
        return math.inf if self.default is None else self.default / self.median

    @property
    def is_beaten(self) -> bool:
        """The launches that it stands in for are faster: they run in its place."""
        return self.apart is not None and self.median > self.apart

    @property
    def dispatched(self) -> float:
        """What a call takes: the launch, or what it stands in for if that is faster."""
        return self.median if self.apart is None else min(self.median, self.apart)


BESIDE = ("apart", "cudnn")
"""Times of others that a launch was timed beside: written where they are known."""


@dataclass(frozen=True)
class Check:
    """The relative error against the oracle, and the most that was allowed."""

    error: float
    tolerance: float


@dataclass(frozen=True)
class Provenance:
    """Where a measurement is from: hash of the kernel's text, versions, day (ISO), candidates raced."""

    kernel: str
    triton: str
    torch: str
    driver: str
    date: str
    candidates: int


@dataclass(frozen=True)
class Entry:
    """One measured winner with its evidence.

    Attributes:
        config: Of a kernel; on a CPU, of the torch backend's calls.
    """

    key: ProblemKey
    config: LaunchConfig | CallConfig
    resources: Resources
    time_us: Times
    check: Check
    provenance: Provenance

    @property
    def launch(self) -> LaunchConfig:
        """The configuration of a kernel."""
        assert isinstance(self.config, LaunchConfig), "`read` takes no other from a GPU's file"
        return self.config


@dataclass(frozen=True)
class Hit:
    """An entry that a rung of the lookup offers.

    Attributes:
        entry: The entry.
        device: The device it was measured on.
        distance: How far its key is from the one asked for; 0 for the same key.
        status: "fresh", "toolchain-stale", "kernel-stale" or "invalid", see `status`.
        measured_on: Variants whose text is still the one that was measured.
    """

    entry: Entry
    device: str
    distance: float
    status: str
    measured_on: tuple[str, ...]


# ---- Reading ---------------------------------------------------------------------------------------------------------


class Database:
    """One folder of measurements, `<arch>/<device>/<op>.yaml`.

    Args:
        root: The folder.
        kernels: Names the variants by the hash of their text; asked at the first hit.
    """

    def __init__(self, root: Path, kernels: Callable[[], Mapping[str, tuple[str, ...]]] | None = None) -> None:
        self.root = root
        self._kernels = kernels or rendered_kernels
        self._arches: dict[str, dict[str, dict[str, Mapping[ProblemKey, Entry]]]] = {}

    def devices(self, arch: str) -> tuple[str, ...]:
        """Devices of an architecture that have measurements, by name."""
        return tuple(self._arch(arch))

    def entries(self, arch: str, name: str, op: str) -> Mapping[ProblemKey, Entry]:
        """What was measured of `op` on a device, by key, in the order of the file."""
        return self._arch(arch).get(name, {}).get(op, {})

    @cached_property
    def kernels(self) -> Mapping[str, tuple[str, ...]]:
        """Variants by the hash of their text."""
        return self._kernels()

    def files(self) -> list[Path]:
        """Every file of measurements, sorted.

        Raises:
            DatabaseError: A YAML file lies where no lookup would ever find it.
        """
        found = sorted(path for path in self.root.rglob("*.y*ml") if not path.name.startswith("."))
        return [path for path in found if path != self.root / "devices.yaml" and self._is_measurements(path)]

    def digest(self) -> str:
        """Twelve hexadecimal digits of all bytes that a lookup depends on: equal on ranks that will agree.

        Raises:
            DatabaseError: A file cannot be read, or lies where no lookup would ever find it.
        """
        total = hashlib.sha256()
        for path in [self.root / "devices.yaml", *self.files()]:
            if path.exists():
                try:
                    content = path.read_bytes()
                except OSError as error:
                    raise DatabaseError(f"{path}:1: cannot be read: {error.strerror}; mend or remove it") from error
                total.update(f"{path.relative_to(self.root).as_posix()} {len(content)}\n".encode() + content)
        return total.hexdigest()[:12]

    def _is_measurements(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts
        if len(parts) != 3 or path.suffix != ".yaml" or path.stem not in EVERY_OP or device.slug(parts[1]) != parts[1]:
            raise DatabaseError(
                f"{path}:1: no lookup would find this file; name it <arch>/<device>/<op>.yaml with the op one of "
                f"{', '.join(EVERY_OP)} and the device in lower-case-with-dashes, or remove it"
            )
        return True

    def _arch(self, arch: str) -> dict[str, dict[str, Mapping[ProblemKey, Entry]]]:
        if arch not in self._arches:
            shelf: dict[str, dict[str, Mapping[ProblemKey, Entry]]] = {}
            for path in self.files():
                if path.parent.parent.name == arch:
                    shelf.setdefault(path.parent.name, {})[path.stem] = read(path)
            self._arches[arch] = shelf
        return self._arches[arch]


@lru_cache(maxsize=16)
def load(root: Path | None = None) -> Database:
    """The database in a folder, or the committed one; kept for the process.

    Raises:
        DatabaseError: There is no such folder.
    """
    root = _layout.tune_db_dir() if root is None else root
    if not root.is_dir():
        raise DatabaseError(f"{root} is no folder; a tuning database is one that holds <arch>/<device>/<op>.yaml")
    return Database(root)


@lru_cache
def rendered_kernels() -> Mapping[str, tuple[str, ...]]:
    """The committed variants by the hash of their text, and the torch backend by its own, under `TORCH`."""
    names: dict[str, tuple[str, ...]] = {}
    for path in sorted(_layout.generated_dir().glob("*.py")):
        digest = kernel_hash(path.read_text(encoding="utf-8"))
        names[digest] = (*names.get(digest, ()), path.stem)
    backend = sorted((Path(__file__).parent / "runtime").glob("torch_*.py"))
    return names | {kernel_hash("".join(path.read_text(encoding="utf-8") for path in backend)): (TORCH,)}


def read(path: Path) -> Mapping[ProblemKey, Entry]:
    """The entries of one file by key.

    Raises:
        DatabaseError: The file breaks its schema; the message names file, line and remedy.
    """
    return read_as(path, path.parent.name, path.stem)[1]


def read_as(path: Path, name: str | None = None, op: str | None = None) -> tuple[str, Mapping[ProblemKey, Entry]]:
    """The device and the entries of one file, wherever it lies.

    Args:
        path: The file.
        name: The device it must be of; None takes any.
        op: What it must measure; None takes any.

    Raises:
        DatabaseError: As `read`.
    """
    root = load_yaml(path)
    if (found := root.mapping().get("schema")) is not None and found.integer(1) > SCHEMA:
        raise found.error(f"is {found.integer()}, newer than the {SCHEMA} read here", "upgrade this package")
    top = root.fields(("schema", "device", "entries"))
    measured_on = top["device"].text()
    if name not in (None, measured_on):
        raise top["device"].error(f"is {measured_on}, in the folder {name}", "move the file")
    entries: dict[ProblemKey, Entry] = {}
    for item in top["entries"].items():
        entry = _entry(item)
        if name is not None and (path.parent.parent.name == device.CPU) != isinstance(entry.config, CallConfig):
            kinds = "calls of the torch backend lie under cpu, launches of kernels under their architecture"
            raise item.error(f"has the config {entry.config.name}; {kinds}", "move it, or tune it again")
        if op not in (None, entry.key.op):
            raise item.error(f"measures {entry.key.op} in {path.name}", f"move it to {entry.key.op}.yaml")
        if entry.key in entries:
            raise item.error("has the key of an earlier entry", "keep the one that was measured last")
        entries[entry.key] = entry
    return measured_on, entries


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _entry(item: Field) -> Entry:
    found = item.fields(_names(Entry))
    key, times = _key(found["key"]), _times(found["time_us"])
    if times.apart is not None and not key.is_joint:
        raise found["time_us"].error("has apart, and its launch stands in for no others", "remove apart")
    return Entry(
        key=key,
        config=_config(found["config"]),
        resources=Resources(**{name: f.integer() for name, f in found["resources"].fields(_names(Resources)).items()}),
        time_us=times,
        check=Check(**{name: f.number() for name, f in found["check"].fields(_names(Check)).items()}),
        provenance=_provenance(found["provenance"]),
    )


def _key(item: Field) -> ProblemKey:
    found = item.fields(_names(ProblemKey))
    key = ProblemKey(
        op=found["op"].word(EVERY_OP),
        dtype=found["dtype"].word(tuple(DTYPE_BYTES)),
        head_dim=found["head_dim"].integer(8),
        branches=tuple(_pair(pair) for pair in found["branches"].items()),
        queries=found["queries"].word(QUERIES),
        order=found["order"].word(ORDERS),
        causal=found["causal"].truth(),
        flags=tuple(flag.word(FLAGS) for flag in found["flags"].items()),
        grid=found["grid"].integer(1),
    )
    if not key.branches:
        raise found["branches"].error("is empty", "name at least one [rows, stride] pair")
    if list(key.flags) != sorted(set(key.flags)):
        raise found["flags"].error("must be sorted, each flag once", "no lookup finds the entry otherwise")
    if key.grid & (key.grid - 1) or key.grid > GRID_CAP:
        raise found["grid"].error(
            f"must be a power of two up to {GRID_CAP}, got {key.grid}", "no lookup finds it otherwise"
        )
    return key


def _pair(item: Field) -> tuple[int, int]:
    values = [value.integer(1) for value in item.items()]
    if len(values) != 2:
        raise item.error(f"must be a [rows, stride] pair, got {len(values)} values", "write two integers")
    rows, stride = values
    if rows != round_rows(rows):
        raise item.error(f"has {rows} rows; keys hold {round_rows(rows)}", "no lookup finds the entry otherwise")
    return rows, stride


def _config(item: Field) -> LaunchConfig | CallConfig:
    try:
        return _call_config(item) if "rows" in item.mapping() else _launch_config(item)
    except ConfigError as error:
        raise item.error(f"cannot be launched: {error}", "tune the entry again, or remove it") from error


def _call_config(item: Field) -> CallConfig:
    found = item.fields(_names(CallConfig))
    return CallConfig(found["rows"].text(), found["pairs"].integer(1), found["share"].integer(1))


def _launch_config(item: Field) -> LaunchConfig:
    found = item.fields(SIZES, tuple(name for name in _names(LaunchConfig) if name not in SIZES))
    words: dict[str, Callable[[Field], Any]] = {"loads": Field.text}
    return LaunchConfig(**{name: words.get(name, partial(Field.integer, at_least=1))(f) for name, f in found.items()})


def _times(item: Field) -> Times:
    found = item.fields(tuple(name for name in _names(Times) if name not in BESIDE), BESIDE)
    times = Times(
        **{name: found[name].number() for name in ("median", "low", "high", *BESIDE) if name in found},
        **{name: found[name].optional(Field.number) for name in ("default", "second")},
    )
    if not 0 < times.low <= times.median <= times.high:
        raise item.error("must hold 0 < low <= median <= high", "measure again")
    for name in BESIDE:
        if name in found and not getattr(times, name) > 0:
            raise found[name].error(f"must be above 0, got {getattr(times, name):g}", "measure again")
    return times


def _provenance(item: Field) -> Provenance:
    found = item.fields(_names(Provenance))
    kernel, triton, torch, driver, date = (found[name].text(quoted=True) for name in _names(Provenance)[:-1])
    return Provenance(kernel, triton, torch, driver, date, found["candidates"].integer(1))


# ---- Looking up ------------------------------------------------------------------------------------------------------


def status(entry: Entry, arch: str, toolchain: Toolchain, kernels: Mapping[str, tuple[str, ...]]) -> str:
    """How far an entry can be trusted today; computed, never stored.

    - "invalid": its result was wrong, or it takes more shared memory than its architecture has. Never used.
    - "kernel-stale": no committed kernel has the text that was measured. A search may start from it; a lookup falls
      back to it when there is nothing better.
    - "toolchain-stale": measured with another Triton. Used, and said.
    - "fresh": none of these.
    """
    too_big = entry.resources.shared_bytes > device.SHARED_BYTES.get(arch, entry.resources.shared_bytes)
    if too_big or entry.check.error > entry.check.tolerance:
        return INVALID
    if entry.provenance.kernel not in kernels:
        return KERNEL_STALE
    compiled = arch != device.CPU and toolchain.triton not in (None, "unknown")
    if compiled and entry.provenance.triton != toolchain.triton:
        return TOOLCHAIN_STALE
    return FRESH


def distance(a: ProblemKey, b: ProblemKey) -> float | None:
    """How far apart two problems are in log space, or None where they differ in kind.

    Mean over branches of |Δlog2 rows| + ½·|Δlog2 stride|, plus ¼·|Δlog2 grid|, plus ¼ between bf16 and fp16, for which
    the same picks win. Kind is everything else.
    """
    kinds = [
        (k.op, DTYPE_BYTES[k.dtype], k.head_dim, k.queries, k.order, k.causal, k.flags, len(k.branches)) for k in (a, b)
    ]
    if kinds[0] != kinds[1]:
        return None
    pairs = [
        abs(math.log2(rows_a / rows_b)) + abs(math.log2(stride_a / stride_b)) / 2
        for (rows_a, stride_a), (rows_b, stride_b) in zip(a.branches, b.branches, strict=True)
    ]
    # Rounded, so that one octave up and one octave down are a tie and not a matter of the last bit.
    other = (abs(math.log2(a.grid / b.grid)) + (a.dtype != b.dtype)) / 4
    return round(sum(pairs) / len(pairs) + other, 9)


@dataclass(frozen=True)
class Lookup:
    """One question to the database. Each rung answers with its hits, best first.

    Attributes:
        key: The problem asked about.
        device: The device that will run it.
        toolchain: What will compile it.
        committed: The database in git.
        overlay: The user's own, which goes before it.
    """

    key: ProblemKey
    device: Device
    toolchain: Toolchain
    committed: Database
    overlay: Database | None = None

    def in_overlay(self) -> list[Hit]:
        """The user's entry for this key and device."""
        return [hit for source, hit in self._same_key([self.device.name]) if source is self.overlay]

    def exact(self) -> list[Hit]:
        """The committed entry for this key and device."""
        return [hit for source, hit in self._same_key([self.device.name]) if source is self.committed]

    def same_silicon(self) -> list[Hit]:
        """Entries for this key on other devices of the chip."""
        return [hit for _, hit in self._same_key(self._kin())]

    def nearest(self) -> list[Hit]:
        """Entries for keys within `NEAREST` on this device and others of its chip."""
        return self._near([self.device.name, *self._kin()], exact=False)

    def other_device(self) -> list[Hit]:
        """Entries for this key or one within `NEAREST` on devices of the architecture with another chip."""
        return self._near([n for n in self._devices() if n != self.device.name and n not in self._kin()], exact=True)

    def stale(self) -> list[Hit]:
        """What the rungs above found, but measured on a kernel text that is no more."""
        rungs = (self.in_overlay, self.exact, self.same_silicon, self.nearest, self.other_device)
        return [hit for rung in rungs for hit in rung() if hit.status == KERNEL_STALE]

    def _sources(self) -> list[Database]:
        return [self.committed] if self.overlay is None else [self.overlay, self.committed]

    def _devices(self) -> list[str]:
        return sorted({name for source in self._sources() for name in source.devices(self.device.arch)})

    def _kin(self) -> list[str]:
        known = device.known()
        return [
            name
            for name in self._devices()
            if name != self.device.name and name in known and known[name].silicon == self.device.silicon
        ]

    def _same_key(self, names: Iterable[str]) -> Iterator[tuple[Database, Hit]]:
        for name in names:
            for source in self._sources():
                entry = source.entries(self.device.arch, name, self.key.op).get(self.key)
                if entry is not None:
                    yield source, self._hit(source, entry, name, 0.0)

    def _near(self, names: list[str], *, exact: bool) -> list[Hit]:
        """Hits by distance; ties go to the smaller problem, then in the order of `names`, then to the overlay."""
        ranked: list[tuple[tuple[float, ProblemKey, int], Hit]] = []
        for place, name in enumerate(names):
            for source in self._sources():
                for key, entry in source.entries(self.device.arch, name, self.key.op).items():
                    away = distance(self.key, key)
                    if away is not None and (away > 0 or exact) and away <= NEAREST:
                        ranked.append(((away, key, place), self._hit(source, entry, name, away)))
        return [hit for _, hit in sorted(ranked, key=lambda pair: pair[0])]

    def _hit(self, source: Database, entry: Entry, name: str, away: float) -> Hit:
        state = status(entry, self.device.arch, self.toolchain, source.kernels)
        return Hit(entry, name, away, state, source.kernels.get(entry.provenance.kernel, ()))


# ---- Saving ----------------------------------------------------------------------------------------------------------


def save(measured_on: Device, entries: Iterable[Entry], root: Path | None = None) -> list[Path]:
    """Folds measurements into a database. Writers that come at once wait for each other and lose nothing.

    Args:
        measured_on: The device they were taken on.
        entries: Winners; of two with one key the later counts.
        root: The database's folder, made where absent; None is the committed one.

    Returns:
        The files whose content changed, sorted.

    Raises:
        DatabaseError: A file that would be changed breaks the schema, or cannot be written.
        MissingPackageError: filelock is not installed.
    """
    root = _layout.tune_db_dir() if root is None else root
    by_op: dict[str, list[Entry]] = {}
    for entry in entries:
        by_op.setdefault(entry.key.op, []).append(entry)
    written = []
    with locked(root):
        for op, found in sorted(by_op.items()):
            path = root / measured_on.arch / measured_on.name / f"{op}.yaml"
            merged = dict(read(path)) if path.exists() else {}
            for entry in found:
                merged[entry.key] = fold(merged.get(entry.key), entry)
            if write(path, measured_on.name, merged.values()):
                written.append(path)
    load.cache_clear()
    return written


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps other writers out of a database's folder, which is made where absent.

    One lock for the folder: the time to rewrite a file is nothing against the time to measure an entry.

    Raises:
        DatabaseError: The folder cannot be written to, or the disk is full; no file has changed but those written.
        MissingPackageError: filelock is not installed.
    """
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingPackageError(
            "to save measurements takes filelock: pip install 'dilated-attention-kernels[tune]'"
        ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            yield
    except OSError as error:
        raise DatabaseError(
            f"{root} cannot be written to: {error.strerror or error}; what it held is as it was. Mend that, "
            f"or save to another folder"
        ) from error


def write(path: Path, name: str, entries: Iterable[Entry]) -> bool:
    """Writes one file, all or nothing: no reader, and no writer killed half-way, ever leaves or sees half of it.

    Args:
        path: The file; a database's folder is to be `locked`.
        name: The device.
        entries: What it is to hold.

    Returns:
        Whether its content changed.
    """
    text = dump(name, entries)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    return True


def fold(old: Entry | None, new: Entry) -> Entry:
    """The entry to keep: the old one where config, kernel and Triton are the same and no time moved by more than 5 %.

    The times are the launch's, and of what it was timed beside: an entry that has learned of that is new.
    """
    if old is None or any(getattr(new.time_us, n) and not getattr(old.time_us, n) for n in BESIDE):
        return new
    same = (old.config, old.provenance.kernel, old.provenance.triton) == (
        new.config,
        new.provenance.kernel,
        new.provenance.triton,
    )
    pairs = [(getattr(old.time_us, name), getattr(new.time_us, name)) for name in ("median", *BESIDE)]
    moved = max(abs(after - before) / before for before, after in pairs if before and after)
    return old if same and moved <= FOLD else new


def dump(name: str, entries: Iterable[Entry]) -> str:
    """The text of one file: entries sorted by key, one block each, numbers in fixed precision."""
    sorted_entries = sorted(entries, key=lambda entry: entry.key)
    blocks = [f"schema: {SCHEMA}\ndevice: {name}\nentries:{'' if sorted_entries else ' []'}\n"]
    for entry in sorted_entries:
        times = {k: None if v is None else f"{v:.2f}" for k, v in asdict(entry.time_us).items()}
        times = {name: taken for name, taken in times.items() if taken is not None or name not in BESIDE}
        check = {k: f"{v:.2e}" for k, v in asdict(entry.check).items()}
        versions = {k: json.dumps(v) if isinstance(v, str) else v for k, v in asdict(entry.provenance).items()}
        blocks.append(
            f"- key: {_flow(asdict(entry.key))}\n"
            f"  config: {_flow(entry.config.to_dict())}\n"
            f"  resources: {_flow(asdict(entry.resources))}\n"
            f"  time_us: {_flow(times)}\n"
            f"  check: {_flow(check)}\n"
            f"  provenance: {_flow(versions)}\n"
        )
    return "".join(blocks)


def _flow(value: object) -> str:
    """A value in YAML's flow style. Strings are written as they are: the caller quotes what needs it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
