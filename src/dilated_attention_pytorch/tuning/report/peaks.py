"""The roof over a device: how fast its arithmetic and its memory can be at most, by the maker's own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ... import device as devices
from ...config import ProblemKey
from ...errors import UnknownDeviceError


class Peak(NamedTuple):
    """Dense TFLOP/s: bf16 and fp16 products accumulated in float32, tf32, and float32 (ieee); None: it has none."""

    half: float
    tf32: float | None
    fp32: float


PEAKS = {
    # Without sparsity. GeForce cards accumulate in float32 at half the rate that is advertised.
    "tesla-t4": Peak(65.0, None, 8.1),  # NVIDIA T4 datasheet; fp16 alone
    "nvidia-geforce-rtx-2080-ti": Peak(53.8, None, 13.4),  # Turing whitepaper, table 1; fp16 alone
    "nvidia-a100-sxm4-40gb": Peak(312.0, 156.0, 19.5),  # A100 datasheet
    "nvidia-a100-sxm4-80gb": Peak(312.0, 156.0, 19.5),  # A100 datasheet
    "nvidia-a100-80gb-pcie": Peak(312.0, 156.0, 19.5),  # A100 datasheet: as SXM's
    "nvidia-a30": Peak(165.0, 82.0, 10.3),  # A30 datasheet
    "nvidia-a10": Peak(125.0, 62.5, 31.2),  # A10 datasheet
    "nvidia-geforce-rtx-3090": Peak(71.2, 35.6, 35.6),  # RTX Blackwell whitepaper, table 3
    "nvidia-rtx-a6000": Peak(154.8, 77.4, 38.7),  # GA102 whitepaper, appendix B
    "nvidia-l4": Peak(121.0, 60.0, 30.3),  # L4 datasheet
    "nvidia-l40s": Peak(362.05, 183.0, 91.6),  # L40S datasheet
    "nvidia-geforce-rtx-4090": Peak(165.2, 82.6, 82.6),  # RTX Blackwell whitepaper, table 3
    "nvidia-h100-80gb-hbm3": Peak(989.4, 494.7, 66.9),  # Hopper whitepaper, table 2 (SXM5)
    "nvidia-h100-pcie": Peak(756.0, 378.0, 51.2),  # H100 datasheet (PCIe)
    "nvidia-h200": Peak(989.4, 494.7, 66.9),  # H200 datasheet
    "nvidia-b200": Peak(2250.0, 1125.0, 75.0),  # HGX B200 specifications, an eighth
    "nvidia-b300-sxm6-ac": Peak(2250.0, 1125.0, 75.0),  # HGX B300 specifications, an eighth
    "nvidia-geforce-rtx-5090": Peak(209.5, 104.8, 104.8),  # RTX Blackwell whitepaper, table 3
    "amd-instinct-mi250x-mi250": Peak(191.5, None, 23.9),  # MI250X datasheet, one of two dies
    "amd-instinct-mi300x": Peak(1307.4, 653.7, 163.4),  # MI300X datasheet
    "amd-instinct-mi325x": Peak(1307.4, 653.7, 163.4),  # MI325X specifications: as the MI300X's
    "amd-instinct-mi355x": Peak(2516.6, None, 157.3),  # MI355X specifications, not rounded to 2.5 P
}
"""By the device's name in tune_db/devices.yaml. One that is not here has a memory roof alone."""


@dataclass(frozen=True)
class Roof:
    """What a device can reach.

    Attributes:
        bandwidth: GB/s of memory; None where unknown.
        peak: TFLOP/s by the kind of arithmetic; None where unknown.
    """

    bandwidth: float | None = None
    peak: Peak | None = None

    @classmethod
    def over(cls, name: str, bandwidth: float | None) -> Roof:
        """The roof over a device.

        Args:
            name: Its name or an alias, as in tune_db/devices.yaml.
            bandwidth: GB/s that the run knew of, which goes before the file's.
        """
        try:
            known = devices.simulated(name)
        except UnknownDeviceError:
            return cls(bandwidth or None)
        return cls(bandwidth or known.bandwidth or None, PEAKS.get(known.name))

    def tflops(self, arithmetic: str) -> float | None:
        """The flat part in TFLOP/s for what `arithmetic` names, or None where the device's is not known."""
        return getattr(self.peak, arithmetic, None)

    def floor_us(self, arithmetic: str, flops: float, nbytes: float) -> float | None:
        """The shortest time in µs in which so many operations and bytes of traffic could be done; None: unknown."""
        peak = self.tflops(arithmetic)
        bounds = [flops / peak / 1e6] if peak else []
        bounds += [nbytes / self.bandwidth / 1e3] if self.bandwidth else []
        return max(bounds) if len(bounds) == 2 else None


def arithmetic(key: ProblemKey) -> str:
    """Which of `Peak`'s fields bounds a problem's products ("" for float64, of which no table is kept)."""
    if key.dtype in ("bf16", "fp16"):
        return "half"
    if key.dtype == "fp32":
        return "tf32" if "tf32" in key.flags else "fp32"
    return ""
