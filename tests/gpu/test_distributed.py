"""Gathered rows by compiled kernels, all ranks in one process on one GPU.

Several GPUs are for `benchmarks.scale_out`, which holds its results to those of one.
"""

from __future__ import annotations

import pytest

from ..cases import make_inputs, oracle
from ..distributed import loopback
from ..distributed.ranks import BY_KERNELS, LARGE, Cut
from ..tolerances import check_results

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("cut", BY_KERNELS + LARGE, ids=lambda cut: cut.id)
def test_ranks_together_compute_what_one_device_does(cut: Cut) -> None:
    """Tiles that reach beyond a rank's query rows, or rows read at another stride than they were gathered with."""
    inputs = make_inputs(cut.case, "cuda")
    wanted = oracle(cut.case, inputs, mix_grad=cut.mix_grad)
    check_results(loopback.attend(cut, "cuda"), wanted, cut.case.dtype, dout=inputs.dout)
