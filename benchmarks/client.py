"""`python -m benchmarks.client`: the table of the client's guide, measured again on a GPU, and its two claims.

The table: standard attention, the same along a token order, and the full core, at N = 1024, beside what the guide
printed; SDPA takes part as the peer that everybody has. The claims: the core's backward is at least 4 times as fast as
autograd through the vectorised formula in the same dtype, and takes less than half the memory.

All contenders share weights and inputs, and are compared with each other before they are timed. Times are medians on
the GPU, in turns, with a cold cache; forward is that of training. The backward is timed alone, for all gradients.

    python -m benchmarks.client           # on a GPU: benchmarks/results/client_<gpu>.json, in about a minute
    python -m benchmarks.client --page    # puts the results that are there into docs/client.md
    python -m benchmarks.client --tiny    # proves, on a CPU too, that the script runs; its numbers mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.environment import environment
from benchmarks.rows import relative_error
from benchmarks.timing import Call, interleaved, peak_bytes
from dilated_attention_pytorch import TokenOrder, device, explain
from dilated_attention_pytorch.kernels import HilbertAttentionCore
from dilated_attention_pytorch.kernels.hilbert_attention_core import core_attention

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "client.md"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 5e-2}
"""Largest relative difference between contenders that is rounding; a wrong formula is off by 0.5 or more."""

GUIDE = {
    "standard attention": ("~4.5", "~15", "~350 MB"),
    "ordering only": ("~4.2", "~12", "~326 MB"),
    "full core": ("~4.0", "~20", "~156 MB"),
}
"""What the client's guide printed: forward and backward in ms, memory; it names no GPU, dtype or batch."""

SCOPES = {
    "attention": "of the attention itself, which is what has the backward",
    "module": "of the whole module, its projections included",
}

FASTER, SHARE = 4.0, 0.5
"""What the claims ask for: so many times faster, at most this share of the memory."""


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batch, hidden, heads, segment: Of the core.
        table: N of the guide's table.
        claims: Every N at which the claims are tried.
        rounds: How often a contender is timed at most.
    """

    batch: int = 4
    hidden: int = 768
    heads: int = 12
    segment: int = 128
    table: int = 1024
    claims: tuple[int, ...] = (1024, 4096, 16384, 65536)
    rounds: int = 15


TINY = Sizes(batch=1, hidden=48, heads=3, segment=16, table=40, claims=(40, 64), rounds=1)

Contender = Callable[..., Tensor]


def main() -> int:
    """Measure, write the result file, print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the result file; with a GPU named after it unless given")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    parser.add_argument("--page", action="store_true", help="write docs/client.md anew; nothing is measured")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    gpu = device.current()
    if gpu is None and not arguments.tiny:
        print("this measurement needs a GPU; --tiny runs without one")
        return 2
    document = measure(TINY if arguments.tiny else Sizes(), torch.device("cpu" if gpu is None else "cuda"))
    output = arguments.output
    if output is None and gpu is not None and not arguments.tiny:
        output = RESULTS / f"client_{gpu.name}.json"
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(render(document, output.name if output else "none"))
    return 0


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, where: torch.device) -> dict[str, Any]:
    """Everything: environment, the rows of the table, the rows of the claims."""
    return {
        "what": "the client's table and its two claims; ms are medians on the device, bytes are peaks of a whole step",
        "command": "python -m benchmarks.client",
        "environment": environment(),
        "sizes": asdict(sizes),
        "table": [row for dtype in DTYPES for row in table_rows(sizes, dtype, where)],
        "claims": [
            row for length in sizes.claims for dtype in DTYPES for row in claim_rows(sizes, length, dtype, where)
        ],
    }


def table_rows(sizes: Sizes, dtype: str, where: torch.device) -> list[dict[str, Any]]:
    """The guide's rows and SDPA in one dtype."""
    core, x = make(sizes, sizes.table, dtype, where)
    curve = TokenOrder("snake")
    order, inverse = (index.to(where) for index in (curve.indices(sizes.table), curve.inverse(sizes.table)))

    def ordered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q[:, order], k[:, order], v[:, order])[:, inverse]

    whole = {
        "standard attention": between_projections(core, dense),
        "ordering only": between_projections(core, ordered),
        "SDPA": between_projections(core, sdpa),
    }
    leaves = [x, *core.parameters()]
    formula = between_projections(core, within_segments(sizes, use_custom_backward=False))
    agree(whole, [x], leaves, dtype)
    agree({"full core": core, "its formula": formula}, [x], leaves, dtype)
    found = times_and_peaks({**whole, "full core": core}, [x], leaves, sizes.rounds)
    return [{"row": name, "dtype": dtype, **numbers} for name, numbers in found.items()]


