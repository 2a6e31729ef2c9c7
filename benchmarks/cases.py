"""What is measured, the most telling cases first: a run that its budget cuts short is of use."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dilated_attention_pytorch.config import DTYPE_BYTES, Problem, cdiv
from dilated_attention_pytorch.order import TokenOrder
from dilated_attention_pytorch.workloads import WORKLOADS, Workload, named, near_square

LEVELS = ("kernels", "operations", "latency", "scale")
"""One branch's kernels; whole operations; the first call of a process; time and memory against N."""

KEPT_ROWS = 32768
"""Of all segments of a kernel's case: N is so many times the dilation rate."""
KERNEL_HEADS = 16

ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FIRST_ROWS = (2048, 128, 8192, 512, 256, 1024)
HEAD_DIMS = (64, 128, 48, 96)
RATES = (4, 1, 2, 8)
ORDERS = ("none", "snake", "hilbert")

SCALE = tuple(1 << power for power in range(12, 25))
"""4 k to 16 M tokens."""
SCALED = ("longvit", "wide")


@dataclass(frozen=True)
class Case:
    """One row of a table, with all its contenders.

    Attributes:
        name: Unique.
        level: Of `LEVELS`.
        problem: What is computed.
        workload: Whose it is, or "kernels".
        tier: Cases of a tier are prepared together; lower ones come first.
        order: The token order, where there is one.
        slow: Contenders that take long to compile take part too: FlexAttention; of first calls, a compiled composition.
    """

    name: str
    level: str
    problem: Problem
    workload: str
    tier: int
    order: TokenOrder | None = None
    slow: bool = False


def catalogue() -> list[Case]:
    """Every case, the first tier in the order of its importance."""
    found: dict[str, Case] = {}
    for case in itertools.chain(_first(), _second(), _third()):
        found.setdefault(case.name, case)
    return sorted(found.values(), key=lambda case: case.tier)


def selected(
    levels: Sequence[str] = (), workloads: Sequence[str] = (), pattern: str = "*", tier: int | None = None
) -> list[Case]:
    """Cases of these levels and workloads (all, where none is named) whose name matches, up to a tier."""
    return [
        case
        for case in catalogue()
        if (not levels or case.level in levels)
        and (not workloads or case.workload in workloads)
        and fnmatch.fnmatchcase(case.name, pattern)
        and (tier is None or case.tier <= tier)
    ]


def _first() -> Iterator[Case]:
    """What the goals are about."""
    yield operation("longnet", 1, slow=True)
    yield operation("wide", 1)
    yield operation("gigapath", 1)
    yield operation("longnet", 1, causal=True)
    for causal, rows, head_dim in itertools.product((False, True), FIRST_ROWS, (64, 128)):
        yield kernel(rows, head_dim, 4, 1, causal=causal)
        if rows <= 256:
            yield kernel(rows, head_dim, 1, 1, causal=causal)
    yield operation("core", 1, length=4096, pattern=1, dtype="bf16")
    for order, rate in itertools.product(("hilbert", "snake"), (1, 4)):
        yield kernel(2048, 64, rate, 1, order=order)
    for batch, length, head_dim, branch in ((4, 16384, 64, (2048, 2)), (2, 32768, 128, (8192, 4))):
        problem = Problem("bf16", batch, length, 16, 16, head_dim, (branch,))
        yield Case(f"op-branch-w{branch[0]}-r{branch[1]}-d{head_dim}", "operations", problem, "branch", 1)
    yield first_call("longnet", 1)


def _second() -> Iterator[Case]:
    """The rest of what people run, and how it grows."""
    for workload in WORKLOADS.values():
        for length, pattern, dtype, causal in itertools.product(
            workload.lengths, range(len(workload.patterns)), workload.dtypes, workload.causal
        ):
            yield operation(workload.name, 2, length=length, pattern=pattern, dtype=dtype, causal=causal)
    for causal, rows, head_dim in itertools.product((False, True), FIRST_ROWS, (64, 128)):
        yield kernel(rows, head_dim, 1, 2, causal=causal, slow=rows in (512, 2048))
    for name, length in itertools.product(SCALED, SCALE):
        workload = named(name)
        yield Case(f"scale-{name}-{length}", "scale", workload.problem(length), name, 2)
    yield first_call("core", 2)
    yield first_call("longnet", 2, slow=True)


def _third() -> Iterator[Case]:
    """The whole grid of kernels."""
    grid = itertools.product(RATES, HEAD_DIMS, ROWS, (False, True))
    for rate, head_dim, rows, causal in grid:
        yield kernel(rows, head_dim, rate, 3, causal=causal)
    for order, rate, head_dim, rows in itertools.product(ORDERS[1:], RATES, HEAD_DIMS, ROWS):
        yield kernel(rows, head_dim, rate, 3, order=order)


