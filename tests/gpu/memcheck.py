"""A small case of each kind of text, forward and backward, with every tensor in an allocation of its own; and of what
reads by descriptor, queries, keys and values in one.

Run under compute-sanitizer by test_kernels.py, which tells torch to give every tensor its own allocation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.config import OPS, LaunchConfig
from dilated_attention_pytorch.variant import Variant
from tests.cases import Case, Inputs, arguments, make_inputs
from tests.kernels import chosen_config, pattern_case, pattern_config, variants_run

KINDS = (
    "general",
    "general_snake_all",
    "general_hilbert",
    "full_d4_even",
    "s128_d2_snake_all_one",
    "s128_d1_all_one_even",
    "s1024_d1",
    "s1024_2048_d1_2",
    "s1024_2048_d1_2_even",
    "general_even",
    "general_one_even",
    "s1024_2048_d1_2_even_ring",
    "s4096_d2_even_ring",
    "general_one_even_ring",
    "general_ring",
    "general_hilbert_even_ring",
)


def kind(name: str) -> tuple[Case, Any]:
    """A case of a text, and tiles with which the plan comes to it: by descriptor and all gradients at once, or rows
    that a mask cuts off."""
    variant = Variant.from_name(name)
    width = 48 if name == "general_ring" else 64 if variant.ring or (variant.described and variant.even) else 24
    case = pattern_case(variant, D=width, dtype="bf16", causal=True)
    if variant.joinable:
        return case, chosen_config(variant)
    if variant.wider and not variant.ring:
        loads = "descriptor" if variant.described else "pointer"
        return case, dict.fromkeys(OPS, LaunchConfig(64, 64, num_warps=4, num_stages=2, loads=loads))
    return case, pattern_config(variant)


def run(name: str, case: Case, inputs: Inputs, config: Any) -> None:
    assert name in variants_run(case, inputs, config)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    given = arguments(case, inputs) | ({"order": "snake"} if case.order == "snake" else {})
    with dap.options(config=config):
        out = dap.dilated_attention(*leaves, **given, backend="triton")
        torch.autograd.grad(out, leaves, inputs.dout)
    torch.cuda.synchronize()


def fused(inputs: Inputs) -> Inputs:
    """The same values as parts of one tensor (B, N, 3, H, D): behind the last head of v is nobody's memory."""
    q, k, v = torch.stack(inputs[:3], 2).unbind(2)
    return inputs._replace(q=q, k=k, v=v)


if __name__ == "__main__":
    for name in KINDS:
        variant = Variant.from_name(name)
        if variant.ring and torch.cuda.get_device_capability() != (9, 0):
            continue
        case, config = kind(name)
        run(name, case, make_inputs(case, "cuda"), config)
        if variant.described:
            case = replace(case, G=case.H)
            run(name, case, fused(make_inputs(case, "cuda")), config)
    print("ran every kind")
