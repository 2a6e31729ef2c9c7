"""cuDNN itself, handed what a plan hands it: its own reading of strides, of lse and of what is no tensor."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import device
from dilated_attention_pytorch.runtime import library
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.plan import Plan, plan
from dilated_attention_pytorch.runtime.refusals import cudnn_takes

from ..cases import Case, make_inputs, oracle
from ..tolerances import Results, check_results

pytestmark = pytest.mark.gpu

CASES = (
    Case(N=512, branches=((128, 1),), B=2, H=4, D=64, dtype="bf16"),
    Case(N=512, branches=((512, 1),), B=1, H=4, D=128, dtype="fp16", causal=True),
    Case(N=600, branches=((200, 1),), B=2, H=2, D=48, dtype="bf16", causal=True),
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("handed", [("fwd", "bwd"), ("fwd",), ("bwd",)], ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_either_forward_with_either_backward(case: Case, handed: tuple[str, ...], packed: bool) -> None:
    """An lse in another base or of another row; a backward that wants more of the forward than out and lse."""
    gpu = device.current()
    assert gpu is not None
    if not cudnn_takes(case.problem, gpu):
        pytest.skip(f"cuDNN's attention does not run on {gpu.name}")
    inputs = make_inputs(case, "cuda")
    q, k, v = inputs.q, inputs.k, inputs.v
    if packed:
        q, k, v = torch.stack((q, k, v), 2).unbind(2)
    ours = plan(case.problem, gpu, "triton")
    external = tuple((op, "") for op in handed)
    found = Plan(case.problem, gpu, "cudnn", ours.launches, (), ours.rung, external=external)
    sides = {"scale": case.D**-0.5, "index": None, "mask": None, "offsets": HeadOffsets(case.offsets)}
    out, lse = library.forward(found, q, k, v, **sides)  # type: ignore[arg-type]
    gradients = library.backward(found, q, k, v, out, lse, inputs.dout, None, **sides)  # type: ignore[arg-type]
    wanted = oracle(case, inputs._replace(dlse=torch.zeros_like(inputs.dlse)))
    check_results(Results(out, lse, *gradients), wanted, case.dtype, dout=inputs.dout)
