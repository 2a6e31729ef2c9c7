"""Several GPUs and one sequence: weak and strong scaling of forward and backward, beside what others would do.

    torchrun --nproc-per-node 2 -m benchmarks.scale_out          # or 4, 8: benchmarks/results/scale_out_<gpu>_x2.json
    torchrun --nproc-per-node 2 -m benchmarks.scale_out --tiny   # proves, on CPUs too, that the script runs

Each series runs on one GPU (without a group), on two, and so on up to all, in one run. Before it is timed, every rank
holds its results to those of one GPU. Others, on the same shapes and all GPUs: a torchscale-style all-gather of whole
dilated keys and values, and torch's own context-parallel ring attention, which is dense and causal: it computes
something else, and is what one would use to share a sequence without this package. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import dilated_attention_pytorch as dap
from benchmarks import results
from benchmarks.environment import environment
from dilated_attention_pytorch import device as devices
from dilated_attention_pytorch.config import DTYPE_BYTES, Problem, head_offsets
from dilated_attention_pytorch.distributed import dilated_attention, shard
from dilated_attention_pytorch.distributed.agreement import agree
from dilated_attention_pytorch.distributed.layout import Shards
from dilated_attention_pytorch.runtime.arguments import DTYPES
from dilated_attention_pytorch.workloads import named
from docs import scale

RESULTS = Path(__file__).resolve().parent / "results"
TORCH = {name: dtype for dtype, name in DTYPES.items()}
BOUNDS = {"out": 8e-3, "gradients": 2e-2}
"""Twice the contract's: both sides round."""

GROWTH = 4, 2
"""How much wider and sparser branches become, where they follow the sequence: more rows travel than in LongNet."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Series:
    """One problem over more and more GPUs.

    Attributes:
        name: Of its rows.
        problem: On one GPU.
        strong: All GPUs share the problem's tokens; else each has as many.
        grows: Segments become wider and sparser up to the whole sequence, so that some cross ranks.
    """

    name: str
    problem: Problem
    strong: bool = False
    grows: bool = False

    def at(self, ranks: int) -> Problem:
        """The whole problem on so many GPUs."""
        length = self.problem.length * (1 if self.strong else ranks)
        branches = tuple(scale.grown(length, *GROWTH)) if self.grows else self.problem.branches
        return replace(self.problem, length=length, branches=branches)


def series(tokens: int, strong_tokens: int) -> tuple[Series, ...]:
    """What is measured, with so many tokens a GPU, or in all."""
    longvit, wide, longnet = (named(name).problem(tokens) for name in ("longvit", "wide", "longnet"))
    return (
        Series("weak longvit", longvit),
        Series("weak wide", wide),
        Series("weak, segments up to the sequence", longnet, grows=True),
        Series("the same, causal", replace(longnet, causal=True), grows=True),
        Series("strong wide", replace(wide, length=strong_tokens), strong=True),
    )


def main() -> int:
    """Measure in every process; the first writes the result file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the result file; named after the GPU unless given")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on CPUs too")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        print("start it with torchrun: torchrun --nproc-per-node 2 -m benchmarks.scale_out", file=sys.stderr)
        return 2
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    where = torch.device("cpu")
    if torch.cuda.is_available():
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    elif not arguments.tiny:
        print("this measurement needs GPUs; --tiny runs without", file=sys.stderr)
        return 2
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout=timedelta(minutes=3))
    chosen = series(64, 128) if arguments.tiny else series(1 << 18, 1 << 16)
    output = arguments.output
    if output is None and (gpu := devices.current(where)) is not None and not arguments.tiny:
        output = RESULTS / f"scale_out_{gpu.name}_x{dist.get_world_size()}.json"
    for document in measure(chosen, where, 1 if arguments.tiny else arguments.rounds):
        if dist.get_rank() == 0:
            done = f"{len({row['series'] for row in document['rows']})} of {len(chosen)} series"
            print(f"{done}: {document['rows'][-1]['series']}", file=sys.stderr, flush=True)
            if output is not None:  # a run that is stopped leaves what it has
                results.save(document, output)
    if dist.get_rank() == 0:
        print(scale.render(document, "none" if output is None else output.name))
    dist.destroy_process_group()
    return 0


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(chosen: Sequence[Series], where: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Everything, in the processes of the default group; after each series the document so far, the first rank's."""
    world = dist.get_world_size()
    sizes = [ranks for ranks in (1, 2, 4, 8) if ranks <= world]
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in sizes}
    document: dict[str, Any] = {
        "what": "forward and backward of one attention over several GPUs, seconds of the slowest rank, medians",
        "command": f"torchrun --nproc-per-node {world} -m benchmarks.scale_out",
        "environment": environment(),
        "ranks": world,
        "rounds": rounds,
        "agreement_s": _agreement(groups[sizes[-1]], where) if dist.get_rank() < sizes[-1] else None,
        "rows": [],
        "profile": None,
    }
    for one in chosen:
        alone: dict[str, Any] = {}
        for ranks, group in groups.items():
            if dist.get_rank() < ranks:
                row = _row(one, ranks, group, where, rounds, with_others=ranks == sizes[-1] > 1)
                alone = row if ranks == 1 else alone
                if dist.get_rank() == 0:
                    document["rows"].append(scaled(row, alone))
            dist.barrier()
        shows = one.grows and sizes[-1] > 1 and where.type == "cuda" and dist.get_rank() < sizes[-1]
        if shows and document["profile"] is None:
            document["profile"] = _profile(one, sizes[-1], groups[sizes[-1]], where)
        dist.barrier()
        yield document


