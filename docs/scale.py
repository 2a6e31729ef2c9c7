"""`python -m docs.scale` writes the tables of docs/scale.md; with `--check` it says whether they are out of date.

The model counts what a rank computes, sends and keeps. Its one measured input is the rate of a single GPU, read from a
committed result; where a run over several GPUs is committed (`benchmarks.scale_out`), its points stand beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.config import cdiv, head_offsets
from dilated_attention_pytorch.distributed.layout import Owner, Shards

PAGE = Path(__file__).resolve().parent / "scale.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"
ONE_GPU = RESULTS / "demo_nvidia-h100-80gb-hbm3.txt"
"""LongNet's five branches over 32768 tokens on one H100, forward and backward."""

Branches = Sequence[tuple[int, int]]

LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}
"""Bytes a second that a GPU sends, one way: fourth-generation NVLink, and a 400 Gb/s adapter for each GPU."""

MESSAGE_S = 10e-6
"""What a message costs beside its bytes: an assumption, on the high side."""


@dataclass(frozen=True)
class Sizes:
    """What a row is.

    Attributes:
        batch, heads, kv_heads, head_dim: B, H, G, D.
        element: Bytes of a number.
        causal: Keys of later tokens are dropped, and tokens lie in the sequence of steps.
        mask: There is a key padding mask.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    causal: bool = False
    mask: bool = False

    @property
    def row_bytes(self) -> int:
        """A key and its value, of all batch elements."""
        return 2 * self.batch * self.head_dim * self.element


def rows_of(sizes: Sizes, rate: int, start: int, first: int, last: int) -> int:
    """Kept rows in the steps [first, last) of a segment that begins at `start`, over all (key head, offset) pairs."""
    offsets = head_offsets("cyclic", sizes.heads, rate)
    kinds = {(head * sizes.kv_heads // sizes.heads, offset) for head, offset in enumerate(offsets)}
    return sum(max(cdiv(step - start - s, rate), 0) * sign for step, sign in ((last, 1), (first, -1)) for _, s in kinds)


def sent(sizes: Sizes, branches: Branches, shards: Shards) -> list[int]:
    """Bytes of each message of a rank's forward: its kept rows of a segment that crosses ranks, to who asks them."""
    found = []
    for rate, start, own, others in _crossed(branches, shards):
        rows = rows_of(sizes, rate, start, own.first, own.last)
        receivers = sum(not sizes.causal or other.rank > own.rank for other in others)
        found += receivers * [rows * sizes.row_bytes, *[rows * sizes.batch] * sizes.mask]
    return [message for message in found if message]


def returned(sizes: Sizes, branches: Branches, shards: Shards) -> list[int]:
    """Bytes of each message of its backward: gradients of the rows that it was sent, to the ranks that hold them."""
    found = [
        rows_of(sizes, rate, start, other.first, other.last) * sizes.row_bytes
        for rate, start, own, others in _crossed(branches, shards)
        for other in others
        if not sizes.causal or other.rank < own.rank
    ]
    return [message for message in found if message]


def _crossed(branches: Branches, shards: Shards) -> Iterator[tuple[int, int, Owner, list[Owner]]]:
    """Of each segment that a rank holds in part: rate, first step, what it holds, and what others hold."""
    for width, rate in branches:
        width = shards.width(width)
        for start in shards.crossing(width):
            owners = shards.owners(start, min(start + width, shards.length))
            own = next(owner for owner in owners if owner.rank == shards.rank)
            yield rate, start, own, [owner for owner in owners if owner is not own]


def flops(sizes: Sizes, branches: Branches, steps: int, length: int) -> float:
    """Useful work of forward and backward for so many steps: 14·D a pair of query and key, half of it where causal."""
    keys_a_step = sum(min(width, length) / rate**2 for width, rate in branches)
    return 14 * sizes.head_dim * sizes.batch * sizes.heads * steps * keys_a_step / (2 if sizes.causal else 1)


def bytes_kept(sizes: Sizes, branches: Branches, shards: Shards) -> int:
    """At the peak of a backward: what a rank has of its own steps, and of segments that cross ranks.

    Of its own steps q, k, v, out, lse and the gradients of the first four. Of a segment that crosses ranks the gathered
    rows and their gradients, what comes back of its own rows from each rank that asked them, and dq of those that ask.
    """
    steps = shards.stop - shards.start
    per_step = 4 * sizes.heads + 4 * sizes.kv_heads
    kept = steps * sizes.batch * (per_step * sizes.head_dim * sizes.element + 4 * sizes.heads)
    alone = replace(sizes, kv_heads=sizes.heads)
    for rate, start, own, others in _crossed(branches, shards):
        first = min(own.first, *(other.first for other in others))
        last = own.last if sizes.causal else max(own.last, *(other.last for other in others))
        kept += 2 * rows_of(sizes, rate, start, first, last) * sizes.row_bytes
        kept += rows_of(alone, rate, start, own.first, own.last) * sizes.row_bytes // 2
    return kept + sum(sent(replace(sizes, mask=False), branches, shards))


def grown(length: int, wider: int = 2, sparser: int = 2) -> list[tuple[int, int]]:
    """Branches from (2048, 1) on, each so much wider and sparser, until a segment holds everything: LongNet's rule."""
    branches = [(2048, 1)]
    while branches[-1][0] < length:
        width, rate = branches[-1]
        branches.append((wider * width, sparser * rate))
    return branches


