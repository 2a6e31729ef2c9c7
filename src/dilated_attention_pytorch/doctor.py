"""What is installed here, what works, and what to do about the rest. Nothing is launched."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import __version__, _layout, database, generated
from . import device as devices
from .config import OPS, Problem
from .device import Device, Toolchain
from .errors import DatabaseError
from .runtime.digest import db_digest
from .runtime.options import DEFAULTS
from .runtime.plan import overlay_of
from .runtime.refusals import refusals

DISTRIBUTION = "dilated-attention-kernels"
PACKAGE = "dilated_attention_pytorch"


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        facts: (part, name, value), in reading order.
        complaints: (what is wrong, what to do).
    """

    facts: tuple[tuple[str, str, str], ...]
    complaints: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """For a person: aligned facts by part, then complaints with their remedies."""
        width = max(len(name) for _, name, _ in self.facts)
        lines: list[str] = []
        part = ""
        for of, name, value in self.facts:
            lines += [] if of == part else ["", of]
            part = of
            lines.append(f"  {name:{width}}  {value}")
        lines += ["", "to mend" if self.complaints else "nothing to mend"]
        for problem, remedy in self.complaints:
            lines += [f"  - {problem}", f"    {remedy}"]
        return "\n".join(lines).strip()


def examine() -> Report:
    """Looks at versions, GPUs, backends, generated kernels, the tuning database and packages of the same name."""
    facts: list[tuple[str, str, str]] = []
    complaints: list[tuple[str, str]] = []
    toolchain = Toolchain.current()
    found = _gpus(complaints)
    facts += [("versions", name, value) for name, value in _versions(toolchain)]
    facts += [("GPUs", name, value) for name, value in _gpu_facts(found)]
    facts += [("backends", name, value) for name, value in _backends(found, toolchain, complaints)]
    facts += [("artifacts", "kernels", _kernels(complaints))]
    facts += [("artifacts", name, value) for name, value in _database(found, toolchain, complaints)]
    complaints += _impostors()
    return Report(tuple(facts), tuple(complaints))


def _versions(toolchain: Toolchain) -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield DISTRIBUTION, f"{__version__} from {Path(__file__).parent}"
    yield "torch", _version("torch") or "not installed"
    yield "triton", (toolchain.triton or "not installed") + (" (interpreter on)" if toolchain.interpret else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus(complaints: list[tuple[str, str]]) -> list[Device]:
    try:
        import torch
    except ImportError as error:
        complaints.append((f"torch cannot be imported: {error}", "pip install torch"))
        return []
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count())
        return [device for device in map(devices.current, indices) if device is not None]
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        complaints.append(
            (
                f"this machine has an NVIDIA driver, and torch {torch.__version__} is a build for CPUs",
                "install a CUDA build of torch, see https://pytorch.org/get-started/locally",
            )
        )
    return []


def _gpu_facts(found: list[Device]) -> Iterator[tuple[str, str]]:
    for index, device in enumerate(found):
        listed = "" if device.name in devices.known() else ", not in tune_db/devices.yaml"
        yield f"cuda:{index}", f"{device}{listed}"
    if not found:
        yield "none", "torch sees no GPU; `dilated-attention explain --gpu l4 --workload longnet` simulates one"


def _backends(
    found: list[Device], toolchain: Toolchain, complaints: list[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    usual = Problem("fp16", batch=1, length=1024, heads=8, kv_heads=8, head_dim=64, branches=((1024, 1),))
    places: list[tuple[str, Device | None]] = [(f"cuda:{index}", device) for index, device in enumerate(found)]
    for name, device in places or [("CPU", None)]:
        reasons = () if device is None and toolchain.interpret else refusals(usual, device, toolchain)
        yield f"triton, {name}", "no: " + "; ".join(reasons) if reasons else "yes"
        if device is not None:
            complaints += [
                (f"the kernels do not run on {name}: {reason}", "calls run on the torch backend until then")
                for reason in reasons
            ]
    yield "torch", "no: torch is not installed" if _version("torch") is None else "yes: CPU and GPU, every dtype"


def _kernels(complaints: list[tuple[str, str]]) -> str:
    names = generated.names()
    if "general" not in names:
        complaints.append(
            (
                f"the generated kernels are not in {_layout.generated_dir()}",
                "in a checkout, run `python -m codegen`; else install the package again",
            )
        )
    return f"{len(names)} modules in {_layout.generated_dir()}"


def _database(
    found: list[Device], toolchain: Toolchain, complaints: list[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    try:
        committed, own = database.load(), overlay_of(DEFAULTS)
        yield "database", f"{committed.root}, digest {db_digest()}, {len(committed.files())} files"
        if own is not None:
            yield "your own", f"{own.root}, {len(own.files())} files"
        for device in dict.fromkeys(found):
            counts: dict[str, int] = {}
            for op in OPS:
                entries = [source.entries(device.arch, device.name, op) for source in (committed, own) if source]
                for entry in ChainMap(*map(dict, reversed(entries))).values():
                    state = database.status(entry, device.arch, toolchain, committed.kernels)
                    counts[state] = counts.get(state, 0) + 1
            text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            yield f"tuned for {device.name}", text or "nothing: its calls take what was measured nearby, or defaults"
    except DatabaseError as error:
        complaints.append((f"the tuning database cannot be read: {error}", "until then every launch on a GPU fails"))


def _impostors() -> list[tuple[str, str]]:
    """Other packages that answer to this package's import name."""
    complaints = [
        (
            f"the distribution {name} installs the name {PACKAGE} too; in one folder the files of both mix",
            f"pip uninstall {name}, then pip install --force-reinstall --no-deps {DISTRIBUTION}",
        )
        for name in sorted(set(importlib.metadata.packages_distributions().get(PACKAGE, ())) - {DISTRIBUTION})
    ]
    ours = Path(__file__).resolve().parent
    folders = {(Path(entry) / PACKAGE).resolve() for entry in sys.path}
    for folder in sorted(folders - {ours}):
        if (folder / "__init__.py").is_file():
            complaints.append(
                (f"{folder} is another package {PACKAGE}; this one is {ours}", "remove one of them from sys.path")
            )
    return complaints
