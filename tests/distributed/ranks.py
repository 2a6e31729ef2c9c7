"""What the processes of these tests do: every scene once, in processes that are started once.

A scene is a function of a group; each of its ranks writes what the scene returns, or the error it raised. Tests read
that. Processes import this module, so it holds no test.
"""

from __future__ import annotations

import copy
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dilated_attention_pytorch as dap
from benchmarks import scale_out
from dilated_attention_pytorch.config import Problem
from dilated_attention_pytorch.distributed import agreement, dilated_attention, parts, shard, unshard
from dilated_attention_pytorch.distributed.layout import Shards
from dilated_attention_pytorch.errors import DatabaseMiss, LostRankError
from dilated_attention_pytorch.runtime.plan import Plan
from docs import scale

from ..cases import CASES, DETACHED, Case, arguments, make_inputs, seeded_dropout

RANKS = 4
PATIENCE = timedelta(seconds=60)
"""After which ranks that fail apart from each other are no longer waited for."""
Scene = Callable[[dist.ProcessGroup], Any]


class Cut(NamedTuple):
    """A case over so many ranks, with the steps of each."""

    case: Case
    lengths: tuple[int, ...]
    mix_grad: str = "exact"

    @property
    def id(self) -> str:
        """`N63-s16-d3-fp64@20+1+42`."""
        return f"{self.case.id}@{'+'.join(map(str, self.lengths))}{'' if self.mix_grad == 'exact' else '-detached'}"


def uneven(length: int, ranks: int, seed: int) -> tuple[int, ...]:
    """Steps of ranks at random; some may have none."""
    generator = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randint(0, length + 1, (ranks - 1,), generator=generator).tolist())
    return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, length], strict=True))


CUTS = (
    *(Cut(replace(case, dtype="fp64"), uneven(case.N, 2 + i % 3, seed=i)) for i, case in enumerate(CASES)),
    *(Cut(case, uneven(case.N, 3, seed=9), "detached") for case in DETACHED),
    # Segments that lie inside ranks, that cross some of them, that hold all.
    Cut(Case(N=64, branches=((8, 1), (32, 2), (100, 4)), B=2, dtype="fp64"), (16, 16, 16, 16)),
    Cut(Case(N=64, branches=((16, 1), (32, 2)), causal=True, dtype="bf16"), (16, 16, 16, 16)),
    Cut(Case(N=61, branches=((16, 3), (40, 4)), padding="zeros", mask=True, B=2, dtype="fp16"), (45, 8, 8)),
    Cut(Case(N=61, branches=((16, 3),), padding="zeros", head_offset="blocked", dtype="fp64"), (48, 13)),
    Cut(Case(N=59, branches=((16, 3), (64, 4)), order="random", causal=True, dtype="fp32"), (0, 30, 0, 29)),
    Cut(Case(N=57, branches=((64, 1), (16, 2)), H=6, G=2, dropout=0.3, dtype="fp32"), (20, 37)),
)
"""Every case of the table, in float64, cut anywhere; and some that are cut with intent."""

BY_KERNELS = (
    Cut(Case(N=61, branches=((64, 1), (64, 4)), G=2, B=2, causal=True), (41, 20)),
    Cut(Case(N=43, branches=((30, 1), (25, 4)), head_offset="blocked", padding="zeros", mask=True, B=2), (20, 23)),
    Cut(Case(N=45, branches=((40, 3), (12, 2)), D=8, dtype="fp16"), (18, 27), "detached"),
    Cut(Case(N=52, branches=((13, 4), (30, 6)), head_offset=((0, -1, 3, 2), (-1, -1, 5, 0)), D=8), (17, 30, 5)),
    Cut(Case(N=57, branches=((15, 1), (30, 2)), order="random", causal=True), (30, 27)),
)
"""For generated kernels, all ranks in one process."""

LARGE = (
    Cut(Case(N=3000, branches=((512, 1), (2048, 4), (4096, 8)), D=64, causal=True, dtype="bf16"), (700, 1300, 1000)),
    Cut(Case(N=4096, branches=((1024, 1), (2048, 2), (9000, 4)), H=8, G=2, D=128, dtype="bf16"), (1024,) * 4),
)
"""The same on a GPU."""