def claim_rows(sizes: Sizes, length: int, dtype: str, where: torch.device) -> list[dict[str, Any]]:
    """The core beside its own formula under autograd, without projections and with them."""
    core, x = make(sizes, length, dtype, where)
    q, k, v = (part.detach().clone().requires_grad_() for part in split(core, x))
    custom, formula = (within_segments(sizes, use_custom_backward=own) for own in (True, False))
    scopes: dict[str, tuple[dict[str, Contender], list[Tensor], list[Tensor]]] = {
        "attention": ({"custom": custom, "formula": formula}, [q, k, v], []),
        "module": ({"custom": core, "formula": between_projections(core, formula)}, [x], list(core.parameters())),
    }
    rows = []
    for scope, (contenders, inputs, learned) in scopes.items():
        leaves = [*inputs, *learned]
        agree(contenders, inputs, leaves, dtype)
        found = times_and_peaks(contenders, inputs, leaves, sizes.rounds)
        faster = found["formula"]["backward_ms"] / found["custom"]["backward_ms"]
        share = found["custom"]["peak_bytes"] / found["formula"]["peak_bytes"]
        rows.append(
            {
                "scope": scope,
                "length": length,
                "dtype": dtype,
                "kernel": kernel(sizes, q, k, v),
                **found,
                "faster": round(faster, 2),
                "memory_share": round(share, 3),
                "holds": faster >= FASTER and share < SHARE,
            }
        )
    return rows


def times_and_peaks(
    contenders: Mapping[str, Contender], inputs: Sequence[Tensor], leaves: Sequence[Tensor], rounds: int
) -> dict[str, dict[str, Any]]:
    """Of each contender: forward and backward in ms, with least and most, and the peak of both together in bytes."""
    where = inputs[0].device

    dout = normal(inputs[0], seed=2)  # shaped like the result, of hidden states as of q

    def step(attend: Contender) -> Call:
        return lambda: torch.autograd.grad(attend(*inputs), leaves, dout)

    def backward(attend: Contender) -> Call:
        out = attend(*inputs)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    forwards = interleaved({name: partial(attend, *inputs) for name, attend in contenders.items()}, where, rounds)
    peaks = {name: peak_bytes(step(attend), where) for name, attend in contenders.items()}
    backwards = interleaved({name: backward(attend) for name, attend in contenders.items()}, where, rounds)
    return {
        name: {
            "forward_ms": round(forwards[name].median, 4),
            "forward_low_high": [round(forwards[name].low, 4), round(forwards[name].high, 4)],
            "backward_ms": round(backwards[name].median, 4),
            "backward_low_high": [round(backwards[name].low, 4), round(backwards[name].high, 4)],
            "peak_bytes": peaks[name],
        }
        for name in contenders
    }


def agree(contenders: Mapping[str, Contender], inputs: Sequence[Tensor], leaves: Sequence[Tensor], dtype: str) -> None:
    """End the run if contenders compute different things, gradients included."""
    first = None
    for name, attend in contenders.items():
        out = attend(*inputs)
        results = [out, *torch.autograd.grad(out, leaves, normal(out, seed=2))]
        if first is None:
            first = [result.double() for result in results]
            continue
        worst = max(relative_error(mine, theirs) for mine, theirs in zip(results, first, strict=True))
        if not worst <= AGREEMENT[dtype]:
            raise SystemExit(
                f"{name} differs by {worst:.1e} from {next(iter(contenders))} in {dtype}: nothing is timed"
            )


# ---- Contenders ------------------------------------------------------------------------------------------------------


