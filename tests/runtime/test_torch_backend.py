"""The torch backend against the oracle: out, lse and all gradients, dlse included."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dilated_attention_pytorch.runtime import torch_attention, torch_backend, torch_calls
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.plan import Plan
from dilated_attention_pytorch.runtime.torch_calls import head_runs

from ..cases import CASES, Case, Inputs, cases, make_inputs, oracle, seeded_dropout
from ..tolerances import Results, check_results

RAGGED = Case(N=61, branches=((16, 3), (40, 2)), B=2, H=6, G=2, D=8)
EVERYTHING = dataclasses.replace(RAGGED, order="random", mask=True, causal=True, queries="all")


def run(case: Case, inputs: Inputs, *, mix_grad: str = "exact", with_dlse: bool = True) -> Results:
    """Forward and backward of the torch backend."""
    problem = dataclasses.replace(case.problem, mix_grad=mix_grad)
    plan = Plan(problem, None, "torch", (), (), "torch")
    options: dict[str, Any] = {
        "scale": case.D**-0.5,
        "index": inputs.order,
        "mask": inputs.mask,
        "offsets": HeadOffsets(case.offsets),
        "dropout": seeded_dropout(case, inputs.q.device),
    }
    q, k, v, dout, dlse = inputs[:5]
    out, lse = torch_backend.forward(plan, q, k, v, **options)
    gradients = torch_backend.backward(plan, q, k, v, out, lse, dout, dlse if with_dlse else None, **options)
    for result, like in zip((out, *gradients), (q, q, k, v), strict=True):
        assert result.dtype == like.dtype
    assert lse.dtype == inputs.dlse.dtype
    return Results(out, lse, *gradients)


def compare(case: Case, inputs: Inputs, **options: Any) -> None:
    """Backend and oracle agree within the table."""
    check_results(run(case, inputs, **options), oracle(case, inputs, **options), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_backend_is_the_oracle(case: Case) -> None:
    """Catches a wrong row, head, triangle, blend weight, delta or dlse in any option."""
    compare(case, make_inputs(case))


@given(case=cases(dtypes=("fp32", "fp64")))
@settings(max_examples=80, deadline=None)
def test_backend_is_the_oracle_on_drawn_cases(case: Case) -> None:
    """Catches combinations of options that the table does not hold."""
    compare(case, make_inputs(case))


def test_without_a_gradient_of_lse() -> None:
    """Catches a shortcut for dlse=None that is another formula."""
    for case in (RAGGED, EVERYTHING, dataclasses.replace(EVERYTHING, N=80)):
        inputs = make_inputs(case)
        expected = oracle(case, inputs._replace(dlse=torch.zeros_like(inputs.dlse)))
        check_results(run(case, inputs, with_dlse=False), expected, case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("padding", ["none", "zeros"])
def test_detached_mix(padding: str) -> None:
    """Catches a delta taken from the merged output where the mixing weights are constants."""
    case = dataclasses.replace(RAGGED, padding=padding, mask=True, order="random")
    inputs = make_inputs(case)
    actual = run(case, inputs, mix_grad="detached", with_dlse=False)
    check_results(actual, oracle(case, inputs, mix_grad="detached"), case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("options", [{}, {"mask": True, "causal": True}, {"dtype": "fp16"}, {"queries": "all"}])
def test_one_call_that_holds_everything(options: dict[str, Any]) -> None:
    """Catches a kernel's result that is taken for the output in a wrong layout, and what the next branch adds to it."""
    case = Case(N=48, branches=((24, 3), (12, 1)), B=2, H=6, D=8, **options)
    compare(case, make_inputs(case))


