"""What measures: the facts that a journal's run and an entry's provenance tell."""

from __future__ import annotations

import hashlib
import subprocess
from datetime import datetime, timezone
from importlib import metadata

from .. import database
from ..device import CPU, INTERPRETER, Device, Toolchain
from .journal import Run


def run_row(device: Device, command: str) -> Run:
    """The first line of a run on a device."""
    gpu = device.arch not in (CPU, INTERPRETER.arch)
    return Run(
        device=device.name,
        arch=device.arch,
        sms=device.sms,
        shared_bytes=device.shared_bytes,
        bandwidth=device.bandwidth or None,
        triton=None if device.arch == CPU else Toolchain.current().triton,
        torch=metadata.version("torch"),
        driver=driver() if gpu else None,
        command=command,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kernels=kernels_digest(),
    )


def driver() -> str:
    """The GPU's driver; "unknown" where its tool does not tell."""
    for command in (
        ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        ("rocm-smi", "--showdriverversion", "--csv"),
    ):
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if lines := output.strip().splitlines():
            return lines[0] if command[0] == "nvidia-smi" else lines[-1].rpartition(",")[2]
    return "unknown"


def kernels_digest() -> str:
    """Twelve hexadecimal digits of all kernels' texts."""
    texts = sorted((name, digest) for digest, names in database.rendered_kernels().items() for name in names)
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]
