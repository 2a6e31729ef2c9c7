"""The oracle against a second formulation that forms no segments and takes its gradients from closed formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import reference

from .cases import CASES, Case, Inputs, arguments, cases, dropout_mask, make_inputs, oracle, seeded_dropout
from .dense import dense_attention
from .tolerances import Results, check_results

MIXED = Case(N=61, branches=((16, 3), (40, 2)), B=2, H=6, G=2, D=8, order="random", mask=True, dtype="fp64")


def double(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    q, k, v, dout, dlse = (x.double() for x in inputs[:5])
    return Inputs(q, k, v, dout, dlse, inputs.order, inputs.mask)


def compare(case: Case, mix_grad: str = "exact") -> None:
    """Oracle and dense formulation agree on out, lse and all gradients, dlse included."""
    inputs = double(make_inputs(case))
    given = arguments(case, inputs) | {"dropout_mask": dropout_mask(case, seeded_dropout(case))}
    dense = dense_attention(*inputs[:3], **given, dout=inputs.dout, dlse=inputs.dlse, mix_grad=mix_grad)
    check_results(oracle(case, inputs, mix_grad=mix_grad), dense, "fp64", dout=inputs.dout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_oracle_is_one_softmax_over_the_multiset_of_keys(case: Case) -> None:
    """Catches a wrong segment, offset, order direction, mask, phantom count or branch mix in the oracle itself."""
    compare(case)


@given(case=cases(dtypes=("fp64",), max_length=40))
@settings(max_examples=60, deadline=None)
def test_oracle_on_drawn_cases(case: Case) -> None:
    """Catches combinations of options that the table does not hold."""
    compare(case)


@pytest.mark.parametrize("padding", ["none", "zeros"])
def test_detached_mix_holds_the_mixing_weights_constant(padding: str) -> None:
    """Catches a detached mode that still differentiates the weights, or detaches the softmax inside a branch."""
    compare(dataclasses.replace(MIXED, padding=padding), mix_grad="detached")


def test_detached_mix_changes_gradients_alone() -> None:
    """Catches a mode that changes the forward, or one that changes nothing."""
    inputs = make_inputs(MIXED)
    exact, detached = (oracle(MIXED, inputs, mix_grad=mode) for mode in ("exact", "detached"))
    assert torch.equal(exact.out, detached.out)
    assert torch.equal(exact.lse, detached.lse)
    assert not torch.allclose(exact.dq, detached.dq)


def test_dropout_multiplies_probabilities_of_each_branch_copy() -> None:
    """Catches dropout before the softmax (lse moves), or one mask for a key that two branches share."""
    inputs = make_inputs(MIXED)
    generator = torch.Generator().manual_seed(1)
    masks = [
        (torch.rand(MIXED.B, MIXED.H, MIXED.N, MIXED.N, generator=generator) > 0.3).double() / 0.7
        for _ in MIXED.branches
    ]
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out, lse = reference.dilated_attention(q, k, v, **arguments(MIXED, inputs), dropout_mask=masks.__getitem__)
    dense = dense_attention(
        q.detach(),
        k.detach(),
        v.detach(),
        **arguments(MIXED, inputs),
        dout=inputs.dout,
        dropout_mask=masks.__getitem__,
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.dout)
    check_results(Results(out.detach(), lse.detach(), dq, dk, dv), dense, "fp64")
    assert torch.equal(lse.detach(), oracle(MIXED, inputs).lse)


def test_one_full_segment_is_plain_attention_whatever_the_order() -> None:
    """Catches an order applied to q, k, v and out in different directions."""
    case = Case(N=37, branches=((64, 1),), B=2, order="random", dtype="fp64")
    inputs = make_inputs(case)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs[:3]))
    torch.testing.assert_close(oracle(case, inputs).out, expected.transpose(1, 2))


@given(rate=st.integers(1, 20), heads=st.integers(1, 20))
def test_head_offsets_lie_below_the_rate(rate: int, heads: int) -> None:
    """Catches a blocked rule that counts past the rate when heads and rate do not divide."""
    for rule in ("cyclic", "blocked", "zero"):
        case = Case(N=1, branches=((rate, rate),), H=heads, head_offset=rule)
        assert all(0 <= offset < rate for offset in case.offsets[0])


def test_scale_multiplies_the_scores() -> None:
    """Catches a scale that is ignored or applied twice."""
    case = Case(N=21, branches=((8, 2),), dtype="fp64")
    inputs = make_inputs(case)
    doubled: tuple[Tensor, ...] = (2 * inputs.q, inputs.k, inputs.v)
    by_scale = reference.dilated_attention(*inputs[:3], **arguments(case, inputs), scale=2 * case.D**-0.5)
    torch.testing.assert_close(by_scale, reference.dilated_attention(*doubled, **arguments(case, inputs)))