def rate() -> float:
    """Useful flops a second of one GPU, forward and backward, as measured."""
    found = re.search(r"this package +[\d.]+ +([\d.]+)", ONE_GPU.read_text(encoding="utf-8"))
    assert found is not None, f"{ONE_GPU} has no row of this package"
    branches = ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))
    return flops(Sizes(1, 12, 12, 64, 2), branches, 32768, 32768) / (float(found[1]) * 1e-3)


# ---- Tables ----------------------------------------------------------------------------------------------------------

LONGNET = Sizes(batch=1, heads=12, kv_heads=12, head_dim=64, element=2)
ROADS = ((1 << 20, 4), (1 << 22, 16), (1 << 24, 64), (1 << 26, 64), (1 << 28, 64), (1 << 30, 256))
"""Tokens and GPUs on the way to a billion."""


def road() -> str:
    """The way to a billion tokens, for an attention layer of LongNet's base model."""
    columns = ("tokens", "GPUs", "branches", "crossing", "compute", "MB sent", "messages", *LINKS, "GiB kept")
    lines = [_line(*columns), _line(*("---" for _ in columns))]
    for length, ranks in ROADS:
        steps, branches = length // ranks, grown(length)
        shards = Shards(tuple(range(0, length + 1, steps)), rank=ranks // 2)
        crossing = sum(shards.width(width) > steps for width, _ in branches)
        compute = flops(LONGNET, branches, steps, length) / rate()
        travels = sent(LONGNET, branches, shards) + returned(LONGNET, branches, shards)
        times = [sum(travels) / speed + len(travels) * MESSAGE_S for speed in LINKS.values()]
        kept = bytes_kept(LONGNET, branches, shards) / 2**30
        counts = (f"{length:,}", ranks, len(branches), crossing)
        cells = (
            f"{1e3 * compute:.1f} ms",
            f"{sum(travels) / 1e6:.0f}",
            len(travels),
            *(f"{1e3 * time:.1f} ms" for time in times),
        )
        lines.append(_line(*counts, *cells, f"{kept:.1f}"))
    return "\n".join(lines)


def measured() -> str:
    """What committed runs over several GPUs found, beside the model."""
    files = sorted(RESULTS.glob("scale_out_*.json"))
    if not files:
        return "No run over several GPUs is committed yet: nothing here is measured but the rate of one GPU."
    return "\n\n".join(render(json.loads(path.read_text(encoding="utf-8")), path.name) for path in files)


def render(document: dict[str, Any], file: str) -> str:
    """A result of `benchmarks.scale_out` as a table."""
    found = document["environment"]
    head = f"""\
**{document["ranks"]} × {found.get("gpu", found["cpu"])}**, torch {found["torch"]}, triton {found["triton"]},
`{document["command"]}` ([result](../benchmarks/results/{file})). Forward and backward in milliseconds: the slowest
rank, medians of {document["rounds"]}; torch's ring is timed once. Efficiency is the time in which one GPU does as much
work as each of these, over this one. The model takes that time and adds what travels, none of it hidden. MB sent are
counted, forward and backward, of the rank that sends most.
"""
    columns = ["series", "tokens", "GPUs", "ms", "efficiency", "model ms", "MB sent a GPU", "others, ms"]
    if with_memory := any(row.get("peak_bytes") for row in document["rows"]):  # results of before have none
        columns.append("peak GiB (model)")
    lines = [head, _line(*columns), _line(*("---" for _ in columns))]
    for row in document["rows"]:
        others = ", ".join(
            f"{name}: {value}" if isinstance(value, str) else f"{name} {1e3 * value:.1f}"
            for name, value in row["others"].items()
        )
        times = f"{1e3 * row['seconds']:.2f}", f"{row['efficiency']:.2f}", f"{1e3 * row['model_seconds']:.2f}"
        cells = [row["series"], f"{row['tokens']:,}", row["ranks"], *times, f"{row['sent_bytes'] / 1e6:.1f}", others]
        if with_memory:
            cells.append(_memory(row))
        lines.append(_line(*cells))
    lines.append(
        f"\nThe ranks' agreement at the beginning of each call takes the host {1e6 * document['agreement_s']:.0f} µs."
    )
    if (profile := document["profile"]) is not None:
        lines.append(
            f"\nIn a profile of {profile['series']}, {profile['ranks']} GPUs, messages took "
            f"{1e3 * profile['messages_s']:.2f} ms on the first one, {1e3 * profile['overlapped_s']:.2f} ms of them "
            "beside its kernels."
        )
    return "\n".join(lines)


def _memory(row: dict[str, Any]) -> str:
    """What a step takes at its peak, beside what `bytes_kept` says of it."""
    if not row.get("peak_bytes"):
        return ""
    return f"{row['peak_bytes'] / 2**30:.2f} ({row['kept_bytes'] / 2**30:.2f})"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


MARKS = {"road": road, "measured": measured}


def written(text: str) -> str:
    """The page with its tables computed anew."""
    for name, table in MARKS.items():
        start, stop = f"<!-- {name}: python -m docs.scale -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(start)
        tail = rest.partition(stop)[2]
        text = f"{head}{start}\n\n{table()}\n\n{stop}{tail}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(prog="python -m docs.scale", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is out of date")
    text = PAGE.read_text(encoding="utf-8")
    if parser.parse_args(arguments).check:
        if written(text) != text:
            print("docs/scale.md is out of date: python -m docs.scale", file=sys.stderr)
        return int(written(text) != text)
    PAGE.write_text(written(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