def _agreement(group: dist.ProcessGroup, where: torch.device) -> float:
    """Median seconds in which ranks find that they make the same call, which each call begins with."""
    taken = []
    for _ in range(50):
        begun = time.perf_counter()
        agree(group, where, {"the call": "none"}, 0)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _row(
    one: Series, ranks: int, group: dist.ProcessGroup, where: torch.device, rounds: int, with_others: bool
) -> dict[str, Any]:
    problem = one.at(ranks)
    whole = _inputs(problem, where)
    step, q, k, v, dout = _step(problem, whole, group)
    errors = _errors(problem, whole, group) if ranks > 1 else {}
    low, median, high = _timed(step, group, where, rounds)
    peak = torch.tensor(peak_bytes(step, (q, k, v, dout), where))
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    others: dict[str, float | str] = {}
    if with_others and not problem.causal:
        others["all-gather"] = _tried(lambda: _all_gathered(problem, (q, k, v), dout, group), group, where, rounds)
        if where.type == "cuda":  # it takes seconds
            others["ring, dense causal"] = _tried(lambda: _ring(whole, group, where), group, where, rounds=1)
    sizes = _sizes(problem)
    shards = [_shards(problem, ranks, rank) for rank in range(ranks)]
    return {
        "series": one.name,
        "tokens": problem.length,
        "branches": problem.branches,
        "ranks": ranks,
        "seconds": median,
        "low": low,
        "high": high,
        "flops": scale.flops(sizes, problem.branches, problem.length // ranks, problem.length),
        "errors": errors,
        "others": others,
        **travelling(problem, ranks),
        "peak_bytes": peak.item(),
        "kept_bytes": max(scale.bytes_kept(sizes, problem.branches, own) for own in shards),
    }


def travelling(problem: Problem, ranks: int) -> dict[str, int]:
    """What a rank sends in a forward and its backward, the most of all ranks."""
    sizes = _sizes(problem)
    of_ranks = [
        scale.sent(sizes, problem.branches, own) + scale.returned(sizes, problem.branches, own)
        for own in (_shards(problem, ranks, rank) for rank in range(ranks))
    ]
    return {"sent_bytes": max(map(sum, of_ranks)), "messages": max(map(len, of_ranks))}


def _sizes(problem: Problem) -> scale.Sizes:
    element = DTYPE_BYTES[problem.dtype]
    return scale.Sizes(problem.batch, problem.heads, problem.kv_heads, problem.head_dim, element, problem.causal)


def scaled(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """A row beside the time in which one GPU does as much work."""
    expected = alone["seconds"] * row["flops"] / alone["flops"]
    links = row["sent_bytes"] / scale.LINKS["NVLink"] + row["messages"] * scale.MESSAGE_S
    return row | {"efficiency": expected / row["seconds"], "model_seconds": expected + links}


def _shards(problem: Problem, ranks: int, rank: int) -> Shards:
    return Shards((0, *accumulate([problem.length // ranks] * ranks)), rank)


def _inputs(problem: Problem, where: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and dout of the whole sequence, the same on all ranks."""
    generator = torch.Generator(where).manual_seed(0)
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    return tuple(torch.randn(shape, generator=generator, device=where).to(TORCH[problem.dtype]) for _ in range(4))


def _attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    lengths, rates = zip(*problem.branches, strict=True)
    words = {"head_offset": problem.head_offset, "is_causal": problem.causal}
    if group is None:
        return dap.dilated_attention(q, k, v, lengths, rates, **words)
    return dilated_attention(q, k, v, lengths, rates, group=group, **words)


def _step(problem: Problem, whole: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Step, Tensor, ...]:
    """A step of training of this rank's share; on one GPU, the package's function without a group."""
    q, k, v, dout = (shard(x, None, group) for x in whole)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sharing = group if group.size() > 1 else None
    return lambda: torch.autograd.grad(_attend(problem, *inputs, sharing), inputs, dout), q, k, v, dout


def _errors(problem: Problem, whole: tuple[Tensor, ...], group: dist.ProcessGroup) -> dict[str, float]:
    """Relative differences of this rank's results from those of one GPU, the largest of all ranks.

    Raises:
        SystemExit: They are more than rounding; on all ranks.
    """
    both = []
    for sharing in (None, group):
        tensors = [x.detach() if sharing is None else shard(x, None, group) for x in whole]
        inputs = [x.requires_grad_() for x in tensors[:3]]
        out = _attend(problem, *inputs, sharing)
        found = [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]
        both.append(found if sharing else [shard(x, None, group) for x in found])
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for b, a in zip(*both, strict=True)]
    worst = torch.tensor([errors[0], max(errors[1:])])
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    named_errors = dict(zip(BOUNDS, worst.tolist(), strict=True))
    if not all(named_errors[name] <= bound for name, bound in BOUNDS.items()):
        raise SystemExit(f"{problem}: results over {group.size()} ranks differ from one GPU's by {named_errors}")
    return named_errors


def _timed(step: Step, group: dist.ProcessGroup, where: torch.device, rounds: int) -> tuple[float, float, float]:
    """Least, median and most seconds of a step, of the slowest rank each time, after two that are not timed."""
    for _ in range(2 if rounds > 1 else 1):
        step()
    taken = []
    for _ in range(rounds):
        _synchronize(where)
        dist.barrier(group)
        begun = time.perf_counter()
        step()
        _synchronize(where)
        seconds = torch.tensor(time.perf_counter() - begun)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
        taken.append(seconds.item())
    return min(taken), statistics.median(taken), max(taken)


def peak_bytes(step: Step, inputs: Sequence[Tensor], where: torch.device) -> int:
    """What this rank holds at the peak of a step: its inputs, and what the step allocates."""
    if where.type == "cuda":
        _synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        step()
        allocated = torch.cuda.max_memory_allocated(where) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        allocated = _most_at_once(profile)
    return sum(x.nbytes for x in inputs) + allocated


def _most_at_once(profile: torch.profiler.profile) -> int:
    """The highest sum of what was allocated less what was freed by then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(change for _, change in changes), default=0)


def _synchronize(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _tried(call: Callable[[], Step], group: dist.ProcessGroup, where: torch.device, rounds: int) -> float | str:
    """The median of another's step, or why there is none."""
    try:
        return _timed(call(), group, where, rounds)[1]
    except Exception as error:  # who cannot do this is a row of the table
        return f"{type(error).__name__}: {error}".partition("\n")[0][:100]


def _profile(one: Series, ranks: int, group: dist.ProcessGroup, where: torch.device) -> dict[str, Any] | None:
    """How much of the messages' time on this GPU its own kernels run beside; None where none was recorded."""
    step = _step(one.at(ranks), _inputs(one.at(ranks), where), group)[0]
    step()
    _synchronize(where)
    dist.barrier(group)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        _synchronize(where)
    messages, kernels = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (messages if "nccl" in event.name.lower() else kernels).append(span)
    if not kernels:
        return None
    return {
        "series": one.name,
        "ranks": ranks,
        "step_s": (max(stop for _, stop in kernels) - min(start for start, _ in kernels)) * 1e-6,
        "messages_s": covered(messages) * 1e-6,
        "kernels_s": covered(kernels) * 1e-6,
        "overlapped_s": (covered(messages) + covered(kernels) - covered(messages + kernels)) * 1e-6,
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total


# ---- Others ----------------------------------------------------------------------------------------------------------


def _all_gathered(
    problem: Problem, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, group: dist.ProcessGroup
) -> Step:
    """torchscale's way: dilated keys and values of branches that reach beyond a rank go to all ranks, whole."""
    return lambda: torch.autograd.grad(all_gathered(problem, *inputs, group), inputs, dout)


def all_gathered(problem: Problem, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Not causal, and everything divides everything; the weights that mix the branches carry no gradient, as there."""
    steps = q.shape[1]
    outs, lses = [], []
    for width, rate in problem.branches:
        width = min(width, problem.length)
        rows = [_dilated(x, min(width, steps), rate, problem.head_offset) for x in (q, k, v)]
        if width > steps:
            first = group.rank() * steps // width * width // steps
            of_segment = slice(first, first + width // steps)
            gathered = [_AllGather.apply(x.contiguous(), group) for x in rows[1:]]
            rows[1:] = [torch.cat(x.unbind()[of_segment], dim=2) for x in gathered]
        asked, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in rows)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        if not q.is_cuda:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(asked, keys, values)[:2]
        outs.append(
            _undilated(out.transpose(1, 2).unflatten(0, rows[0].shape[:2]), steps, rate, problem.head_offset, 0.0)
        )
        lse = lse[..., : asked.shape[2]].transpose(1, 2).unsqueeze(3).unflatten(0, rows[0].shape[:2])
        lses.append(_undilated(lse.detach(), steps, rate, problem.head_offset, -torch.inf))
    weights = torch.stack(lses).softmax(0).to(q.dtype)
    return sum(out * weight for out, weight in zip(outs, weights, strict=True))


class _AllGather(torch.autograd.Function):
    """x of all ranks, (ranks, …); the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Whole tensors, to everybody."""
        ctx.group = group
        found = x.new_empty((group.size(), *x.shape))
        dist.all_gather(list(found.unbind()), x, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Reduce-scatter."""
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, [part.contiguous() for part in gradient.unbind()], group=ctx.group)
        return own, None


def _places(heads: int, rate: int, rule: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(head_offsets(rule, heads, rate)), torch.arange(heads)


def _dilated(x: Tensor, width: int, rate: int, rule: str) -> Tensor:
    """(B, n, H, D) -> (B, segments, kept rows, H, D)."""
    x = x.unflatten(1, (-1, width // rate, rate))
    offsets, heads = (place.to(x.device) for place in _places(x.shape[4], rate, rule))
    return x[:, :, :, offsets, heads]


def _undilated(rows: Tensor, steps: int, rate: int, rule: str, empty: float) -> Tensor:
    """What `_dilated` undoes: (B, segments, kept rows, H, D) -> (B, n, H, D), `empty` elsewhere."""
    offsets, heads = (place.to(rows.device) for place in _places(rows.shape[3], rate, rule))
    whole = rows.new_full((*rows.shape[:3], rate, *rows.shape[3:]), empty)
    whole[:, :, :, offsets, heads] = rows
    return whole.view(rows.shape[0], steps, *rows.shape[3:])


def _ring(whole: tuple[Tensor, ...], group: dist.ProcessGroup, where: torch.device) -> Step:
    """torch's context-parallel attention; it cuts the whole tensors, layout (B, H, N, D), where it stands."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh = DeviceMesh.from_group(group, where.type)

    def step() -> object:
        q, k, v, dout = (x.detach().transpose(1, 2).contiguous() for x in whole)
        with context_parallel(
            mesh, buffers=[q, k, v, dout], buffer_seq_dims=[2] * 4, no_restore_buffers={q, k, v, dout}
        ):
            for x in (q, k, v):
                x.requires_grad_()
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # as patched here
            return torch.autograd.grad(out, (q, k, v), dout)

    return step


if __name__ == "__main__":
    sys.exit(main())
