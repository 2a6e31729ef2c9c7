"""The doctor: what is here, what is wrong with it, and what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dilated_attention_pytorch import _layout, database, device, doctor
from dilated_attention_pytorch.device import Toolchain

from .measurements import database_at, entry


def facts(report: doctor.Report) -> dict[str, str]:
    return {f"{part}: {name}": value for part, name, value in report.facts}


def complaints(report: doctor.Report) -> str:
    return "\n".join(f"{problem} -> {remedy}" for problem, remedy in report.complaints)


def test_versions_backends_and_artifacts_are_named() -> None:
    """A bug report without them cannot be answered."""
    report = doctor.examine()
    found = facts(report)
    assert {"versions: python", "versions: torch", "versions: triton", "backends: torch"} <= found.keys()
    assert str(_layout.generated_dir()) in found["artifacts: kernels"]
    assert f"digest {database.load().digest()}" in found["artifacts: database"]
    assert all(value in report.text() for value in found.values())


def test_another_distribution_of_the_same_import_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """fkodom's dilated-attention-pytorch installs the same folder: the files of both mix, in silence."""
    named = {doctor.PACKAGE: ["dilated-attention-kernels", "dilated-attention-pytorch"]}
    monkeypatch.setattr(doctor.importlib.metadata, "packages_distributions", lambda: named)
    assert "pip uninstall dilated-attention-pytorch" in complaints(doctor.examine())


def test_another_copy_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkout and an installation side by side: one edits one and runs the other."""
    assert str(tmp_path) not in complaints(doctor.examine())
    other = tmp_path / doctor.PACKAGE
    other.mkdir()
    (other / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert f"{other} is another package" in complaints(doctor.examine())


def test_missing_kernels_are_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel built without its artifacts runs on the torch backend, ten times slower, and says nothing."""
    monkeypatch.setattr(doctor.generated, "names", frozenset)
    assert "python -m codegen" in complaints(doctor.examine())


def test_a_broken_database_is_a_complaint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The doctor must not die of the illness."""
    (tmp_path / "sm_90").mkdir()
    (tmp_path / "sm_90" / "fwd.yaml").touch()
    monkeypatch.setattr(doctor.database, "load", lambda: database.Database(tmp_path))
    assert "sm_90/fwd.yaml:1: no lookup would find this file" in complaints(doctor.examine())


def test_the_users_own_database_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calls run by entries of a folder that the report of a bug does not mention."""
    own = database_at(tmp_path / "tune_db", {"h100": [entry()]})
    monkeypatch.setattr(doctor, "overlay_of", lambda options: own)
    assert facts(doctor.examine())["artifacts: your own"] == f"{own.root}, 1 files"


def test_a_gpu_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that kernels refuse, the reason is the first thing its owner asks for."""
    gpus = [device.simulated("h100"), device.Device("tesla-v100", "sm_70", sms=80, shared_bytes=98_304)]
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(device, "current", gpus.__getitem__)
    monkeypatch.setattr(Toolchain, "current", lambda: Toolchain("3.6.0"))
    report = doctor.examine()
    found = facts(report)
    assert found["GPUs: cuda:0"].startswith("nvidia-h100-80gb-hbm3 (sm_90")
    assert found["GPUs: cuda:1"].endswith("not in tune_db/devices.yaml")
    assert found["backends: triton, cuda:0"] == "yes"
    assert "need sm_75" in found["backends: triton, cuda:1"]
    assert "the kernels do not run on cuda:1" in complaints(report)
    assert "artifacts: tuned for nvidia-h100-80gb-hbm3" in found


def test_a_cpu_build_beside_a_gpu_is_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip chose the CPU wheel: everything works, a hundred times slower."""
    cuda = SimpleNamespace(is_available=lambda: False)
    cpu_build = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None, hip=None), __version__="2.13.0+cpu")
    monkeypatch.setitem(sys.modules, "torch", cpu_build)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "install a CUDA build of torch" in complaints(doctor.examine())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in complaints(doctor.examine())
