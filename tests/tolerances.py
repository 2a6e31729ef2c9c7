"""The one way results are compared with the oracle; the table is the package's own (`precision.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.precision import DENSE_FACTOR, DOUT_FLOOR, LSE_FLOOR
from dilated_attention_pytorch.precision import TOLERANCES as TOLERANCES


class Results(NamedTuple):
    """What is compared: out and gradients (B, N, heads, D), lse (B, H, N)."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def check(label: str, actual: Tensor, reference: Tensor, tolerance: float, *, floor: float = 0.0) -> None:
    """Raise an AssertionError, naming the worst element, unless ‖actual - reference‖ ≤ max(tol·‖reference‖, floor)."""
    assert actual.shape == reference.shape, f"{label}: shape {tuple(actual.shape)}, want {tuple(reference.shape)}"
    actual, reference = actual.double(), reference.double()
    broken = ~torch.isfinite(actual)
    if broken.any():
        where = tuple(broken.nonzero()[0].tolist())
        raise AssertionError(f"{label}: {int(broken.sum())} NaN or inf, first {actual[where].item()} at {where}")
    error = actual - reference
    bound = max(tolerance * reference.norm().item(), floor)
    if error.norm().item() > bound:
        where = tuple(index.item() for index in torch.unravel_index(error.abs().argmax(), error.shape))
        raise AssertionError(
            f"{label}: error norm {error.norm().item():.3e} above the bound {bound:.3e}; worst element {where}: "
            f"got {actual[where].item():.6g}, want {reference[where].item():.6g}"
        )


def check_results(
    actual: Results, reference: Results, dtype: str, *, dout: Tensor | None = None, dense: Results | None = None
) -> None:
    """Hold all results to the bound of their dtype.

    Args:
        actual: What the code under test computed.
        reference: The oracle's, float64.
        dtype: Key of `TOLERANCES`.
        dout: The incoming gradient, for the floor of gradients that cancel.
        dense: The dense formula evaluated in the dtype; twice its error is allowed where it is larger.
    """
    tolerance = TOLERANCES[dtype]
    floors = dict.fromkeys(Results._fields, 0.0)
    if dense is not None:
        for name, rough, exact in zip(Results._fields, dense, reference, strict=True):
            if name != "lse":
                floors[name] = DENSE_FACTOR * (rough.double() - exact).norm().item()
    if dout is not None:
        for name in ("dq", "dk", "dv"):
            floors[name] = max(floors[name], DOUT_FLOOR * dout.double().norm().item())

    check("out", actual.out, reference.out, tolerance.out, floor=floors["out"])
    keyless = reference.lse == -torch.inf
    assert torch.equal(actual.lse == -torch.inf, keyless), "lse: -inf stands elsewhere than in the reference"
    assert not actual.out.transpose(1, 2)[keyless].any(), "out: a query without keys must give exactly 0"
    lse, expected = (results.lse.masked_fill(keyless, 0.0) for results in (actual, reference))
    floor = LSE_FLOOR[dtype] * expected.numel() ** 0.5
    check("lse", lse, expected, tolerance.lse, floor=floor)
    for name in ("dq", "dk", "dv"):
        check(name, getattr(actual, name), getattr(reference, name), tolerance.grad, floor=floors[name])
    assert not actual.dq.transpose(1, 2)[keyless].any(), "dq: a query without keys must get exactly 0"
