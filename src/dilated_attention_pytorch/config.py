"""Launch configurations, problems and the keys they are measured under. Plain values: no torch, no triton.

`Problem` is everything that a plan may depend on. It holds no tensor, so that a laptop can ask what another GPU
would run. `LaunchConfig` is what a measurement picks; `ProblemKey` is what the measurement is stored under.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import ConfigError
from .variant import ORDERS, QUERIES

OPS = ("fwd", "dkdv", "dq")
"""Operations that every branch has a launch of."""
BACKWARD = "bwd"
"""One launch that gives dq, dk and dv, in the place of the last two."""
EVERY_OP = (*OPS, BACKWARD)
RESULTS = {"fwd": ("out", "lse"), "dkdv": ("dk", "dv"), "dq": ("dq",), BACKWARD: ("dq", "dk", "dv")}
"""What a launch of each operation writes."""
BY_KEYS = ("dkdv", BACKWARD)
"""Operations whose programs own tiles of keys."""
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
HEAD_OFFSETS = ("cyclic", "blocked", "zero", "table")
FLAGS = ("dropout", "full", "mask", "tf32", "zeros")
GRID_CAP = 512
"""Above this many (segment, batch, head) pairs every GPU we know is full: they share one bucket."""


def cdiv(a: int, b: int) -> int:
    """⌈a/b⌉ for integers."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (1 for n ≤ 1)."""
    return 1 << max(n - 1, 0).bit_length()