def make(sizes: Sizes, length: int, dtype: str, where: torch.device) -> tuple[HilbertAttentionCore, Tensor]:
    """A core and hidden states, seeded."""
    torch.manual_seed(0)
    core = HilbertAttentionCore(sizes.hidden, sizes.heads, sizes.segment, device=where, dtype=DTYPES[dtype])
    like = torch.empty(sizes.batch, length, sizes.hidden, device=where, dtype=DTYPES[dtype])
    return core, normal(like, seed=1).requires_grad_()


def normal(like: Tensor, seed: int) -> Tensor:
    """Random numbers shaped like another tensor."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)


def split(core: HilbertAttentionCore, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, N, H, D) of hidden states."""
    return core.qkv_proj(x).unflatten(2, (3, core.num_heads, core.head_dim)).unbind(2)


def between_projections(core: HilbertAttentionCore, attend: Contender) -> Contender:
    """An attention as a function of hidden states, with the core's projections."""
    return lambda x: core.out_proj(attend(*split(core, x)).flatten(2))


def within_segments(sizes: Sizes, *, use_custom_backward: bool) -> Contender:
    """The core's attention without its projections."""
    return partial(
        core_attention,
        segment_lengths=[sizes.segment],
        dilation_rates=[1],
        order=TokenOrder("snake"),
        use_custom_backward=use_custom_backward,
    )


def kernel(sizes: Sizes, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The text that the core's forward runs, or the backend that has none."""
    plan = explain(q, k, v, sizes.segment, 1, queries="all", head_offset="zero", order="snake")
    return plan.fwd[0].variant.name if plan.backend == "triton" else plan.backend


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token over every token, all scores in memory: (B, N, H, D) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q * q.shape[3] ** -0.5 @ k.mT).softmax(dim=3)
    return (weights @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by PyTorch's fused kernels."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---- The page --------------------------------------------------------------------------------------------------------


def with_results(page: str) -> str:
    """docs/client.md with a section for each result that is there, at its end."""
    text = page.partition("\n## Measured on ")[0]
    for path in sorted(RESULTS.glob("client_*.json")):
        text += "\n" + render(json.loads(path.read_text(encoding="utf-8")), path.name)
    return text


def render(document: Mapping[str, Any], file: str) -> str:
    """The section of docs/client.md for a result."""
    sizes, found, claims = document["sizes"], document["environment"], document["claims"]
    machine = found.get("gpu", found["cpu"])
    table = []
    for name in [*GUIDE, "SDPA"]:
        if name in GUIDE:
            table.append(f"| {name} | the guide's | {' | '.join(GUIDE[name])} |")
        table += [f"| {name} | {row['dtype']} | {_cells(row)} |" for row in document["table"] if row["row"] == name]
    text = f"""\
## Measured on {machine}

torch {found["torch"]}, triton {found["triton"]}, `{document["command"]}` ([result](../benchmarks/results/{file})).
Batch {sizes["batch"]}, hidden_dim {sizes["hidden"]}, {sizes["heads"]} heads, segments of {sizes["segment"]}, dilation
rate 1. Medians in milliseconds: the forward as in training, the backward alone and for all gradients. Memory is the
peak of both together, inputs and weights not counted.

The guide's table, N = {sizes["table"]}. Its own figures name no GPU, dtype or batch, and "full core" computes another
attention than the rows above it: within segments.

| | dtype | forward | backward | peak memory |
| --- | --- | --- | --- | --- |
{_lines(table)}
"""
    for scope, what in SCOPES.items():
        rows = [row for row in claims if row["scope"] == scope]
        kept = [
            f"| {row['length']} | {row['dtype']} | {_cells(row['formula'])} | {_cells(row['custom'])} "
            f"| {row['faster']:.1f} | {row['memory_share']:.2f} | {'yes' if row['holds'] else '**no**'} |"
            for row in rows
        ]
        text += f"""
The claims, {what}: both hold in {sum(row["holds"] for row in rows)} of {len(rows)} cases.

| N | dtype | formula: forward | backward | memory | core: forward | backward | memory | faster | share | holds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{_lines(kept)}
"""
    return text


def _lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)


def _cells(numbers: Mapping[str, Any]) -> str:
    memory = numbers["peak_bytes"] / 2**20
    return f"{numbers['forward_ms']:.3f} | {numbers['backward_ms']:.3f} | {memory:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