@pytest.mark.parametrize(
    "case",
    [RAGGED, dataclasses.replace(RAGGED, N=80), EVERYTHING, dataclasses.replace(EVERYTHING, N=80)],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("pack", [False, True], ids=["view", "pack"])
def test_cutting_into_small_calls_changes_nothing(case: Case, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pieces that overlap, leave a segment out, or chunks of queries under the wrong mask."""
    smallest = torch_calls.Budget(pairs=0, elements=1, pack=pack)
    monkeypatch.setattr(torch_calls.Budget, "of", lambda *_, **__: smallest)
    monkeypatch.setattr(torch_attention, "SCORES", 1)
    compare(case, make_inputs(case))


@pytest.mark.parametrize("head_offset", ["cyclic", "blocked"])
@pytest.mark.parametrize("options", [{}, {"mask": True, "causal": True}, {"dropout": 0.2}, {"dtype": "bf16"}])
def test_sparse_branches_before_the_whole_one(head_offset: str, options: dict[str, Any]) -> None:
    """Catches a result that waits for out and is lost, taken twice, or blended into other rows than its own."""
    case = Case(N=48, branches=((24, 3), (48, 6), (16, 1), (12, 4)), B=2, H=6, D=8, head_offset=head_offset, **options)
    compare(case, make_inputs(case))


@pytest.mark.parametrize("pairs", range(1, 5))
@pytest.mark.parametrize("pack", [False, True], ids=["view", "pack"])
def test_runs_that_share_a_key_head(pairs: int, pack: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one view of two runs of heads, as far apart as nothing, whose gradients cannot be added in place."""
    case = Case(N=4, branches=((4, 1),), H=6, G=3, D=8, head_offset=((0, -1, 0, -1, 0, 0),))
    budget = torch_calls.Budget(pairs=pairs, elements=48, pack=pack)
    monkeypatch.setattr(torch_calls.Budget, "of", lambda *_, **__: budget)
    compare(case, make_inputs(case))


@pytest.mark.parametrize("order", ["none", "random"])
@pytest.mark.parametrize("layout", ["packed", "expanded", "transposed"])
def test_any_strides(layout: str, order: str) -> None:
    """Catches code that takes q, k and v for contiguous: slices of one projection, a shared batch, D not innermost."""
    case = dataclasses.replace(RAGGED, N=80, G=6, order=order)
    inputs = make_inputs(case)
    q, k, v = inputs[:3]
    if layout == "packed":
        q, k, v = torch.stack((q, k, v), dim=2).unbind(2)
    elif layout == "expanded":
        q, k, v = (x[:1].expand_as(x) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    compare(case, inputs._replace(q=q, k=k, v=v))


@pytest.mark.parametrize("case", [RAGGED, EVERYTHING], ids=lambda case: case.id)
def test_expanded_incoming_gradient(case: Case) -> None:
    """Catches a backward that cannot read the zero strides of `out.sum().backward()`."""
    inputs = make_inputs(case)
    compare(case, inputs._replace(dout=torch.ones(()).expand(inputs.dout.shape)))


@pytest.mark.parametrize("order", ["none", "random"])
def test_steps_that_no_branch_keeps_are_not_read(order: str) -> None:
    """Catches a row from a neighbouring step or head: all rows that nobody keeps are NaN."""
    case = Case(N=50, branches=((25, 6), (50, 12)), H=3, D=8, order=order)
    inputs = make_inputs(case)
    expected = oracle(case, inputs)
    unkept = (expected.lse == -torch.inf).transpose(1, 2).unsqueeze(3)
    assert unkept.any()
    q, k, v, dout = (x.masked_fill(unkept, torch.nan) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    dlse = inputs.dlse.masked_fill(expected.lse == -torch.inf, torch.nan)
    actual = run(case, inputs._replace(q=q, k=k, v=v, dout=dout, dlse=dlse))
    check_results(actual, expected, case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("case", [RAGGED, dataclasses.replace(RAGGED, mask=True), EVERYTHING], ids=lambda case: case.id)
def test_scores_of_thousands_overflow_nothing(case: Case) -> None:
    """Catches exp before the maximum is taken off, and a masked key whose score is not low enough."""
    inputs = make_inputs(case)
    result = run(case, inputs._replace(q=300 * inputs.q, k=300 * inputs.k))
    expected = oracle(case, inputs._replace(q=300 * inputs.q, k=300 * inputs.k))
    assert expected.lse.max() > 1e4
    assert all(torch.isfinite(x).all() for x in (result.out, *result[2:]))
    assert torch.equal(result.lse == -torch.inf, expected.lse == -torch.inf)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("options", [{}, {"mask": True}, {"order": "random", "causal": True, "queries": "all"}])
def test_memory_is_linear_in_length(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a score matrix: no tensor may exceed the padded inputs, though N² is 20 times as much."""
    monkeypatch.setattr(torch_attention, "SCORES", 1 << 14)
    case = Case(N=701, branches=((701, 1), (400, 2)), H=2, D=16, **options)
    inputs = make_inputs(case)
    with LargestTensor() as largest:
        run(case, inputs)
    assert largest.elements <= 17 * case.N * case.H


@given(rate=st.integers(1, 9), groups=st.integers(1, 5), repeat=st.integers(1, 5), data=st.data())
@settings(max_examples=50, deadline=None)
def test_head_runs_hold_every_present_head_once(rate: int, groups: int, repeat: int, data: st.DataObject) -> None:
    """Catches a slice that skips a head, takes one twice, or pairs it with another key/value head."""
    heads = groups * repeat
    offsets = data.draw(st.lists(st.integers(-1, rate - 1), min_size=heads, max_size=heads))
    found = {}
    for run in head_runs(offsets, heads, groups):
        q_list, kv_list = list(range(heads))[run.queries], list(range(groups))[run.keys] * run.repeat
        for head, kv_head in zip(q_list, kv_list, strict=True):
            assert head not in found
            found[head] = (run.offset, kv_head)
    assert found == {head: (s, head * groups // heads) for head, s in enumerate(offsets) if s >= 0}