def attend(cut: Cut, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """This rank's results of a case."""
    case, inputs = cut.case, make_inputs(cut.case)
    words = arguments(case, inputs)

    def own(x: Tensor, dim: int = 1) -> Tensor:
        return shard(x, inputs.order, group, dim=dim, lengths=cut.lengths)

    q, k, v = (own(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    if inputs.mask is not None:
        words["key_padding_mask"] = own(inputs.mask)
    seeded_dropout(case)
    if dist.get_rank(group):
        torch.manual_seed(5)  # the seed of dropout is the first rank's
    out, lse = dilated_attention(
        q, k, v, group=group, dropout_p=case.dropout, mix_grad=cut.mix_grad, return_lse=True, **words
    )
    results, given = [out], [own(inputs.dout)]
    if cut.mix_grad == "exact":
        results.append(lse)
        given.append(own(inputs.dlse, 2).masked_fill(lse == -torch.inf, 0.0))
    dq, dk, dv = torch.autograd.grad(results, (q, k, v), given)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def in_token_order(cut: Cut, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results of all ranks as one device would give them."""
    order = make_inputs(cut.case).order
    whole = {}
    for name in ranks[0]:
        dim = 2 if name == "lse" else 1
        steps = torch.cat([rank[name] for rank in ranks], dim=dim)
        whole[name] = steps if order is None else steps.index_select(dim, order.argsort())
    return whole


# ---- Scenes ----------------------------------------------------------------------------------------------------------


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """What this rank sends point to point inside: the bytes of each message."""
    sent: list[int] = []
    real = dist.batch_isend_irecv

    def counting(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return real(ops)

    dist.batch_isend_irecv = counting
    try:
        yield sent
    finally:
        dist.batch_isend_irecv = real


TRAFFIC = (
    Cut(Case(N=64, branches=((8, 1), (16, 2))), (16, 16, 16, 16)),
    Cut(Case(N=64, branches=((8, 1), (64, 4), (32, 3)), B=2, D=8), (16, 16, 16, 16)),
    Cut(Case(N=61, branches=((16, 3), (40, 4)), G=2, mask=True, dtype="bf16"), (20, 3, 38)),
    Cut(Case(N=61, branches=((16, 1), (99, 4)), causal=True, H=6), (10, 20, 31)),
)


def traffic(group: dist.ProcessGroup) -> list[tuple[list[int], list[int]]]:
    """Bytes of each message that this rank sends forward and backward, for each of `TRAFFIC` that it takes part in."""
    found = []
    for cut in TRAFFIC:
        if len(cut.lengths) != group.size():
            continue
        inputs = make_inputs(cut.case)
        words = arguments(cut.case, inputs)
        if inputs.mask is not None:
            words["key_padding_mask"] = shard(inputs.mask, None, group, lengths=cut.lengths)
        own = [shard(x, None, group, lengths=cut.lengths).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        with counted_bytes() as forward:
            out = dilated_attention(*own, group=group, **words)
        with counted_bytes() as backward:
            out.sum().backward()
        found.append((sorted(forward), sorted(backward)))
    return found


def there_and_back(group: dist.ProcessGroup) -> int:
    """`shard` and `unshard`, with what becomes of gradients; this rank's share of 13 steps."""
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for how in (None, order, "hilbert"):
        for lengths in (None, uneven(13, group.size(), seed=3)):
            torch.testing.assert_close(unshard(shard(x, how, group, lengths=lengths), how, group), x, rtol=0, atol=0)
    own = shard(x, order, group).requires_grad_()
    (unshard(own, order, group) * x * (1 + dist.get_rank(group))).sum().backward()
    total = sum(range(1, group.size() + 1))
    torch.testing.assert_close(own.grad, shard(x, order, group) * total)
    transposed = unshard(shard(x.mT, "snake", group, dim=-1), "snake", group, dim=2).mT
    torch.testing.assert_close(transposed, x, rtol=0, atol=0)
    return shard(x, None, group).shape[1]


def qkv(seed: int = 0, length: int = 12) -> list[Tensor]:
    """q, k and v (1, length, 4, 8) of this rank, float64."""
    generator = torch.Generator().manual_seed(seed + 10 * dist.get_rank())
    return [torch.randn(1, length, 4, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def told(call: Callable[[], object]) -> str:
    """What a call raises."""
    try:
        call()
    except dap.DilatedAttentionError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def missed(*_: object, **__: object) -> Plan:
    """A plan where nothing was measured."""
    raise DatabaseMiss("nothing was measured here")


def disagreements(group: dist.ProcessGroup) -> dict[str, str]:
    """What each rank is told where one of them departs; then a call on which all agree."""
    rank = dist.get_rank(group)
    odd = rank == 1
    q, k, v = qkv()
    found = {
        "rates": told(lambda: dilated_attention(q, k, v, [8, 30], [1, 3 if odd else 2], group=group)),
        "heads": told(lambda: dilated_attention(*(x[:, :, : 2 if odd else 4] for x in (q, k, v)), 8, 1, group=group)),
        "refused": told(lambda: dilated_attention(q, k, v, 8, 1, group=group, dropout_p=1.5 if odd else 0.5)),
        "gradients": told(lambda: dilated_attention(*(x.detach() if odd else x for x in (q, k, v)), 8, 1, group=group)),
        "order": told(lambda: dilated_attention(q, k, v, 8, 1, group=group, order=torch.arange(24).roll(int(odd)))),
        "calls": told(lambda: unshard(q, None, group) if odd else dilated_attention(q, k, v, 8, 1, group=group)),
    }
    with dap.options(database=Path(__file__).parents[2] / "tune_db" if odd else None):
        found["database"] = told(lambda: dilated_attention(q, k, v, 8, 1, group=group))
    with TemporaryDirectory() as folder:
        (Path(folder) / "x.yaml").touch()
        with dap.options(database=folder if odd else None):
            found["stray file"] = told(lambda: dilated_attention(q, k, v, 8, 1, group=group))
    found["dim"] = told(lambda: unshard(q, None, group, dim=7 if odd else 1))
    found["no dim"] = told(lambda: unshard(q, None, group, dim="steps" if odd else 1))  # type: ignore[arg-type]
    found["no tensor"] = told(lambda: unshard(None if odd else q, None, group))  # type: ignore[arg-type]
    with dap.options(on_miss="error"), mock.patch.object(parts, "plan", missed if odd else parts.plan):
        found["miss"] = told(lambda: dilated_attention(q, k, v, [8, 30], [1, 2], group=group))
    with dap.options(on_miss="error"):
        found["no miss"] = told(lambda: dilated_attention(q, k, v, [8, 30], [1, 2], group=group))
    found["group"] = told(lambda: dilated_attention(q, k, v, 8, 1, group="sp"))
    found["reference"] = told(lambda: dilated_attention(q, k, v, 8, 1, group=group, backend="reference"))
    found["triton"] = told(lambda: dilated_attention(q, k, v, 8, 1, group=group, backend="triton", dropout_p=0.5))
    found["agreed"] = told(lambda: dilated_attention(q, k, v, [8, 30], [1, 2], group=group).sum().backward())
    return found


def groups(group: dist.ProcessGroup) -> dict[str, Any]:
    """The ways to say whose sequence it is."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    q, k, v = qkv()
    with torch.no_grad():
        outs = [
            dilated_attention(q, k, v, 20, 3, group=way) for way in (mesh["sp"], (mesh, "sp"), mesh.get_group("sp"))
        ]
    attention = dap.DilatedAttention([20], [3], group=(mesh, "sp"))
    copies = copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))
    with torch.no_grad():
        outs += [copied(q, k, v) for copied in copies]
    return {
        "same": all(torch.equal(out, outs[0]) for out in outs),
        "mesh": told(lambda: dilated_attention(q, k, v, 20, 3, group=mesh)),
        "word": told(lambda: dilated_attention(q, k, v, 20, 3, group="sp")),
        "lengths": told(lambda: shard(q, group=group, lengths=[1, 2])),
        "dim": told(lambda: shard(q, group=group, dim=-5)),
    }


def beside_gpus(group: dist.ProcessGroup) -> bool:
    """A group that takes no CPU tensors, as far as it says: its ranks agree through another one, made once."""
    mine = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    with mock.patch.object(dist, "get_backend_config", lambda group: "cuda:nccl"):
        dilated_attention(*qkv(), 20, 3, group=mine).sum().backward()
        channel = agreement._CHANNELS[mine]
        dilated_attention(*qkv(), 20, 3, group=mine)
    return channel is not mine and agreement._CHANNELS[mine] is channel


def recomputed(group: dist.ProcessGroup) -> float:
    """Gradients under checkpointing, where the forward and its messages come twice, less those without."""
    worst = 0.0
    for reentrant in (False, True):
        gradients = []
        for how in ("plain", "checkpointed"):
            x = qkv()[0].detach().requires_grad_()

            def attention(x: Tensor) -> Tensor:
                return dilated_attention(x, x, x, [8, 30], [1, 2], group=group, dropout_p=0.4)

            torch.manual_seed(3)
            y = attention(x) if how == "plain" else checkpoint(attention, x, use_reentrant=reentrant)
            y.square().sum().backward()
            gradients.append(x.grad)
        worst = max(worst, (gradients[0] - gradients[1]).abs().max().item())
    return worst


def elsewhere(group: dist.ProcessGroup) -> bool:
    """Under another default device, and after a call in inference mode, results are the same."""
    q, k, v = qkv(length=11)
    with torch.inference_mode():
        first = dilated_attention(q, k, v, [7, 30], [1, 2], group=group)
    with torch.device("meta"):
        out = dilated_attention(q, k, v, [7, 30], [1, 2], group=group)
        out.sum().backward()
    return torch.equal(out, first) and q.grad is not None


def autocast(group: dist.ProcessGroup) -> bool:
    """Under autocast the result is that of inputs cast by hand."""
    q, k, v = (x.detach().float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(q, k, v, [8, 30], [1, 2], group=group)
    cast = dilated_attention(*(x.bfloat16() for x in (q, k, v)), [8, 30], [1, 2], group=group)
    return out.dtype == torch.bfloat16 and torch.equal(out, cast)


def compiled(group: dist.ProcessGroup) -> tuple[float, int]:
    """Output and gradient of a compiled function around both calls, less the function's own; operations in graphs."""

    def block(x: Tensor) -> Tensor:
        y = 2 * x
        return unshard(dilated_attention(y, y, y, [8, 30], [1, 2], group=group).sin(), None, group).cos()

    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for function in (block, torch.compile(block, backend=counter)):
        x = qkv()[0].detach().requires_grad_()
        out = function(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out.detach(), gradient))
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True)), counter.op_count


def planned_options(group: dist.ProcessGroup) -> tuple[int, int, set[bool | None]]:
    """How often a call plans, forward and backward, where the backward runs behind `with options`; under which."""
    with mock.patch.object(parts, "plan", side_effect=parts.plan) as planned:
        with dap.options(deterministic=True):
            out = dilated_attention(*qkv(), [8, 30], [1, 2], group=group)
        forward = planned.call_count
        out.sum().backward()
    seen = {call.args[3].deterministic for call in planned.call_args_list}
    return forward, planned.call_count - forward, seen


class Block(nn.Module):
    """Attention with projections and a residual."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.attention = dap.MultiheadDilatedAttention(
            32, 4, dilation_rates=[1, 2], segment_lengths=[8, 40], group=group, dtype=torch.float64
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, is_causal=True)[0]


def batch() -> Tensor:
    """Two sequences (2, 40, 32)."""
    return torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def model(group: Any = None) -> nn.Sequential:
    """Two blocks, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(Block(group), Block(group))


def two_dimensions(group: dist.ProcessGroup) -> dict[str, dict[str, Tensor]]:
    """Gradients of a model over two batch elements of two ranks each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    x = shard(batch()[mesh.get_local_rank("dp")][None], None, mesh["sp"])
    found = {}
    for wrapper in ("ddp", "fsdp2"):
        plain = model((mesh, "sp"))
        # Every rank holds some tokens of some sequence: weights are averaged over all of them.
        wrapped = (
            DistributedDataParallel(plain)
            if wrapper == "ddp"
            else fully_shard(plain, mesh=init_device_mesh("cpu", (4,)))
        )
        wrapped(x).square().mean().backward()
        found[wrapper] = {
            name: weight.grad.full_tensor() if wrapper == "fsdp2" else weight.grad
            for name, weight in plain.named_parameters()
        }
    return found


def gathered_whole(group: dist.ProcessGroup) -> float:
    """The benchmark's all-gather against this package: largest difference of outputs and gradients."""
    problem = Problem("fp32", 2, 64, 4, 4, 8, ((16, 1), (32, 2), (99, 4)), head_offset="blocked", mix_grad="detached")
    own = [
        shard(torch.randn(2, 64, 4, 8, generator=torch.Generator().manual_seed(seed)), None, group) for seed in range(4)
    ]
    inputs, dout = [x.requires_grad_() for x in own[:3]], own[3]
    widths, rates = zip(*problem.branches, strict=True)
    outs = (
        scale_out.all_gathered(problem, *inputs, group),
        dilated_attention(*inputs, widths, rates, group=group, head_offset="blocked", mix_grad="detached"),
    )
    both = [(out, *torch.autograd.grad(out, inputs, dout)) for out in outs]
    return max((a - b).abs().max().item() for a, b in zip(*both, strict=True))


def scaled_out(group: dist.ProcessGroup) -> dict[str, Any]:
    """The benchmark itself, as small as it gets."""
    [document] = scale_out.measure(scale_out.series(32, 64)[2:3], torch.device("cpu"), rounds=1)
    return document


def memory(group: dist.ProcessGroup) -> tuple[int, int]:
    """Bytes at the peak of a step, and what docs/scale.md says of them."""
    cpu, steps, heads = torch.device("cpu"), 4096, 4
    length = steps * group.size()
    branches = tuple(scale.grown(length, *scale_out.GROWTH))
    problem = Problem("fp32", 1, length, heads, heads, 64, branches)
    step, *inputs = scale_out._step(problem, scale_out._inputs(problem, cpu), group)
    shards = Shards(tuple(range(0, length + 1, steps)), dist.get_rank(group))
    predicted = scale.bytes_kept(scale.Sizes(1, heads, heads, 64, element=4), branches, shards)
    return scale_out.peak_bytes(step, inputs, cpu), predicted


def absent(group: dist.ProcessGroup) -> str:
    """A rank that takes no part, in a group whose timeout is a second."""
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    found = ""
    if dist.get_rank(group) < group.size() - 1:
        found = told(lambda: dilated_attention(*qkv(), 8, 1, group=impatient))
    dist.barrier(group)
    return found


def dead(group: dist.ProcessGroup) -> str:
    """A rank whose process is over; those that do not meet it themselves wait for the timeout."""
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank(group) == group.size() - 1:
        raise SystemExit
    return told(lambda: dilated_attention(*qkv(), 8, 1, group=impatient))


def of_cut(cut: Cut) -> tuple[int, Scene]:
    """A case as a scene."""
    return len(cut.lengths), lambda group: attend(cut, group)


SCENES: dict[str, tuple[int, Scene]] = {
    **{cut.id: of_cut(cut) for cut in CUTS},
    **{f"traffic of {ranks}": (ranks, traffic) for ranks in (3, 4)},
    "there and back": (3, there_and_back),
    "disagreements": (2, disagreements),
    "groups": (4, groups),
    "beside GPUs": (2, beside_gpus),
    "recomputed": (2, recomputed),
    "elsewhere": (2, elsewhere),
    "autocast": (2, autocast),
    "compiled": (2, compiled),
    "planned options": (2, planned_options),
    "two dimensions": (4, two_dimensions),
    "gathered whole": (2, gathered_whole),
    "scaled out": (4, scaled_out),
    "memory": (4, memory),
    "absent": (4, absent),
    "dead": (4, dead),
}
"""Scenes by name: of how many ranks, and what they do."""


class Failed(str):
    """The traceback of a scene."""


def run(rank: int, port: int, folder: Path) -> None:
    """One process: all scenes; what came of them goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    members = {size: dist.new_group(list(range(size)), PATIENCE) for size in range(2, RANKS + 1)}
    found: dict[str, Any] = {}
    try:
        for name, (size, scene) in SCENES.items():
            if rank < size:
                try:
                    found[name] = scene(members[size])
                except Exception as error:
                    found[name] = Failed(traceback.format_exc())
                    if isinstance(error, LostRankError):
                        break  # ranks are out of step: each scene would cost a timeout
        dist.barrier(members[RANKS - 1])  # the first process keeps what all of them meet by
    finally:
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)  # a group that lost a rank does not close
