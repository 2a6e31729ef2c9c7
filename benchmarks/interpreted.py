"""`TRITON_INTERPRET=1 python -m benchmarks.interpreted`: kernels on CPU tensors against the oracle, as JSON."""

from __future__ import annotations

import json

import torch

from benchmarks.compare import ours, random_tensors
from benchmarks.rows import relative_error
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.device import INTERPRETER
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.runtime.plan import plan
from dilated_attention_pytorch.workloads import near_square

LENGTH = 300
PROBLEM = Problem(
    dtype="fp32",
    batch=1,
    length=LENGTH,
    heads=2,
    kv_heads=2,
    head_dim=16,
    branches=((128, 2),),
    queries="all",
    head_offset="zero",
    order="snake",
    row_width=near_square(LENGTH),
)
"""The seed's core, small, with a short last segment."""


def kernels() -> list[str]:
    """The texts that run, by operation."""
    return [f"{choice.variant.name} {choice.op}" for choice in plan(PROBLEM, INTERPRETER, "triton").launches]


def errors() -> dict[str, float]:
    """Relative errors of out and of the gradients against the oracle."""
    q, k, v, dout = random_tensors(PROBLEM, 4, torch.device("cpu"))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    actual = ours(PROBLEM, "triton")(*inputs)
    true, _ = reference.dilated_attention(
        *inputs,
        *zip(*PROBLEM.branches, strict=True),
        queries=PROBLEM.queries,
        head_offset=PROBLEM.head_offset,
        order=TokenOrder(PROBLEM.order).indices(LENGTH),
    )
    results = (actual, *torch.autograd.grad(actual, inputs, dout))
    truths = (true, *torch.autograd.grad(true, inputs, dout.double()))
    return {
        name: relative_error(x.detach(), y)
        for name, x, y in zip(("out", "dq", "dk", "dv"), results, truths, strict=True)
    }


if __name__ == "__main__":
    print(json.dumps({"kernels": kernels(), "errors": errors()}))
