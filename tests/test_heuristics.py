"""Untuned configurations: they exist for everything that kernels take, and are no larger than the problem."""

from __future__ import annotations

import itertools

import pytest

from dilated_attention_pytorch import device, heuristics
from dilated_attention_pytorch.config import OPS, LaunchConfig

ARCHES = sorted(device.SHARED_BYTES)


def limit(arch: str) -> int:
    return device.SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", [*ARCHES, "sm_130", "interpreter"])
def test_there_is_a_default_for_every_problem(arch: str) -> None:
    """A missing line of the table is a KeyError in somebody's first call."""
    for op, head_dim, dtype in itertools.product(OPS, range(8, 257, 8), ("bf16", "fp16", "fp32")):
        assert heuristics.default(op, head_dim, dtype, 4096, 4096, arch), (op, head_dim, dtype)


@pytest.mark.parametrize("arch", ARCHES)
def test_some_default_or_the_floor_fits_every_gpu(arch: str) -> None:
    """Where nothing fits, the call falls to the torch backend although a kernel could run."""
    unfit = set()
    for op, head_dim, dtype in itertools.product(OPS, (16, 64, 128, 256), ("fp16", "fp32")):
        configs = [*heuristics.default(op, head_dim, dtype, 4096, 4096, arch), *heuristics.FLOOR]
        if min(heuristics.shared_bytes(op, head_dim, dtype, config, arch) for config in configs) > limit(arch):
            unfit.add((op, head_dim))
    # On Turing operands are float32: four tiles of 16 x 256 and a little more are more than its 64 KiB.
    assert unfit == ({("dkdv", 256)} if arch == "sm_75" else set())


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 9), (128, 32), (100, 100)])
def test_tiles_are_clamped_to_the_segment(queries: int, keys: int) -> None:
    """A tile of 128 rows on a segment of 9 does fourteen times the work."""
    for op, arch in itertools.product(OPS, ARCHES):
        for config in heuristics.default(op, 64, "bf16", queries, keys, arch):
            assert config.block_m < max(2 * queries, 17)
            assert config.block_n < max(2 * keys, 17)


# Bytes that Triton 3.7.1 gave the kernels of generated/s2048_d2.py, compiled for the architecture.
COMPILED = [
    ("sm_90", "fwd", 64, "bf16", LaunchConfig(128, 64, 4, 3), 65_536),
    ("sm_90", "fwd", 128, "bf16", LaunchConfig(128, 64, 8, 3), 131_072),
    ("sm_90", "fwd", 256, "bf16", LaunchConfig(128, 32, 8, 2), 131_072),
    ("sm_90", "fwd", 128, "fp32", LaunchConfig(32, 32, 4, 1), 49_152),
    ("sm_90", "fwd", 128, "fp32", LaunchConfig(64, 32, 4, 2), 131_072),
    ("sm_90", "dq", 64, "fp32", LaunchConfig(128, 64, 8, 1), 163_840),
    ("sm_90", "dkdv", 64, "bf16", LaunchConfig(64, 128, 8, 3), 82_944),
    ("sm_90", "dkdv", 128, "bf16", LaunchConfig(64, 64, 4, 1), 65_536),
    ("sm_90", "dkdv", 128, "bf16", LaunchConfig(64, 64, 4, 2), 99_328),
    ("sm_90", "dkdv", 64, "fp32", LaunchConfig(32, 64, 4, 2), 98_560),
    ("sm_80", "dkdv", 64, "fp32", LaunchConfig(32, 64, 4, 1), 75_776),
    ("sm_80", "fwd", 16, "fp32", LaunchConfig(128, 64, 8, 1), 20_480),
    ("sm_90", "dq", 256, "bf16", LaunchConfig(64, 32, 8, 2), 131_072),
    ("sm_80", "fwd", 128, "bf16", LaunchConfig(128, 64, 8, 3), 98_304),
    ("sm_80", "fwd", 256, "bf16", LaunchConfig(128, 32, 8, 1), 90_112),
    ("sm_80", "dkdv", 128, "bf16", LaunchConfig(64, 64, 4, 2), 74_240),
    ("sm_80", "dkdv", 256, "bf16", LaunchConfig(32, 64, 8, 1), 114_688),
    ("sm_80", "dq", 256, "bf16", LaunchConfig(64, 32, 8, 2), 102_400),
    ("sm_89", "fwd", 256, "bf16", LaunchConfig(64, 32, 4, 3), 102_400),
    ("sm_89", "dkdv", 256, "bf16", LaunchConfig(16, 32, 4, 1), 57_344),
    ("sm_100", "fwd", 128, "bf16", LaunchConfig(128, 64, 8, 1), 53_248),
    ("sm_100", "dkdv", 128, "bf16", LaunchConfig(64, 64, 4, 2), 132_096),
    ("sm_100", "dq", 64, "bf16", LaunchConfig(128, 64, 8, 3), 91_136),
    ("sm_120", "dkdv", 128, "bf16", LaunchConfig(32, 64, 4, 2), 53_504),
    ("sm_75", "fwd", 64, "fp16", LaunchConfig(128, 64, 4, 2), 65_536),
    ("sm_75", "dq", 256, "fp32", LaunchConfig(16, 16, 4, 1), 65_536),
    ("sm_75", "dq", 128, "fp16", LaunchConfig(64, 32, 4, 2), 81_920),
    ("gfx942", "fwd", 256, "bf16", LaunchConfig(64, 32, 4, 2), 36_864),
    ("gfx942", "dkdv", 64, "bf16", LaunchConfig(64, 64, 4, 3), 40_960),
]


@pytest.mark.parametrize(("arch", "op", "head_dim", "dtype", "config", "compiled"), COMPILED)
def test_the_estimate_is_an_upper_one(
    arch: str, op: str, head_dim: int, dtype: str, config: LaunchConfig, compiled: int
) -> None:
    """Too low, and a launch fails on the user's GPU; much too high, and good configurations are passed over."""
    estimate = heuristics.shared_bytes(op, head_dim, dtype, config, arch)
    assert compiled <= estimate <= 1.6 * compiled
