"""`HilbertAttentionMixin`: on either side of `nn.Module`, with and without an attention of the class's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dilated_attention_pytorch as dap
from dilated_attention_pytorch import reference
from dilated_attention_pytorch.errors import ArgumentError, DilatedAttentionError
from dilated_attention_pytorch.utils import HilbertAttentionMixin

SETTINGS = {"hidden_dim": 24, "num_heads": 3, "segment_size": 16, "dilation_rate": 3, "order": "hilbert"}


class Last(nn.Module, HilbertAttentionMixin):
    """The mixin after `nn.Module`, as in the client's guide."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.setup_hilbert_attention(**{**SETTINGS, **settings})


class First(HilbertAttentionMixin, nn.Module):
    """The mixin before `nn.Module`."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.setup_hilbert_attention(**{**SETTINGS, **settings})


def pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention that an order changes: a token sees the two steps of its pair."""
    return dap.dilated_attention(q, k, v, 2, 1, queries="all")


class Attends(nn.Module):
    """A base with an attention of its own."""

    def _compute_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pairs(q, k, v)


class HookLast(Attends, Last):
    """Its attention stands before the mixin among the bases."""


class HookFirst(First, Attends):
    """Its attention stands behind the mixin among the bases."""


class HookOwn(First):
    """Its attention is its own method."""

    def _compute_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pairs(q, k, v)


SIDES = pytest.mark.parametrize("side", [Last, First])


def qkv(length: int = 61) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("custom", [True, False])
@SIDES
def test_core(side: type[Last | First], custom: bool, ordered: bool) -> None:
    """The client's mixin ignored k and v; an order or a direction that is wrong."""
    q, k, v = qkv()
    out = side(use_hilbert_core=True, use_custom_backward=custom).compute_hilbert_attention(q, k, v, ordered)
    order = dap.TokenOrder("hilbert").indices(61) if ordered else None
    wanted, _ = reference.dilated_attention(q, k, v, [16], [3], queries="all", head_offset="zero", order=order)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    mine, true = (torch.autograd.grad(result, (q, k, v), dout) for result in (out, wanted))
    for actual, expected in zip(mine, true, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("owner", [HookLast, HookFirst, HookOwn])
def test_own_attention(owner: type[Last | First], ordered: bool) -> None:
    """A hook that the mixin hides from one side, or that is given tokens in another order than it gives back."""
    q, k, v = qkv()
    out = owner().compute_hilbert_attention(q, k, v, use_hilbert_ordering=ordered)
    order = dap.TokenOrder("hilbert").indices(61) if ordered else None
    wanted, _ = reference.dilated_attention(q, k, v, [2], [1], queries="all", order=order)
    torch.testing.assert_close(out, wanted)


@SIDES
def test_dense_without_an_attention_of_its_own(side: type[Last | First]) -> None:
    """A class without the hook fails, or attends within segments that it was not asked for."""
    q, k, v = qkv()
    grouped = [x[:, :, :1] for x in (k, v)]
    wanted, _ = reference.dilated_attention(q, *grouped, [61], [1])
    torch.testing.assert_close(side().compute_hilbert_attention(q, *grouped), wanted)


@pytest.mark.parametrize("core", [True, False])
def test_dropout_is_for_training(core: bool) -> None:
    """A share that is dropped in evaluation, or never."""
    q, k, v = qkv()
    module = Last(dropout=0.5, use_hilbert_core=core)
    dropped = module.compute_hilbert_attention(q, k, v)
    module.eval()
    kept, again = (module.compute_hilbert_attention(q, k, v) for _ in range(2))
    assert torch.equal(kept, again)
    assert not torch.allclose(dropped, kept)


@SIDES
def test_adds_nothing_to_the_module(side: type[Last | First]) -> None:
    """A checkpoint with entries that the class did not have before."""
    module = side(use_hilbert_core=True)
    assert module.state_dict() == {}
    assert list(module.modules()) == [module]


@SIDES
def test_indices(side: type[Last | First]) -> None:
    """Indices of another dtype than indexing takes, or that do not undo each other."""
    module = side()
    tokens, steps = module.get_hilbert_indices(63, "cpu"), module.get_inverse_hilbert_indices(63, torch.device("cpu"))
    assert tokens.dtype == steps.dtype == torch.int64
    assert torch.equal(tokens, dap.TokenOrder("hilbert").indices(63))
    assert torch.equal(tokens[steps], torch.arange(63))
    assert not torch.equal(tokens, steps)
    tokens.zero_()  # the caller's own
    assert torch.equal(module.get_hilbert_indices(63, "cpu")[steps], torch.arange(63))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ordering_of_a_dimension(dim: int) -> None:
    """A dimension that is not the one asked for, or an inverse that is none."""
    x = torch.randn(63, 63, 63, requires_grad=True)
    module = Last()
    ordered = module.apply_hilbert_ordering(x, dim=dim)
    tokens = module.get_hilbert_indices(63, "cpu")
    assert torch.equal(ordered.movedim(dim, 0), x.movedim(dim, 0)[tokens])
    assert torch.equal(module.apply_hilbert_ordering(ordered, inverse=True, dim=dim), x)


def test_refusals() -> None:
    """A message about an attribute that the caller never wrote, or a wrong shape that is attended."""

    class Forgot(nn.Module, HilbertAttentionMixin):
        pass

    q, k, v = qkv()
    with pytest.raises(DilatedAttentionError, match=r"Forgot has no Hilbert attention yet: call self\.setup"):
        Forgot().compute_hilbert_attention(q, k, v)
    with pytest.raises(ArgumentError, match=r"q must have shape \(B, N, 3, 8\)"):
        Last().compute_hilbert_attention(q.flatten(2), k, v)
    with pytest.raises(ArgumentError, match="hidden_dim must be a multiple of num_heads"):
        Last(hidden_dim=25)
    with pytest.raises(ArgumentError, match="dropout must lie in"):
        Last(dropout=2.0)
    with pytest.raises(ArgumentError, match="dilation_rate must be a positive integer"):
        Last(dilation_rate=0)
    with pytest.raises(TypeError, match="got None: compute_hilbert_attention takes tokens as they stand"):
        Last(order=None)
