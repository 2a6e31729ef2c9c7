"""The one case table, its seeded inputs, the oracle's results for them, and a hypothesis strategy that draws more.

Sizes divide nothing on purpose: a kernel that is right at 64 and 128 alone is not right.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import reference
from dilated_attention_pytorch.config import Problem, head_offsets
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.reference import DropoutMask
from dilated_attention_pytorch.runtime.dropout import Dropout

from .tolerances import Results

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

Table = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One call of dilated attention, sizes and options; `branches` holds (segment length, dilation rate) pairs."""

    N: int
    branches: tuple[tuple[int, int], ...]
    B: int = 1
    H: int = 4
    G: int = 0
    D: int = 16
    queries: str = "dilated"
    head_offset: str | Table = "cyclic"
    order: str = "none"
    causal: bool = False
    mask: bool = False
    padding: str = "none"
    dropout: float = 0.0
    dtype: str = "fp32"

    @property
    def kv_heads(self) -> int:
        """G, with 0 for "as many as H"."""
        return self.G or self.H

    @property
    def id(self) -> str:
        """`N63-s16-d3-hilbert-bf16`: sizes first, then what departs from the defaults, then the dtype."""
        parts = [f"N{self.N}", *(f"s{segment}-d{rate}" for segment, rate in self.branches)]
        defaults = {"B": 1, "H": 4, "G": 0, "D": 16}
        parts += [f"{name}{getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        if self.head_offset != "cyclic":
            parts.append(self.head_offset if isinstance(self.head_offset, str) else "table")
        parts += [word for word in (self.order, self.padding) if word != "none"]
        parts += [
            word for word, on in (("all", self.queries == "all"), ("causal", self.causal), ("mask", self.mask)) if on
        ]
        parts += [f"drop{self.dropout:g}"] if self.dropout else []
        return "-".join([*parts, self.dtype])

    @property
    def offsets(self) -> Table:
        """s_h of every head in every branch; -1 where a head is absent."""
        if isinstance(self.head_offset, str):
            return tuple(head_offsets(self.head_offset, self.H, rate) for _, rate in self.branches)
        return self.head_offset

    @property
    def problem(self) -> Problem:
        """The problem key of this call; every order other than none is read through an index."""
        return Problem(
            dtype=self.dtype,
            batch=self.B,
            length=self.N,
            heads=self.H,
            kv_heads=self.kv_heads,
            head_dim=self.D,
            branches=self.branches,
            queries=self.queries,
            head_offset=self.head_offset if isinstance(self.head_offset, str) else "table",
            order="none" if self.order == "none" else "hilbert",
            causal=self.causal,
            mask=self.mask,
            dropout=self.dropout > 0.0,
            padding=self.padding,
        )


class Inputs(NamedTuple):
    """Tensors of one case; `order` are steps -> tokens, `mask` is (B, N) bool, dlse (B, H, N) float32 or float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    order: Tensor | None
    mask: Tensor | None


CASES = (
    # One branch, nothing divides anything.
    Case(N=63, branches=((16, 3),), order="hilbert", dtype="bf16"),
    Case(N=61, branches=((16, 3),)),
    Case(N=61, branches=((16, 3),), B=3, D=8, dtype="fp64"),
    Case(N=65, branches=((16, 1),), D=24),
    Case(N=130, branches=((128, 1),), H=2, D=64, dtype="bf16"),
    Case(N=37, branches=((10, 4),), B=2, H=6, D=40, dtype="fp16"),
    Case(N=29, branches=((5, 7),), H=3, D=8),  # r > w: offsets reach beyond short segments
    Case(N=50, branches=((25, 6),), H=3, D=48),  # r > H: some steps are kept by no head
    Case(N=45, branches=((64, 2),), H=2, D=80),  # w > N
    Case(N=45, branches=((45, 45),), H=2, D=8),  # one key a head
    Case(N=50, branches=((20, 1), (2**31 - 1, 2**31 - 1)), H=3, D=8),  # one key a head, by the largest rate there is
    Case(N=41, branches=((16, 33_818_641), (41, 2**31 - 1)), head_offset=((0, 39, -1, 15), (40, 0, 77, -1)), D=8),
    Case(N=1, branches=((4, 1),)),
    Case(N=1, branches=((4, 3),), H=5),
    Case(N=7, branches=((4, 2),), B=0),
    Case(N=33, branches=((33, 2),), H=1, D=256),
    Case(N=34, branches=((12, 5),), H=5, head_offset="blocked", D=96),
    Case(N=70, branches=((32, 3),), head_offset="zero", D=128, dtype="bf16"),
    # Several branches: shared keys count twice, steps kept by no branch stay empty.
    Case(N=63, branches=((16, 2), (40, 3)), B=2),
    Case(N=61, branches=((8, 1), (16, 2), (32, 4), (64, 8)), H=6, D=24, dtype="fp16"),
    Case(N=57, branches=((11, 3), (23, 5), (99, 9)), H=5, dtype="fp64"),
    Case(N=52, branches=((13, 4), (30, 6)), head_offset=((0, -1, 3, 2), (-1, -1, 5, 0)), B=2, D=8),
    Case(N=52, branches=((13, 1), (30, 6)), head_offset="blocked", order="random", causal=True, D=64, dtype="bf16"),
    # Grouped key/value heads.
    Case(N=41, branches=((16, 3), (41, 2)), H=6, G=2, B=2),
    Case(N=41, branches=((16, 3),), H=6, G=1, D=40, causal=True, mask=True),
    Case(N=43, branches=((12, 2), (25, 3)), H=8, G=4, order="random", queries="all", padding="zeros", dtype="fp64"),
    # Every token asks.
    Case(N=67, branches=((16, 3),), queries="all", B=2, D=48),
    Case(N=67, branches=((20, 4), (41, 3)), queries="all", causal=True, head_offset="zero"),
    Case(N=67, branches=((20, 4),), queries="all", causal=True, order="snake", head_offset="zero", dtype="bf16"),
    Case(N=19, branches=((4, 6),), queries="all", H=6, D=8),  # a short segment may hold no key
    Case(N=30, branches=((7, 2), (12, 5)), queries="all", mask=True, order="hilbert", B=2),
    # Orders that are not their own inverse, causal by token, key padding.
    Case(N=63, branches=((16, 3),), order="random", B=2, dtype="fp64"),
    Case(N=63, branches=((63, 1),), order="random", causal=True),
    Case(N=59, branches=((16, 3), (64, 4)), order="random", mask=True, causal=True, B=3, D=24),
    Case(N=59, branches=((16, 3), (64, 4)), causal=True),
    Case(N=59, branches=((17, 2),), mask=True, B=3, dtype="fp16"),
    # Checkpoints trained with zero padding.
    Case(N=61, branches=((16, 3), (40, 4)), padding="zeros", head_offset="blocked", B=2, D=48, dtype="fp16"),
    Case(N=61, branches=((16, 5),), padding="zeros", mask=True, B=2, queries="all"),
    Case(N=31, branches=((8, 3),), padding="zeros", causal=True, order="random"),  # causal: phantoms are trailing
    # Dropout, with everything that moves tokens, heads or keys.
    Case(N=33, branches=((16, 3),), B=2, dropout=0.1),
    Case(N=37, branches=((16, 1), (40, 3)), B=2, H=6, G=2, causal=True, mask=True, dropout=0.5, dtype="fp64"),
    Case(N=39, branches=((20, 4), (99, 2)), queries="all", order="random", causal=True, dropout=0.3, dtype="bf16"),
    Case(N=38, branches=((16, 2), (16, 2)), order="snake", padding="zeros", head_offset="zero", dropout=0.2),
    Case(N=30, branches=((13, 4), (30, 6)), head_offset=((0, -1, 3, 2), (-1, -1, 5, 0)), order="hilbert", dropout=0.9),
)


DETACHED = (
    Case(N=33, branches=((16, 2), (40, 3)), H=2, order="random", dropout=0.4),
    Case(N=61, branches=((16, 2), (40, 3)), H=2, D=24),
    Case(N=61, branches=((8, 1), (16, 2), (64, 4)), H=4, G=2, causal=True, mask=True, padding="zeros", dtype="fp16"),
)
"""Calls of several branches, whose mix is also held constant in the backward."""


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Tensors of a case, the same on every machine. The last of several batch elements is masked whole."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensor(heads: int) -> Tensor:
        return normal(case.B, case.N, heads, case.D).to(DTYPES[case.dtype]).to(device)

    dlse = normal(case.B, case.H, case.N).to(torch.float64 if case.dtype == "fp64" else torch.float32)
    mask = None
    if case.mask:
        mask = torch.rand(case.B, case.N, generator=generator) > 0.25
        if case.B > 1:
            mask[-1] = False
        mask = mask.to(device)
    order = None
    if case.order == "random":
        order = torch.randperm(case.N, generator=generator).to(device)
    elif case.order != "none":
        order = TokenOrder(case.order).indices(case.N).to(device)
    return Inputs(
        q=tensor(case.H),
        k=tensor(case.kv_heads),
        v=tensor(case.kv_heads),
        dout=tensor(case.H),
        dlse=dlse.to(device),
        order=order,
        mask=mask,
    )


def seeded_dropout(case: Case, device: str | torch.device = "cpu") -> Dropout | None:
    """The dropout of a case. Torch's generators are left where the next call draws this very seed again."""
    torch.manual_seed(1234)
    dropout = Dropout.draw(case.dropout, torch.device(device))
    torch.manual_seed(1234)
    return dropout


def dropout_mask(case: Case, dropout: Dropout | None) -> DropoutMask | None:
    """What the oracle multiplies the probabilities of each branch with."""
    return None if dropout is None else partial(dropout.multipliers, case.problem)


def arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of `reference.dilated_attention` for a case."""
    offset = case.head_offset if isinstance(case.head_offset, str) else torch.tensor(case.head_offset)
    return {
        "segment_lengths": [segment for segment, _ in case.branches],
        "dilation_rates": [rate for _, rate in case.branches],
        "queries": case.queries,
        "head_offset": offset,
        "order": inputs.order,
        "is_causal": case.causal,
        "key_padding_mask": inputs.mask,
        "padding": case.padding,
    }


def oracle(case: Case, inputs: Inputs, *, mix_grad: str = "exact") -> Results:
    """The reference's out, lse and gradients, all float64; dlse takes part where mix_grad is "exact"."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    multipliers = dropout_mask(case, seeded_dropout(case, q.device))
    given = arguments(case, inputs)
    out, lse = reference.dilated_attention(q, k, v, **given, mix_grad=mix_grad, dropout_mask=multipliers)
    # The zero keeps the graph whole where no step is kept.
    objective = (out * inputs.dout.double()).sum() + 0.0 * (q.sum() + k.sum() + v.sum())
    if mix_grad == "exact":
        objective = objective + (lse * inputs.dlse.double()).masked_fill(lse == -torch.inf, 0.0).sum()
    dq, dk, dv = torch.autograd.grad(objective, (q, k, v))
    return Results(out.detach(), lse.detach(), dq, dk, dv)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("fp32",), max_length: int = 70) -> Case:
    """Any legal case of at most three branches."""
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    branches = tuple(
        draw(st.lists(st.tuples(st.integers(1, max_length + 9), st.integers(1, 9)), min_size=1, max_size=3))
    )
    head_offset: str | Table = draw(st.sampled_from(("cyclic", "blocked", "zero", "table")))
    if head_offset == "table":
        head_offset = tuple(
            tuple(draw(st.lists(st.integers(-1, rate - 1), min_size=heads, max_size=heads))) for _, rate in branches
        )
    return Case(
        N=draw(st.integers(1, max_length)),
        branches=branches,
        B=draw(st.integers(1, 2)),
        H=heads,
        G=groups,
        D=draw(st.sampled_from((8, 16, 24))),
        queries=draw(st.sampled_from(("dilated", "all"))),
        head_offset=head_offset,
        order=draw(st.sampled_from(("none", "none", "random"))),
        causal=draw(st.booleans()),
        mask=draw(st.booleans()),
        padding=draw(st.sampled_from(("none", "zeros"))),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3))),
        dtype=draw(st.sampled_from(dtypes)),
    )
