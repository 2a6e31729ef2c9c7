"""How exact a result has to be, by dtype: the one table, for the tests, the benchmarks and the tuner.

Loosening a number here is a decision: write down why in the commit that does it.
"""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Relative errors in the Frobenius norm against the float64 oracle on the same rounded inputs."""

    out: float
    grad: float
    lse: float


TOLERANCES = {
    "bf16": Tolerance(out=4e-3, grad=1e-2, lse=1e-4),
    "fp16": Tolerance(out=5e-4, grad=2e-3, lse=1e-4),
    "fp32": Tolerance(out=1e-5, grad=1e-4, lse=1e-5),
    "tf32": Tolerance(out=2e-3, grad=5e-3, lse=2e-3),
    "fp64": Tolerance(out=1e-9, grad=1e-8, lse=1e-9),
}

DENSE_FACTOR = 2.0
"""Nobody is held to less than twice the error of the dense formula in the same dtype."""

DOUT_FLOOR = 1e-6
"""No gradient, where it cancels to almost nothing, is held to less than this share of ‖dout‖."""

LSE_FLOOR = dict.fromkeys(TOLERANCES, 2.0**-23) | {"fp64": 2.0**-52}
"""No lse near 0, the logarithm of a number near 1, is held to less than the rounding of that number."""
