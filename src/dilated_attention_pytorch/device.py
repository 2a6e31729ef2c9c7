"""What GPU is this, and what compiles for it: the one module that asks, and only when asked.

Everything else takes a `Device` as an argument. So a laptop can answer what an L4 would run (`simulated`), and ranks
on equal devices come to equal answers. Nothing here imports torch before `current` is called.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _layout, _strict_yaml
from .errors import UnknownDeviceError

if TYPE_CHECKING:
    import torch

SHARED_BYTES = {
    "sm_75": 65_536,
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_87": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "sm_121": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
"""Shared memory that one block may ask for, in bytes, where torch does not report it."""

LEAST_SHARED_BYTES = 49_152
"""What every CUDA GPU grants a block without being asked: the limit of an architecture that is not in the table."""

THREADS = 1024
"""Threads that one block may have, on every GPU we know."""

_TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")


@dataclass(frozen=True)
class Device:
    """Facts about one GPU model that a choice of kernel may depend on.

    Attributes:
        name: Slug of the name that the driver reports, such as `nvidia-h100-80gb-hbm3`.
        arch: What Triton compiles for: `sm_90`, `gfx942`, ….
        sms: Streaming multiprocessors (compute units on AMD; of one die where the driver shows dies).
        shared_bytes: Shared memory that one block may use, in bytes.
        l2_bytes: Level-2 cache in bytes; 0 where unknown.
        bandwidth: Memory bandwidth in GB/s (10^9 bytes); 0 where unknown.
        warp_size: Threads a warp.
        silicon: The chip. Devices of one chip differ in clocks, memory and enabled SMs, and share measurements.
        aliases: Other names that lead to this device.
    """

    name: str
    arch: str
    sms: int
    shared_bytes: int
    l2_bytes: int = 0
    bandwidth: float = 0.0
    warp_size: int = 32
    silicon: str = ""
    aliases: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        if self.arch == CPU:
            return f"{self.name} ({self.sms} cores)"
        facts = [self.arch, f"{self.sms} SMs", f"{self.shared_bytes:,} bytes of shared memory a block"]
        facts += [f"L2 {self.l2_bytes / 2**20:.4g} MiB"] if self.l2_bytes else []
        facts += [f"{self.bandwidth:g} GB/s"] if self.bandwidth else []
        return f"{self.name} ({', '.join(facts)})"


INTERPRETER = Device(name="interpreter", arch="interpreter", sms=1, shared_bytes=1 << 30)
"""Triton's interpreter on CPU tensors: no limit of a GPU holds there."""


CPU = "cpu"
"""The architecture of a processor, on which the torch backend runs."""


@dataclass(frozen=True)
class Toolchain:
    """What would compile a kernel in this process.

    Attributes:
        triton: Its version without a local suffix, such as "3.6.0"; None where it is not installed.
        interpret: `TRITON_INTERPRET=1` is set: kernels run on CPU tensors.
    """

    triton: str | None
    interpret: bool = False

    @classmethod
    def current(cls) -> Toolchain:
        """This process's. Triton itself is not imported."""
        return cls(_triton_version(), os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes"))


@lru_cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    for name in _TRITON_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def slug(name: str) -> str:
    """A driver's name as file names and database keys spell it: "NVIDIA L40S" -> "nvidia-l40s"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@lru_cache
def cpu() -> Device:
    """This machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    name = slug(next(models, "")) or slug(platform.processor()) or CPU
    return Device(name, CPU, sms=os.cpu_count() or 1, shared_bytes=0)


def current(where: torch.device | int | None = None) -> Device | None:
    """The GPU behind a torch device, or None for a CPU and where torch sees no GPU.

    A GPU that is in `tune_db/devices.yaml` is that device; SMs and shared memory are the driver's (a MIG slice has
    fewer SMs). Any other is described by torch's properties alone. The answer is kept for the process.

    Args:
        where: A torch device, an index, or None for the current GPU.
    """
    import torch

    if isinstance(where, torch.device):
        if where.type != "cuda":
            return None
        where = where.index
    if not torch.cuda.is_available():
        return None
    return _query(torch.cuda.current_device() if where is None else where)


@lru_cache
def _query(index: int) -> Device:
    import torch

    return described(torch.cuda.get_device_properties(index), known())


def described(properties: Any, devices: Mapping[str, Device]) -> Device:
    """The device that torch's properties speak of, with what `devices` knows about it.

    Args:
        properties: What `torch.cuda.get_device_properties` returns.
        devices: Devices by name.
    """
    amd = getattr(properties, "gcnArchName", "").startswith("gfx")
    arch = properties.gcnArchName.partition(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
    name = slug(properties.name)
    reported = getattr(properties, "shared_memory_per_block_optin", 0)
    shared = reported or SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)
    for device in devices.values():
        if device.arch == arch and name in (device.name, *device.aliases):
            return replace(device, sms=properties.multi_processor_count, shared_bytes=shared)
    # Two transfers a clock; kHz times bytes is 10^3 bytes a second.
    bandwidth = 2 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8 / 1e6
    return Device(
        name=name,
        arch=arch,
        sms=properties.multi_processor_count,
        shared_bytes=shared,
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        bandwidth=bandwidth,
        warp_size=getattr(properties, "warp_size", 64 if amd else 32),
        silicon=name,
    )


def simulated(name: str) -> Device:
    """A GPU of `tune_db/devices.yaml` by name or alias, whether or not this machine has it.

    Raises:
        UnknownDeviceError: It is not in the file.
    """
    wanted = slug(name)
    names: dict[str, Device] = {}
    for device in known().values():
        names.update(dict.fromkeys((device.name, *device.aliases), device))
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(sorted(known()))}"
    raise UnknownDeviceError(f"{name!r} is no device of tune_db/devices.yaml; {hint}")


def known() -> Mapping[str, Device]:
    """The devices of `tune_db/devices.yaml` by name."""
    return read(_layout.tune_db_dir() / "devices.yaml")


@lru_cache
def read(path: Path) -> Mapping[str, Device]:
    """The devices of one file by name.

    Raises:
        DatabaseError: The file breaks its format; the message names file, line and remedy.
    """
    devices: dict[str, Device] = {}
    owners: dict[str, str] = {}
    for item in _strict_yaml.load(path).fields(("schema", "devices"))["devices"].items():
        device = _device(item)
        for name in (device.name, *device.aliases):
            if name != slug(name):
                raise item.error(f"has the name {name!r}", f"write it as {slug(name)!r}")
            if name in owners:
                raise item.error(f"claims {name!r}, which names {owners[name]} already", "a name leads to one device")
            owners[name] = device.name
        devices[device.name] = device
    return devices


def _device(item: _strict_yaml.Field) -> Device:
    required = ("name", "arch", "silicon", "sms", "shared_bytes", "l2_bytes", "bandwidth", "source")
    fields = item.fields(required, ("warp_size", "aliases"))
    fields["source"].text()
    return Device(
        name=fields["name"].text(),
        arch=fields["arch"].text(),
        sms=fields["sms"].integer(1),
        shared_bytes=fields["shared_bytes"].integer(1),
        l2_bytes=fields["l2_bytes"].integer(1),
        bandwidth=fields["bandwidth"].number(),
        warp_size=fields["warp_size"].integer(1) if "warp_size" in fields else 32,
        silicon=fields["silicon"].text(),
        aliases=tuple(alias.text() for alias in fields["aliases"].items()) if "aliases" in fields else (),
    )