def kernel(
    rows: int,
    head_dim: int,
    rate: int,
    tier: int,
    *,
    causal: bool = False,
    order: str = "none",
    slow: bool = False,
) -> Case:
    """One branch in bf16 of so many kept rows a segment; its segments, heads and rows all divide."""
    length = KEPT_ROWS * rate
    problem = Problem(
        dtype="bf16",
        batch=1,
        length=length,
        heads=KERNEL_HEADS,
        kv_heads=KERNEL_HEADS,
        head_dim=head_dim,
        branches=((rows * rate, rate),),
        order=order,
        row_width=near_square(length) if order == "snake" else 0,
        causal=causal,
    )
    name = f"kernel-n{rows}-d{head_dim}-r{rate}" + ("-causal" if causal else "") + _suffix(order)
    return Case(name, "kernels", problem, "kernels", tier, None if order == "none" else TokenOrder(order), slow)


def operation(
    name: str,
    tier: int,
    *,
    length: int | None = None,
    pattern: int = 0,
    dtype: str | None = None,
    causal: bool = False,
    slow: bool = False,
) -> Case:
    """One call of a workload."""
    workload = named(name)
    problem = workload.problem(length, pattern, dtype, causal)
    words = ["op", name]
    words += [str(problem.length)] if len(workload.lengths) > 1 else []
    words += [f"r{problem.branches[0][1]}"] if len(workload.patterns) > 1 else []
    words += [problem.dtype] if len(workload.dtypes) > 1 else []
    words += ["causal"] if causal else []
    return Case("-".join(words), "operations", problem, name, tier, order_of(workload), slow)


def first_call(name: str, tier: int, *, slow: bool = False) -> Case:
    """What the first call of a process costs."""
    workload = named(name)
    problem = replace(workload.problem(), dtype="bf16")
    called = f"latency-{name}" + ("-compiled" if slow else "")
    return Case(called, "latency", problem, name, tier, order_of(workload), slow)


def order_of(workload: Workload) -> TokenOrder | None:
    """The order of a workload, with the tokens in front of its grid."""
    return None if workload.order == "none" else TokenOrder(workload.order, prefix=workload.prefix)


def _suffix(order: str) -> str:
    return "" if order == "none" else f"-{order}"


# ---- What a case must cost at least ----------------------------------------------------------------------------------

GRADIENT_FLOPS = 2.5
"""Of a backward, in forwards: five products for two."""


def useful_flops(problem: Problem) -> float:
    """Of a forward: 4·D for each pair of a query and a key, half of them where it is causal."""
    pairs = 0
    for branch, (_, rate) in enumerate(problem.branches):
        width = problem.segment(branch)
        whole, rest = divmod(problem.length, width)
        for count, steps in ((whole, width), (1, rest)):
            # Kept rows differ by one between residues: their mean, squared.
            keys = steps / rate
            queries = steps if problem.queries == "all" else keys
            pairs += count * queries * keys / (2 if problem.causal else 1)
    return 4.0 * problem.batch * problem.heads * problem.head_dim * pairs


def least_bytes(problem: Problem) -> dict[str, float]:
    """What must move: each row that takes part is read or written once, and so are the zero rows of `zero_bytes`."""
    q, kv, asked, share = _tensors(problem)
    lse = 4 * problem.heads * problem.batch * problem.length
    zeros = zero_bytes(problem)
    forward = asked * (2 * q + lse) + share * kv + zeros["forward"]  # q, k, v; out, lse
    backward = asked * (4 * q + lse) + 2 * share * kv + zeros["backward"]  # q, out, dout, k, v, lse; dq, dk, dv
    return {"forward": forward, "backward": backward, "both": forward + backward}


def zero_bytes(problem: Problem) -> dict[str, float]:
    """Of results, the rows of steps that no branch keeps: out in the forward; dq, dk and dv in the backward."""
    q, kv, asked, share = _tensors(problem)
    return {"forward": (1 - asked) * q, "backward": (1 - asked) * q + (1 - share) * kv}


def _tensors(problem: Problem) -> tuple[float, float, float, float]:
    """Bytes of q, and of k and v; the share of their rows that asks, and that is asked."""
    share = min(1.0, sum(1 / rate for _, rate in problem.branches))
    tokens = problem.batch * problem.length * problem.head_dim * DTYPE_BYTES[problem.dtype]
    return problem.heads * tokens, 2 * problem.kv_heads * tokens, 1.0 if problem.queries == "all" else share, share


def limits_ms(problem: Problem, tflops: float, bandwidth: float) -> dict[str, float]:
    """The physical limit of each measurement: the larger of arithmetic and traffic.

    Args:
        problem: What is computed.
        tflops: The fastest matrix product, in 10^12 operations a second.
        bandwidth: The fastest copy, bytes read and written, in 10^12 a second.
    """
    flops, moved = useful_flops(problem), least_bytes(problem)
    work = {"forward": flops, "backward": GRADIENT_FLOPS * flops}
    times = {name: max(work[name] / tflops, moved[name] / bandwidth) / 1e9 for name in work}
    return {**times, "both": times["forward"] + times["backward"]}


assert cdiv(max(ROWS), KEPT_ROWS) == 1
