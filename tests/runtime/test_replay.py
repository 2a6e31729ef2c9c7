"""Launches that are made again without Triton's front, beside Triton's own: a GPU that only keeps what it is told."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import device
from dilated_attention_pytorch.config import OPS, Problem
from dilated_attention_pytorch.heuristics import FLOOR
from dilated_attention_pytorch.runtime import launch, replay
from dilated_attention_pytorch.runtime.arguments import HeadOffsets
from dilated_attention_pytorch.runtime.dropout import Dropout
from dilated_attention_pytorch.runtime.entry import entry
from dilated_attention_pytorch.runtime.options import Options
from dilated_attention_pytorch.runtime.plan import Plan, plan

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

SIDED = Problem(*("bf16", 2, 50, 2, 1, 16, ((32, 3),)), order="hilbert", mask=True, dropout=True, head_offset="table")
DETACHED = replace(SIDED, branches=((16, 1), (32, 3)), mix_grad="detached")
LAUNCHES = {1: 4, 2: 10}
"""Of forward and backward, by the number of branches above."""
MADE: list[tuple[Any, ...]] = []
"""Function, programs, stream and arguments of every launch, tensors by their addresses."""


class Launcher:
    """Triton's launcher, in front of a function in C that only keeps what it is told."""

    packed = True
    """As from triton 3.7 on; 3.6 gives its function one argument after the other."""

    def __init__(self, src: Any, metadata: Any) -> None:
        """As Triton makes it."""
        self.launch = self.told

    def __call__(
        self,
        gridX: int,
        gridY: int,
        gridZ: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        launch_enter_hook: Any,
        launch_exit_hook: Any,
        *args: Any,
    ) -> None:
        """To the function, with what is the launcher's own."""
        hooks = launch_metadata, launch_enter_hook, launch_exit_hook
        self.launch(gridX, gridY, gridZ, stream, function, "own", kernel_metadata, *hooks, *self.as_taken(args))

    def as_taken(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """By the function in C."""
        return (args,) if self.packed else tuple(args)

    def told(self, *given: Any) -> None:
        """Hooks are called as in C; tensors are kept by their addresses."""
        *launch, metadata, enter, _ = given[:10]
        if enter is not None:
            enter(metadata)
        arguments = given[10] if self.packed else given[10:]
        MADE.append((*launch, *(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)))


class Describing(Launcher):
    """With tensor descriptors, which it encodes in front of its function, as Triton's does."""

    def __init__(self) -> None:
        """Counts what it encoded."""
        launcher, self.encodings = self.told, 0

        def encoded(value: Any) -> list[Any]:
            if not hasattr(value, "base"):
                return [value]
            self.encodings += 1
            return [("map", value.base.data_ptr(), *value.block_shape, value.padding), *value.shape, *value.strides]

        def inner(*args: Any) -> Any:
            front, arguments = (args[:-1], args[-1]) if self.packed else (args[:10], args[10:])
            return launcher(*front, *self.as_taken([part for value in arguments for part in encoded(value)]))

        self.launch = inner


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Triton with an H100 in this machine: what it was told to launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    handles = iter(range(1, 1000))
    gpu = SimpleNamespace(
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 42,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: (object(), next(handles), 32, 0, 1024),
            unload_module=lambda module: None,
        ),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(replay, "_KNOWN", {})
    MADE.clear()
    return MADE


def rows(b: int, n: int, h: int, d: int, apart: int = 256) -> Tensor:
    """(B, N, H, D), with strides that Triton's specialisation does not tell from those of others `apart`."""
    return torch.empty(b, n, h, apart, dtype=torch.bfloat16)[..., :d]


class Call:
    """Tensors of a call, and what they are launched with."""

    def __init__(self, problem: Problem, **more: Any) -> None:
        """`more` takes the place of what is made here."""
        b, n, h, g, d = problem.batch, problem.length, problem.heads, problem.kv_heads, problem.head_dim
        self.q, self.k, self.v, self.dout = (rows(b, n, x, d) for x in (h, g, g, h))
        self.dlse = None if problem.mix_grad == "detached" else torch.empty(b, h, n)
        self.sides: dict[str, Any] = {
            "scale": 0.25,
            "index": torch.empty(n, dtype=torch.int32) if problem.order != "none" else None,
            "mask": torch.empty(b, n, dtype=torch.bool) if problem.mask else None,
            "offsets": HeadOffsets((), TABLE if problem.head_offset == "table" else None),
            "dropout": Dropout(0.1, torch.empty(1, dtype=torch.int64)) if problem.dropout else None,
        }
        for name, value in more.items():
            if name in self.sides:
                self.sides[name] = value
            else:
                setattr(self, name, value)
        sizes = [(b, n, h, d), (b, h, n), (b, n, h, d), (b, n, g, d), (b, n, g, d), (b, h, n), (b, n, h, d), (b, h, n)]
        self.outputs = [torch.empty(size) for size in sizes]

    def __call__(self, chosen: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """Forward and backward, into the same memory every time: the launches."""
        outputs = iter(self.outputs)
        begun = len(MADE)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "allocate", lambda *_: next(outputs))
            out, lse = launch.forward(chosen, self.q, self.k, self.v, **self.sides)
            launch.backward(chosen, self.q, self.k, self.v, out, lse, self.dout, self.dlse, **self.sides)
        return MADE[begun:]


TABLE = torch.empty(2, 2, dtype=torch.int32)


def planned(problem: Problem) -> Plan:
    """With the smallest tiles, which compile in the least time."""
    return plan(problem, device.simulated("h100"), "triton", Options((*((op, FLOOR[-1]) for op in OPS),)))


def by_triton(call: Call, chosen: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The launches of a call that nothing came before."""
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_KNOWN", {})
        return call(chosen, monkeypatch)


@pytest.mark.parametrize(
    "problem", [pytest.param(SIDED, id="exact", marks=pytest.mark.toolchain), pytest.param(DETACHED, id="detached")]
)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("made")
def test_a_second_call_tells_what_triton_would(problem: Problem, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of the first call in the second; arguments out of order; Python work that was done before."""
    monkeypatch.setattr(Launcher, "packed", packed)
    chosen, first, second = planned(problem), Call(problem), Call(problem)
    told = first(chosen, monkeypatch)
    assert len(told) == LAUNCHES[len(problem.branches)]
    with monkeypatch.context() as patch:
        for name in ("shared_values", "branch_values", "prepared", "prepared_delta", "run_kernel"):
            patch.delattr(launch, name)
        again, other = first(chosen, monkeypatch), second(chosen, monkeypatch)
    assert again == told != other == by_triton(second, chosen, monkeypatch)


def misaligned(tensor: Tensor) -> Tensor:
    """The same sizes and strides, two bytes behind a multiple of 16."""
    return torch.empty(tensor.untyped_storage().nbytes(), dtype=tensor.dtype)[1:].as_strided(
        tensor.shape, tensor.stride()
    )


@pytest.mark.usefixtures("made")
def test_other_kinds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides, numbers or a kernel for aligned pointers, kept from a call that only looks the same."""
    chosen, base = planned(SIDED), Call(SIDED)
    base(chosen, monkeypatch)
    table, mask = torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 64, dtype=torch.bool)[:, :50]
    others = [
        *({name: rows(*getattr(base, name).shape, apart=512)} for name in ("q", "k", "v", "dout")),
        {"dlse": torch.empty(2, 50, 32).transpose(1, 2)[:, :2]},
        {"q": misaligned(base.q)},
        {"scale": 0.5},
        {"mask": mask},
        {"dropout": replace(base.sides["dropout"], p=0.2)},
        {"offsets": HeadOffsets((), table)},
    ]
    for more in others:
        other = Call(SIDED, **more)
        expected = by_triton(other, chosen, monkeypatch)
        assert [other(chosen, monkeypatch), other(chosen, monkeypatch)] == [expected] * 2, more


@pytest.mark.usefixtures("made")
def test_profilers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of Proton's without the launches that were made again, or without their flops."""
    from triton import knobs

    chosen, call, told = planned(SIDED), Call(SIDED), []
    call(chosen, monkeypatch)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: told.append(metadata.get()))
    assert len(call(chosen, monkeypatch)) == len(told) == 4
    assert told[0]["name"].startswith("general_hilbert_fwd_") and told[0]["flops"] > 0


def test_threads_share_what_is_kept(made: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's addresses in another's launch."""
    chosen, calls = planned(SIDED), [Call(SIDED) for _ in range(8)]
    expected = [call(chosen, monkeypatch)[0] for call in calls]
    made.clear()

    def often(call: Call) -> None:
        for _ in range(50):
            launch.forward(chosen, call.q, call.k, call.v, **call.sides)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, calls))
    inputs = sorted(told[7:10] for told in made)
    assert inputs == sorted([told[7:10] for told in expected] * 50)


@pytest.mark.usefixtures("made")
def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that grows with every length of a corpus, or with every address; a launch of memory that was let go."""
    monkeypatch.setattr(replay, "KEPT", 3)
    monkeypatch.setattr(replay, "ADDRESSES", 2)
    chosen, calls = planned(SIDED), [Call(SIDED) for _ in range(4)]
    for scale in range(1, 9):
        Call(SIDED, scale=float(scale))(chosen, monkeypatch)
        assert len(replay._KNOWN) <= 3
    told = [by_triton(call, chosen, monkeypatch) for call in calls]
    assert [call(chosen, monkeypatch) for call in calls * 2] == told * 2
    assert all(len(recording.given) <= 2 for recording in replay._KNOWN.values())


@pytest.mark.usefixtures("made")
def test_tensors_of_a_call_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes held by what was kept of a call."""
    call = Call(SIDED)
    call(planned(SIDED), monkeypatch)
    seen = [weakref.ref(tensor) for tensor in (call.q, call.k, call.dout, call.sides["mask"], *call.outputs)]
    assert len(replay._KNOWN) == 2
    del call
    gc.collect()
    assert not any(tensor() is not None for tensor in seen)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.usefixtures("made")
def test_descriptors_are_encoded_once_an_address(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of the first call's memory; rows or strides left out; microseconds for what was encoded before."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    monkeypatch.setattr(Launcher, "packed", packed)
    launcher = Describing()
    kernel = compiled(launcher, "cuda")
    every = [torch.empty(8, 32) for _ in range(3)]

    def launches(k: Tensor, v: Tensor) -> list[replay.Launch]:
        described = (TensorDescriptor(x, [4, 64], [64, 1], [2, 16], padding="nan") for x in (k, v))
        arguments = {"N": 4, **dict(zip(("p_k", "p_v"), described, strict=True)), "p_q": v, "word": "x", "p_mask": None}
        launcher(3, 1, 1, 42, kernel.function, kernel.packed_metadata, None, None, None, *arguments.values())
        return [replay.Launch(kernel, arguments, 3)]

    def call(k: Tensor, v: Tensor) -> tuple[Any, ...]:
        names = ("other", "p_k", "p_v", "p_q", "p_mask")
        replay.run("kind", (), names, (torch.empty(1), k, v, v, None), lambda: launches(k, v))
        return MADE[-1]

    def check(k: Tensor, v: Tensor) -> None:
        told = call(k, v)
        assert told == (*MADE[0][:7], *told[7:])
        maps = [[("map", x.data_ptr(), 2, 16, "nan"), 4, 64, 64, 1] for x in (k, v)]
        assert [*told[7:]] == [4, *maps[0], *maps[1], v.data_ptr(), "x", None]

    for x in every * 2:
        check(x, x)
    before = launcher.encodings
    for k, v in itertools.product(every, every):
        check(k, v)
    assert launcher.encodings == before and len(replay._KNOWN) == 1


def compiled(launcher: object, backend: str) -> SimpleNamespace:
    """What Triton's function returns."""
    metadata = SimpleNamespace(target=SimpleNamespace(backend=backend))
    return SimpleNamespace(run=launcher, function=7, packed_metadata="metadata", metadata=metadata, name="kernel")


def test_an_unknown_triton_launches_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that takes its arguments in another order, given ours; AMD's, whose kernels tell sizes apart."""

    class Another:
        def __call__(self, grid: tuple[int, ...], stream: int, *args: Any) -> None:
            """As some other version might."""

    ours = Launcher(None, None)
    assert entry(compiled(ours, "cuda"), 3, 2)
    assert not any(entry(other, 3, 2) for other in (compiled(Another(), "cuda"), compiled(ours, "hip"), None))
    monkeypatch.setattr("triton.__version__", "4.0.0")
    found = entry(compiled(ours, "cuda"), 3, 2)
    assert found and found.launch is ours


def test_scratch_memory_is_taken_anew() -> None:
    """Memory that a launcher took for the first launch, given to every other."""
    launcher = Launcher(None, None)
    found = entry(compiled(launcher, "cuda"), 3, 2)
    assert found == (launcher.launch, (3, 1, 1), (7, "own", "metadata", None, None, None), True, None)
    launcher.global_scratch_size = 128
    found = entry(compiled(launcher, "cuda"), 3, 2)
    assert found == (launcher, (3, 1, 1), (7, "metadata", None, None, None), False, None)
