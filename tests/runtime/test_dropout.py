"""Dropout: that a mask is what was asked for, and a function of seed, branch, batch, head and tokens alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.runtime.dropout import Dropout, _philox, key_bits

N, B, H = 384, 2, 4
PROBLEM = Problem("fp32", B, N, H, H, 16, ((N, 1), (N, 1)), dropout=True)


def kept(p: float, seed: int = 7, branch: int = 0, problem: Problem = PROBLEM) -> Tensor:
    """(B, H, N, N) bool: pairs that are kept."""
    return Dropout(p, torch.tensor([seed])).multipliers(problem, branch) > 0


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two masks."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())).float())[0, 1])


def test_philox_is_the_published_generator() -> None:
    """A wrong round, key schedule or half of a product: the known answers of Random123 for Philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    answers = ((zero, zero, (0x6627E8D5, 0xE169C58D)), (torch.tensor([-1]), ones, (0x408F276D, 0x41C83B0E)))
    for seed, counter, wanted in answers:
        words = _philox(seed, counter, counter, counter, counter)
        assert tuple(int(word) & 0xFFFFFFFF for word in words) == wanted


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_p(p: float) -> None:
    """A threshold that is signed, shifted or inverted; a rate that holds on average but not in each row and column."""
    mask = kept(p)
    pairs = mask.numel()
    assert abs(mask.float().mean() - (1 - p)) < 5 * (p * (1 - p) / pairs) ** 0.5
    for dim in (2, 3):
        # Counts of a row or column are binomial: their variance tells of runs and gaps.
        counts = mask.sum(dim).double()
        assert abs(counts.var() / (N * p * (1 - p)) - 1) < 0.15


def test_neighbours_are_independent() -> None:
    """Keys, queries, heads, batch elements, branches and seeds that share a mask, or a shifted or mirrored one."""
    mask = kept(0.5)
    others = {
        "keys": (mask[..., 1:], mask[..., :-1]),
        "keys at a power of two": (mask[..., 64:], mask[..., :-64]),
        "queries": (mask[:, :, 1:], mask[:, :, :-1]),
        "diagonals": (mask[:, :, 1:, 1:], mask[:, :, :-1, :-1]),
        "mirrored": (mask, mask.transpose(2, 3)),
        "heads": (mask[:, 1:], mask[:, :-1]),
        "batch": (mask[1:], mask[:-1]),
        "branches": (mask, kept(0.5, branch=1)),
        "seeds": (mask, kept(0.5, seed=8)),
        "high halves of seeds": (mask, kept(0.5, seed=7 + (1 << 32))),
    }
    for name, (a, b) in others.items():
        assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5, name


def test_four_corners_are_independent() -> None:
    """A mask that is a row's bit xor a column's bit: each pair looks fair, but the corners of a rectangle do not."""
    mask = kept(0.5)
    for rows, columns in itertools.product((1, 7, 64), repeat=2):
        a, b = mask[:, :, :-rows, :-columns], mask[:, :, rows:, columns:]
        c, d = mask[:, :, rows:, :-columns], mask[:, :, :-rows, columns:]
        odd = (a ^ b ^ c ^ d).float().mean()
        assert abs(odd - 0.5) < 5 * 0.5 / a.numel() ** 0.5, (rows, columns)


def test_distant_tokens_have_masks_of_their_own() -> None:
    """Bits that repeat with the period of a power of two, or that token numbers above 16 bits lose."""
    bits = key_bits(1 << 20, torch.device("cpu"))
    assert bits.unique().numel() == 1 << 20
    dropout = Dropout(0.5, torch.tensor([3]))
    row = [word[0, 5, 1] for word in dropout.row_bits(PROBLEM, 0)]
    mask = dropout.kept(row[0], row[1], bits)
    for distance in (1, 1 << 10, 1 << 16, 1 << 19):
        assert abs(correlation(mask[distance:], mask[:-distance])) < 5 / (len(mask) - distance) ** 0.5


def test_a_longer_sequence_more_heads_or_another_batch_keep_the_mask() -> None:
    """A mask that depends on sizes: a rank that holds a part of the tokens would drop other pairs."""
    mask = kept(0.3)
    larger = Problem("fp32", B + 1, N + 50, H + 2, H + 2, 16, ((N, 1),), dropout=True)
    assert torch.equal(kept(0.3, problem=larger)[:B, :H, :N, :N], mask)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_manual_seed_repeats_a_call_and_nothing_else_does(backend: str) -> None:
    """A seed that is drawn elsewhere than from torch's generator, or once for all calls."""
    q, k, v = torch.randn(3, 1, 40, 2, 8)

    def run() -> Tensor:
        return dap.dilated_attention(q, k, v, [16, 40], [1, 3], dropout_p=0.4, backend=backend)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing() -> None:
    """An evaluation that moves the generator: the next shuffle would differ."""
    q, k, v = torch.randn(3, 1, 40, 2, 8)
    torch.manual_seed(5)
    dap.dilated_attention(q, k, v, 16, 1, dropout_p=0.0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_a_drawn_mean_is_the_undropped_result() -> None:
    """Kept probabilities that are not scaled by 1/(1-p), in out or in a gradient."""
    *inputs, dout = torch.randn(4, 1, 24, 2, 8, dtype=torch.float64)

    def run(p: float, draws: int) -> tuple[Tensor, ...]:
        q, k, v = (x.repeat(draws, 1, 1, 1).requires_grad_() for x in inputs)
        out = dap.dilated_attention(q, k, v, [12, 24], [1, 2], dropout_p=p)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.expand_as(out))

    torch.manual_seed(0)
    for drawn, plain in zip(run(0.25, draws=300), run(0.0, draws=1), strict=True):
        error = (drawn.mean(0) - plain[0]).norm() / (drawn.std(0) / 300**0.5).norm()
        assert error < 1.3


def test_lse_is_that_of_the_undropped_scores() -> None:
    """Dropout before the softmax."""
    q, k, v = torch.randn(3, 1, 24, 2, 8)
    lses = [dap.dilated_attention(q, k, v, 12, 2, dropout_p=p, return_lse=True)[1] for p in (0.0, 0.7)]
    assert torch.equal(*lses) or torch.allclose(*lses, rtol=1e-6)
