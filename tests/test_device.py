"""What GPU is this: the file of devices, simulated ones, and what torch's properties are taken for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dilated_attention_pytorch import device
from dilated_attention_pytorch.errors import DatabaseError, UnknownDeviceError

H100 = "nvidia-h100-80gb-hbm3"


def properties(**changes: object) -> SimpleNamespace:
    """Like `torch.cuda.get_device_properties` of an H100, on CUDA: no `gcnArchName` worth the name."""
    facts = {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "gcnArchName": "",
        "multi_processor_count": 132,
        "shared_memory_per_block_optin": 232_448,
        "L2_cache_size": 52_428_800,
        "memory_clock_rate": 2_619_000,
        "memory_bus_width": 5120,
        "warp_size": 32,
    }
    return SimpleNamespace(**facts | changes)


def test_the_file_knows_every_generation_with_its_limit() -> None:
    """A wrong limit of shared memory is a kernel that cannot be launched, seen by its user alone."""
    devices = device.known()
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"} <= {
        found.arch for found in devices.values()
    }
    assert len(devices) >= 12
    for found in devices.values():
        assert found.shared_bytes == device.SHARED_BYTES[found.arch], found.name
        assert found.warp_size == (64 if found.arch.startswith("gfx") else 32), found.name


@pytest.mark.parametrize("name", ["h100", "H100 SXM", "nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3"])
def test_a_device_answers_to_its_names(name: str) -> None:
    """A name as the driver writes it, with its spaces and capitals, must not miss."""
    assert device.simulated(name).name == H100


def test_h100_and_h200_are_one_chip() -> None:
    """Without a common chip, what was measured on one would not serve the other."""
    assert device.simulated("h100").silicon == device.simulated("h200").silicon != device.simulated("b200").silicon


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    """'no such device' alone leaves the user to read the file."""
    with pytest.raises(UnknownDeviceError, match=r"'h10' is no device of .*did you mean .*h100"):
        device.simulated("h10")
    with pytest.raises(UnknownDeviceError, match=r"known are .*nvidia-l4"):
        device.simulated("zx81")


def test_a_listed_gpu_is_the_listed_device() -> None:
    """Equal facts are what makes ranks on equal devices agree."""
    assert device.described(properties(), device.known()) == device.simulated("h100")


def test_a_slice_of_a_listed_gpu_keeps_its_own_sms() -> None:
    """A MIG slice would be planned like the whole GPU."""
    assert device.described(properties(multi_processor_count=16), device.known()) == replace(
        device.simulated("h100"), sms=16
    )


def test_an_unlisted_gpu_is_what_torch_says() -> None:
    """A GPU that is not in the file must run, with its own limits."""
    found = device.described(properties(name="NVIDIA H800", shared_memory_per_block_optin=99_000), device.known())
    assert (found.name, found.arch, found.silicon, found.shared_bytes) == (
        "nvidia-h800", "sm_90", "nvidia-h800", 99_000,
    )  # fmt: skip
    assert found.bandwidth == pytest.approx(3352, rel=1e-3)


def test_limits_are_known_where_torch_reports_none() -> None:
    """torch does not report what a block may opt in to on AMD and in older versions: 0 bytes would refuse all."""
    amd = properties(name="AMD Instinct MI300A", gcnArchName="gfx942:sramecc+:xnack-", shared_memory_per_block_optin=0)
    assert device.described(amd, device.known()).arch == "gfx942"
    assert device.described(amd, device.known()).shared_bytes == 65_536
    new = properties(name="NVIDIA X1", major=17, shared_memory_per_block_optin=0)
    assert device.described(new, {}).shared_bytes == device.LEAST_SHARED_BYTES


def test_a_cpu_is_no_device() -> None:
    """A CPU tensor on a machine with a GPU would get that GPU's plan."""
    assert device.current(torch.device("cpu")) is None


@pytest.mark.parametrize("word", ["1", "true", "ON", "0", ""])
def test_the_interpreter_is_on_where_triton_says_so(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """`TRITON_INTERPRET=0` must not send CPU tensors to kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert device.Toolchain.current().interpret == (word not in ("0", ""))


def test_a_development_build_of_triton_is_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """'3.6.0+git1234' is no other compiler than the '3.6.0' that a measurement names."""
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: "3.6.0+git1234")
    device._triton_version.cache_clear()
    assert device.Toolchain.current().triton == "3.6.0"
    device._triton_version.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("sms: 132", "sms: 0", "sms must be at least 1"),
        ("sms: 132", "cores: 132", "cores is no field"),
        ("name: one", "name: One", "write it as 'one'"),
        ("aliases: [uno]", "aliases: [two]", "'two', which names one already"),
    ],
)
def test_a_fault_in_the_file_names_its_line(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """A typing error in a new GPU's lines would surface as a wrong plan."""
    facts = "arch: sm_90\n  silicon: gh100\n  sms: 132\n  shared_bytes: 9\n  l2_bytes: 9\n  bandwidth: 9\n  source: us"
    text = f"schema: 1\ndevices:\n- name: one\n  aliases: [uno]\n  {facts}\n- name: two\n  {facts}\n"
    path = tmp_path / "devices.yaml"
    path.write_text(text)
    assert set(device.read(path)) == {"one", "two"}
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace(old, new, 1))
    with pytest.raises(DatabaseError, match=rf"bad\.yaml:\d+: .*{re.escape(complaint)}"):
        device.read(bad)