def head_offsets(rule: str, heads: int, rate: int) -> tuple[int, ...]:
    """First kept step s_h of each query head in a segment of dilation `rate`.

    Args:
        rule: "cyclic" (LongNet: h mod r), "blocked" (torchscale: ⌊h / ⌈H/r⌉⌋) or "zero".
        heads: H, query heads.
        rate: r, the dilation rate.

    Raises:
        ConfigError: The rule is none of these; explicit offsets ("table") come from the caller.
    """
    if rule == "cyclic":
        return tuple(head % rate for head in range(heads))
    if rule == "blocked":
        return tuple(head // cdiv(heads, rate) for head in range(heads))
    if rule == "zero":
        return (0,) * heads
    raise ConfigError(f"head_offset must be 'cyclic', 'blocked' or 'zero' to follow a rule, got {rule!r}")


SIZES = ("block_m", "block_n", "num_warps", "num_stages")
"""Fields of a `LaunchConfig` that are always written; the others are where they have not their default."""

LOADS = ("pointer", "descriptor", "ring", "producer")
"""How tiles get to where products take them from."""
IN_GLUON = ("ring", "producer")
"""Of these, what texts in Gluon do."""


@dataclass(frozen=True, order=True)
class LaunchConfig:
    """Sizes of one kernel launch, in the order a person would say them.

    Attributes:
        block_m: Query rows a tile.
        block_n: Key rows a tile.
        num_warps: Warps a CTA.
        num_stages: Software-pipelining depth of the loads in the loop; places of the ring, where there is one.
        maxnreg: Registers a thread at most; None leaves it to the compiler.
        loads: "pointer", "descriptor", "ring": by descriptor into a ring of tiles that a kernel in Gluon keeps, or
            "producer": into one that a warp of its own fills, for CTAs that stay.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    loads: str = "pointer"

    def __post_init__(self) -> None:
        for label in ("block_m", "block_n", "num_warps"):
            value = getattr(self, label)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ConfigError(f"{label} must be a power of two, got {value!r}")
        for label in ("block_m", "block_n"):
            if not 16 <= getattr(self, label) <= 1024:
                raise ConfigError(f"{label} must lie in 16..1024, got {getattr(self, label)}")
        if self.num_warps > 32:
            raise ConfigError(f"num_warps must be at most 32, got {self.num_warps}")
        if not isinstance(self.num_stages, int) or not 1 <= self.num_stages <= 8:
            raise ConfigError(f"num_stages must lie in 1..8, got {self.num_stages!r}")
        if self.maxnreg is not None and (not isinstance(self.maxnreg, int) or not 24 <= self.maxnreg <= 255):
            raise ConfigError(f"maxnreg must lie in 24..255 or be absent, got {self.maxnreg!r}")
        if self.loads not in LOADS:
            raise ConfigError(f"loads must be one of {', '.join(LOADS)}, got {self.loads!r}")

    @property
    def name(self) -> str:
        """`128x64_w8_s3`, with `_r168` and `_descriptor` where set."""
        text = f"{self.block_m}x{self.block_n}_w{self.num_warps}_s{self.num_stages}"
        if self.maxnreg is not None:
            text += f"_r{self.maxnreg}"
        if self.loads != "pointer":
            text += f"_{self.loads}"
        return text

    def to_dict(self) -> dict[str, int | str]:
        """Fields for YAML; the optional ones are left out where they have their default."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in SIZES or getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class Problem:
    """One call of `dilated_attention` without its tensors. Field names follow the function's arguments.

    Attributes:
        dtype: "bf16", "fp16", "fp32" or "fp64".
        batch: B.
        length: N, tokens of the sequence.
        heads: H, query heads.
        kv_heads: G, key/value heads.
        head_dim: D.
        branches: (segment length, dilation rate) pairs as the caller gave them.
        queries: "dilated" or "all".
        head_offset: "cyclic", "blocked", "zero", or "table" for explicit offsets.
        order: "none", "snake" (two-dimensional, computed) or "hilbert" (any permutation through an index).
        row_width: Tokens a grid row where order is "snake", else 0.
        prefix: Leading tokens that keep the first steps, where order is "snake".
        causal: Keys of later tokens are dropped.
        mask: A key padding mask is given.
        dropout: Probabilities are dropped.
        padding: "none" or "zeros".
        mix_grad: "exact" or "detached".
        positive_scale: The scores' factor is positive, so that the largest product is the largest score.
        tf32: fp32 products may round to tf32.
        deterministic: Atomics are excluded.
        query_range: Query steps [a, b) of this launch; None is all of them.
    """

    dtype: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    branches: tuple[tuple[int, int], ...]
    queries: str = "dilated"
    head_offset: str = "cyclic"
    order: str = "none"
    row_width: int = 0
    prefix: int = 0
    causal: bool = False
    mask: bool = False
    dropout: bool = False
    padding: str = "none"
    mix_grad: str = "exact"
    positive_scale: bool = True
    tf32: bool = False
    deterministic: bool = False
    query_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for label, value, words in (
            ("dtype", self.dtype, tuple(DTYPE_BYTES)),
            ("queries", self.queries, QUERIES),
            ("head_offset", self.head_offset, HEAD_OFFSETS),
            ("order", self.order, ORDERS),
            ("padding", self.padding, ("none", "zeros")),
            ("mix_grad", self.mix_grad, ("exact", "detached")),
        ):
            if value not in words:
                raise ConfigError(f"{label} must be one of {', '.join(words)}, got {value!r}")

    def segment(self, branch: int) -> int:
        """w of a branch as it acts: min(w, N) steps, at least 1."""
        return max(min(self.branches[branch][0], self.length), 1)

    def is_full(self, branch: int) -> bool:
        """One segment holds the whole sequence."""
        return self.branches[branch][0] >= self.length

    def rows(self, branch: int) -> int:
        """Kept rows ⌈min(w, N)/r⌉ of a whole segment."""
        return cdiv(self.segment(branch), self.branches[branch][1])

    def segments(self, branch: int) -> int:
        """Segments of the sequence, the short last one counted."""
        return cdiv(self.length, self.segment(branch))


def round_rows(rows: int) -> int:
    """Rows rounded up to an eighth of a power of two: 1..8 stay, 100 -> 104, 2048 -> 2048, 2049 -> 2304."""
    step = max(next_power_of_two(rows + 1) // 16, 1)
    return cdiv(rows, step) * step


@dataclass(frozen=True, order=True)
class ProblemKey:
    """What a measurement is stored under: never raw N, B or H (see docs of the tuning database)."""

    op: str
    dtype: str
    head_dim: int
    branches: tuple[tuple[int, int], ...]
    """(rows, stride) pairs; one for a single-branch kernel."""
    queries: str
    order: str
    causal: bool
    flags: tuple[str, ...]
    grid: int

    @property
    def is_joint(self) -> bool:
        """Of a launch that stands in for several: it computes several branches in one pass, or all gradients."""
        return len(self.branches) > 1 or self.op == BACKWARD

    @classmethod
    def of(cls, problem: Problem, op: str, *branches: int) -> ProblemKey:
        """The key of the launch of `op` that computes a branch of a problem, or a chain, the narrowest first."""
        flags = {
            "dropout": problem.dropout,
            "full": all(map(problem.is_full, branches)),
            "mask": problem.mask,
            "tf32": problem.tf32,
            "zeros": problem.padding == "zeros",
        }
        pairs = problem.segments(branches[0]) * problem.batch * problem.heads
        return cls(
            op=op,
            dtype=problem.dtype,
            head_dim=problem.head_dim,
            branches=tuple((round_rows(problem.rows(branch)), problem.branches[branch][1]) for branch in branches),
            queries=problem.queries,
            order=problem.order,
            causal=problem.causal,
            flags=tuple(name for name in FLAGS if flags[name]),
            grid=min(next_power_of_two(pairs), GRID_CAP),
        )
