"""How the torch backend cuts a branch into calls of torch's kernels: what a measurement on a CPU picks."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .config import DTYPE_BYTES, Problem
from .errors import ConfigError

OPS = ("fwd", "dkdv")
"""What is measured on a CPU: a forward, and the backward, which gives all gradients at once."""
ROWS = ("view", "pack")
PAGE = 4096
"""Rows a multiple of so many bytes apart share few sets of a cache."""


@dataclass(frozen=True, order=True)
class CallConfig:
    """Sizes of the calls of one branch, forward or backward.

    Attributes:
        rows: "view": a call reads its rows where they lie, and so takes heads of one offset; "pack": it gets copies,
            those of several offsets side by side. A token order and 16-bit numbers are copied anyway.
        pairs: (batch, segment, head) pairs that a call has for each thread at least.
        share: Otherwise an operand of a call is one in so many parts of q at most; half of that where it is packed and
            the output is in memory already.
    """

    rows: str
    pairs: int = 1
    share: int = 4

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ConfigError(f"rows must be 'view' or 'pack', got {self.rows!r}")
        for label in ("pairs", "share"):
            value = getattr(self, label)
            if not isinstance(value, int) or not 1 <= value <= 1024:
                raise ConfigError(f"{label} must be an integer from 1 to 1024, got {value!r}")

    @classmethod
    def untuned(cls, op: str, problem: Problem, branch: int) -> CallConfig:
        """What is good where nothing was measured.

        Args:
            op: One of `OPS`. The backward reads its rows several times, and divides pairs among threads but not the
                rows of a pair.
            problem: The call.
            branch: Index into its branches.
        """
        rate = problem.branches[branch][1]
        copied = problem.order != "none" or problem.dtype in ("bf16", "fp16")
        if op == "fwd":
            return cls("pack" if copied or rate > 1 else "view")
        aliased = rate > 1 and rate * problem.heads * problem.head_dim * DTYPE_BYTES[problem.dtype] % PAGE == 0
        return cls("pack" if copied or aliased else "view", pairs=2)

    @property
    def name(self) -> str:
        """`pack_p1_s4`."""
        return f"{self.rows}_p{self.pairs}_s{self.share}"

    def to_dict(self) -> dict[str, int | str]:
        """Fields for YAML."""
        return asdict(self)
