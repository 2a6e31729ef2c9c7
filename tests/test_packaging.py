"""The four ways to have this package: a wheel, a wheel built from the sdist, an editable install, a bare checkout.

Each is tried in an environment of its own that borrows torch and triton from this one.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "generated").glob("*.py"))
PROBE = """
import json
import dilated_attention_pytorch as package
from dilated_attention_pytorch import _layout, generated
print(json.dumps({
    "version": package.__version__,
    "home": package.__file__,
    "is_checkout": _layout.is_checkout(),
    "kernels": sorted(generated.names()),
    "loaded": generated.load("delta").__name__,
    "devices": (_layout.tune_db_dir() / "devices.yaml").is_file(),
}))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the command prints; its errors are shown if it fails. PYTHONPATH is none of ours."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**outside, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, target: str, folder: Path) -> Path:
    """A wheel or an sdist of the tree, into an empty folder; leaves nothing in the tree."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, cwd=source)
    (built,) = folder.iterdir()
    return built


class Environment:
    """A virtual environment that sees the packages of this one, except those installed editable."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        report = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        Path(report.strip(), "borrowed.pth").write_text("\n".join(borrowed) + "\n")
        self.folder = folder

    def install(self, *arguments: object) -> None:
        """As a user does, but with what is there: no index, no dependencies."""
        flags = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *flags, *arguments, cwd=self.folder)

    def probe(self, **environment: str) -> dict[str, Any]:
        """What the package says of itself, seen from a folder where no checkout is."""
        report: dict[str, Any] = json.loads(run(self.python, "-c", PROBE, cwd=self.folder, **environment))
        return report


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sdist = build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    return build(source, "wheel", tmp_path_factory.mktemp("wheel_from_sdist"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.mark.parametrize("kind", ["wheel", "wheel_from_sdist"])
def test_a_wheel_carries_its_kernels_and_measurements(
    kind: str, environment: Environment, request: pytest.FixtureRequest
) -> None:
    """An installed package would find no kernel, or those of a checkout that happens to lie about."""
    environment.install(request.getfixturevalue(kind))
    report = environment.probe()
    assert Path(report["home"]).is_relative_to(environment.folder)
    assert not report["is_checkout"]
    assert report["kernels"] == KERNELS
    assert report["loaded"] == "dilated_attention_pytorch.generated.delta"
    assert report["devices"]


def test_an_editable_install_reads_the_checkout(environment: Environment) -> None:
    """A kernel rendered after the install would not be seen."""
    environment.install("--editable", ROOT)
    report = environment.probe()
    assert Path(report["home"]).is_relative_to(ROOT / "src")
    assert report["is_checkout"]
    assert report["kernels"] == KERNELS
    assert report["devices"]


def test_a_checkout_works_uninstalled(environment: Environment) -> None:
    """A GPU machine without a registry could not run it."""
    report = environment.probe(PYTHONPATH=str(ROOT / "src"))
    assert Path(report["home"]).is_relative_to(ROOT / "src")
    assert report["is_checkout"]
    assert report["kernels"] == KERNELS
    assert report["devices"]


def test_the_console_command_is_installed(wheel: Path, environment: Environment) -> None:
    """The entry point would name a function that is not there."""
    environment.install(wheel)
    assert "doctor" in run(environment.python.parent / "dilated-attention", "--help", cwd=environment.folder)


def test_a_wheel_carries_no_lock(tmp_path: Path) -> None:
    """What a tuner leaves in a checkout's database, or Python beside the kernels, would be shipped."""
    kept = {"generated/full.py", "tune_db/devices.yaml", "tune_db/README.md", "tune_db/sm_90/h100/fwd.yaml"}
    for name in (*kept, "tune_db/.lock", "generated/__pycache__/full.cpython-311.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data: dict[str, dict[str, str]] = {"force_include": {}}
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["ArtifactsHook"]
    hook(str(tmp_path), {}, None, None, str(tmp_path), "wheel").initialize("standard", data)
    assert {Path(path).relative_to(tmp_path).as_posix() for path in data["force_include"]} == kept


def test_no_generic_name_lands_in_site_packages(wheel: Path, wheel_from_sdist: Path) -> None:
    """`generated`, `tests` or `templates` would shadow somebody else's; a wheel by way of the sdist would differ."""
    contents = []
    for path in (wheel, wheel_from_sdist):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]
    package, metadata = sorted({name.split("/")[0] for name in contents[0]}, key=len)
    assert package == "dilated_attention_pytorch"
    assert metadata.startswith("dilated_attention_kernels-")
    assert metadata.endswith(".dist-info")
    assert f"{package}/py.typed" in contents[0]
    assert not [name for name in contents[0] if "__pycache__" in name]
