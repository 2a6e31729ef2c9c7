"""Which attention probabilities dropout drops.

It is a function of seed, branch, batch, head, query token and key token alone.

Each query of a head in a branch draws 64 bits by Philox (Salmon et al., SC 2011), which key a finaliser (that of
MurmurHash3, with one half of the key added in front of each product) of the key token; the pair is dropped where the
resulting 32 bits lie below p·2^32. The kernels do the same in registers (`_row_bits`, `_key_bits` and `_kept` in
`templates/attention.py.jinja`), so a mask depends neither on tiles nor on the backend. 32-bit words are held in int32
here, whose products wrap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Problem

WORD = 0xFFFFFFFF
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35
"""Factors of MurmurHash3's finaliser."""


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call.

    Attributes:
        p: Probability of a drop, in [0, 1).
        seed: int64 (1,) on the device of q, so that neither a draw nor the replay of a CUDA graph waits for the host.
    """

    p: float
    seed: Tensor

    @classmethod
    def draw(cls, p: float, device: torch.device) -> Dropout | None:
        """Dropout with a seed from torch's generator of the device; None where nothing is dropped."""
        return cls(p, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)) if p > 0.0 else None

    @property
    def threshold(self) -> int:
        """p·2^32 as an int32 of the same rank: a pair whose bits, taken as an int32, are below it is dropped."""
        return min(round(self.p * 2**32), WORD) - 2**31

    @property
    def kept_scale(self) -> float:
        """Factor of the probabilities that are kept."""
        return 1.0 / (1.0 - self.p)

    def multipliers(self, problem: Problem, branch: int) -> Tensor:
        """(B, H, N query tokens, N key tokens): 0 where dropped, 1/(1-p) where kept. For the reference alone."""
        first, second = (bits.transpose(1, 2).unsqueeze(3) for bits in self.row_bits(problem, branch))
        kept = self.kept(first, second, key_bits(problem.length, self.seed.device))
        return kept.double() * self.kept_scale

    def row_bits(self, problem: Problem, branch: int) -> tuple[Tensor, Tensor]:
        """Two int32 (B, N, H): the key that each query draws."""
        device = self.seed.device
        tokens = torch.arange(problem.length, device=device)[:, None].expand(problem.batch, -1, problem.heads)
        heads = torch.arange(problem.heads, device=device)
        batch = torch.arange(problem.batch, device=device)[:, None, None]
        return self.bits(tokens, heads, batch, branch)

    def bits(self, tokens: Tensor, heads: Tensor, batch: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        """Two int32 tensors: the key that each query draws. Numbers of tokens, heads and batch elements broadcast."""
        return _philox(self.seed, tokens, heads, batch, torch.full((), branch, device=self.seed.device))

    def kept(self, first: Tensor, second: Tensor, keys: Tensor) -> Tensor:
        """Pairs that are kept, bool; `first` and `second` of `row_bits` and `key_bits` broadcast against each other."""
        bits = (keys ^ first).mul_(_word(FIRST))
        bits ^= _shifted(bits, 15)
        bits ^= second
        return bits.mul_(_word(SECOND)) >= self.threshold


def key_bits(length: int, device: torch.device) -> Tensor:
    """int32 (N,): each key token with its bits mixed."""
    return token_bits(torch.arange(length, device=device))


def token_bits(tokens: Tensor) -> Tensor:
    """int32: the bits of key tokens, mixed."""
    bits = tokens.to(torch.int32)
    bits = (bits ^ _shifted(bits, 16)) * _word(FIRST)
    bits = (bits ^ _shifted(bits, 13)) * _word(SECOND)
    return bits ^ _shifted(bits, 16)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10, as int32. int64 products wrap, and hold all 64 bits of a product."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (high >> 32) & WORD ^ c1 ^ k0, high & WORD
        c2, c3 = (low >> 32) & WORD ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0.to(torch.int32), c1.to(torch.int32)


def _word(value: int) -> int:
    """An unsigned word as the int32 of the same bits."""
    return value - (value >> 31 << 32)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """int32 shifted to the right, zeros following."""
    return (bits >> places) & (WORD >> places)
