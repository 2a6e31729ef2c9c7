"""`DilatedAttention` as a module: the oracle's function, its own scale, dropout and head groups."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.modules import attention

from ..tolerances import TOLERANCES, check

BRANCHES = [16, 40], [2, 3]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def heads(count: int = 5) -> list[Tensor]:
    """q, k, v (2, 61, count, 8), float64."""
    return [torch.randn(2, 61, count, 8, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_module_computes_what_the_paper_says(scale: float | None, is_causal: bool) -> None:
    """A scale that is stored and never used, heads without an output, or an output scaled by its own sum."""
    q, k, v = heads()
    out = dap.DilatedAttention(*BRANCHES, softmax_scale=scale)(q, k, v, is_causal=is_causal)
    want, _ = reference.dilated_attention(q, k, v, *BRANCHES, scale=scale, is_causal=is_causal)
    check("out", out, want, TOLERANCES["fp64"].out)


def test_head_groups_give_each_head_one_branch() -> None:
    """Groups that overlap where heads do not divide, so that the last heads attend to nothing."""
    q, k, v = heads(7)
    branches = [9, 20, 61], [1, 2, 3]
    out = dap.DilatedAttention(*branches, head_groups=True)(q, k, v)
    start = 0
    for size, width, rate in zip((3, 2, 2), *branches, strict=True):
        group = slice(start, start + size)
        offsets = torch.tensor([[head % rate for head in range(start, start + size)]])
        of_group = (x[:, :, group] for x in (q, k, v))
        want, _ = reference.dilated_attention(*of_group, [width], [rate], head_offset=offsets)
        check(f"heads {group}", out[:, :, group], want, TOLERANCES["fp64"].out)
        start += size


def test_a_group_may_be_empty() -> None:
    """More branches than heads: a division by nothing."""
    assert attention.group_offsets((1, 2, 3), 2).tolist() == [[0, -1], [-1, 1], [-1, -1]]


def test_the_table_of_groups_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new tensor a call would be checked anew each time; one made under inference_mode, too."""
    seen: list[Tensor] = []
    monkeypatch.setattr(attention, "dilated_attention", lambda *_, head_offset, **__: seen.append(head_offset))
    module = dap.DilatedAttention(*BRANCHES, head_groups=True)
    for count in (5, 6, 5):
        with torch.inference_mode():
            module(*heads(count))
    assert seen[0] is seen[2]
    assert [tuple(table.shape) for table in seen] == [(2, 5), (2, 6), (2, 5)]
    assert not seen[0].is_inference()


@pytest.mark.parametrize("head_groups", [False, True])
def test_it_compiles_without_a_graph_break(head_groups: bool) -> None:
    """A cache or a table that the compiler cannot see through."""
    module = dap.DilatedAttention(*BRANCHES, head_groups=head_groups)
    qkv = heads()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(*qkv), module(*qkv))


def test_dropout_is_for_training() -> None:
    """Dropout in evaluation, or a rate that is stored and never used."""
    q, k, v = heads()
    module = dap.DilatedAttention(*BRANCHES, attention_dropout=0.3)
    plain = dap.DilatedAttention(*BRANCHES)(q, k, v)
    assert not torch.equal(module(q, k, v), plain)
    assert torch.equal(module.eval()(q, k, v), plain)


def test_unequal_branches_are_refused_when_it_is_built() -> None:
    """A model of many layers that fails at its first batch."""
    with pytest.raises(ValueError, match=r"one pair a branch; got \[16, 40\] and \[2\]"):
        dap.DilatedAttention([16, 40], [2])


def test_it_is_printed_and_pickled_whole() -> None:
    """A module that cannot be sent to another process, or whose print hides what it does."""
    module = dap.DilatedAttention(*BRANCHES, softmax_scale=0.5, attention_dropout=0.1, head_groups=True)
    text = "DilatedAttention([16, 40], [2, 3], softmax_scale=0.5, attention_dropout=0.1, head_groups=True)"
    assert repr(pickle.loads(pickle.dumps(module))) == text
    assert repr(dap.DilatedAttention(*BRANCHES)) == "DilatedAttention([16, 40], [2, 3])"
