"""A stand-in for Gluon that runs the rings' texts on a CPU, program by program, which no interpreter of Triton's does.

It keeps what the texts rely on: tiles that descriptors fill, zeros behind a matrix, barriers with phases, warpgroups
beside a producer. Shared memory begins as NaN; a wait that nobody will end, a read outside of memory and a product of
shapes that do not meet are errors. What lies where in registers, and what runs while something else does, it ignores:
products and copies of tiles are done at once, those of rows when they are waited for.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch._layout import generated_dir

PATIENCE_S = 30.0
"""That a warpgroup waits for another; alone, one that would have to wait waits for ever."""
_HERE = threading.local()


class Int(int):
    """A scalar of a kernel: divides towards zero, is compared to one, and can be converted."""

    __hash__ = int.__hash__

    def to(self, dtype: torch.dtype) -> Int:
        return self

    def __floordiv__(self, other: Any) -> Any:
        return (
            Int(abs(self) // abs(other) * (1 if (self < 0) == (other < 0) else -1))
            if isinstance(other, int)
            else NotImplemented
        )

    def __mod__(self, other: Any) -> Any:
        return Int(int(self) - int(self // other) * int(other)) if isinstance(other, int) else NotImplemented


def _closed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(self: Int, other: Any) -> Any:
        return Int(plain(self, other)) if isinstance(other, int) else NotImplemented

    return operation


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "and",
    "rand",
    "or",
    "xor",
    "rshift",
    "lshift",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    setattr(Int, f"__{_name}__", _closed(f"__{_name}__"))


class Pointer:
    """Addresses within the memory of a tensor."""

    def __init__(self, memory: Tensor, at: Any) -> None:
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return cls(memory, Int(x.storage_offset()))

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.at + steps)

    def __sub__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.at - steps)

    def __getitem__(self, shape: Any) -> Pointer:
        return Pointer(self.memory, self.at[shape])

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        wanted = torch.as_tensor(True if mask is None else mask).bool().expand(at.shape)
        found = at[wanted]
        assert not found.numel() or 0 <= found.min() <= found.max() < self.memory.numel(), "outside of memory"
        return at, wanted


class Shared:
    """A tile in shared memory, or several."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, place: int) -> Shared:
        return Shared(self.data[int(place)])

    def slice(self, first: int, count: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, int(first), int(count)))

    def permute(self, dims: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*dims))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)


class Barrier:
    """Completes a phase once all have arrived and all bytes are there."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            _HERE.changed.notify_all()


class Barriers:
    """One a place. One piece of memory: it is kept until the first of them is invalidated."""

    def __init__(self, places: int) -> None:
        self._all = [Barrier() for _ in range(places)]
        _HERE.barriers.add(self._all[0])

    def index(self, place: int) -> Barrier:
        return self._all[int(place)]


def _init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = int(count)


def _invalidate(bar: Barrier) -> None:
    _HERE.barriers.remove(bar)


def _arrive(bar: Barrier, count: int = 1) -> None:
    with _HERE.changed:
        assert bar.pending >= count, "more arrivals than a phase has"
        bar.pending -= count
        bar.settle()


def _expect(bar: Barrier, size: int, pred: Any = True) -> None:
    if pred:
        with _HERE.changed:
            assert bar.pending, "a phase that is complete is expected again"
            bar.bytes += int(size)
            bar.pending -= 1


def _wait(bar: Barrier, phase: int) -> None:
    with _HERE.changed:
        done = _HERE.changed.wait_for(lambda: bar.phase != phase, PATIENCE_S if _HERE.among_others else 0)
    assert done, "a tile that nobody sends is waited for"


class Descriptor:
    """A matrix from which tiles are read; zeros behind it."""

    def __init__(self, told: Any) -> None:
        self.matrix = torch.as_strided(told.base, tuple(told.shape), tuple(told.strides))
        self.block_type, self.layout = SimpleNamespace(shape=list(told.block_shape)), told.layout
        self.dtype = told.base.dtype

    def tile(self, row: int, col: int) -> Tensor:
        rows, columns = self.block_type.shape
        found = torch.zeros(rows, columns, dtype=self.dtype)
        top, left = max(row, 0), max(col, 0)
        part = self.matrix[top : max(row + rows, 0), left : max(col + columns, 0)]
        found[top - row : top - row + part.shape[0], left - col : left - col + part.shape[1]] = part
        return found


def _copy_tile(tiles: Descriptor, at: Sequence[int], bar: Barrier, into: Shared, pred: Any = True) -> None:
    if pred:
        with _HERE.changed:
            into.data.copy_(tiles.tile(int(at[0]), int(at[1])))
            bar.bytes -= into.data.numel() * into.data.element_size()
            bar.settle()


def _copy_row(into: Shared, pointer: Pointer, mask: Any = None) -> None:
    _HERE.begun.append((into, _load(pointer, mask, 0.0)))


def _commit_group() -> None:
    _HERE.groups.append(_HERE.begun)
    _HERE.begun = []


def _wait_group(pending: int) -> None:
    """What is waited for is there, and nothing else."""
    while len(_HERE.groups) > pending:
        for into, row in _HERE.groups.pop(0):
            into.store(row)


def _product(a: Any, b: Shared, sums: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    a = a.data if isinstance(a, Shared) else a
    assert a.dtype == b.dtype and sums.shape == (a.shape[0], b.shape[1])
    found = a.float() @ b.data.float()
    return sums + found if use_acc else found


def _product_wait(pending: int, deps: Sequence[Tensor]) -> Any:
    return deps[0] if len(deps) == 1 else tuple(deps)


def _load(pointer: Pointer, mask: Any = None, other: float = float("nan")) -> Tensor:
    at, wanted = pointer.places(mask)
    found = pointer.memory[at.where(wanted, 0)]
    return found if mask is None else found.where(wanted, torch.tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, wanted = pointer.places(mask)
    pointer.memory[at[wanted]] = value.expand(at.shape)[wanted].to(pointer.memory.dtype)


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
    if isinstance(layout, _BarrierLayout):
        return Barriers(int(shape[0]))
    return Shared(torch.full([int(size) for size in shape], torch.nan, dtype=dtype))


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition.bool(), a, b)
    found = a if condition else b
    return Int(found) if isinstance(found, int) else found


def _extreme(pick: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def found(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return pick(torch.as_tensor(a), torch.as_tensor(b))
        return Int(plain(a, b)) if isinstance(a, int) and isinstance(b, int) else plain(a, b)

    return found


def _specialise(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int], registers: Sequence[int]) -> None:
    """Warpgroups beside each other, as threads."""
    mine, failed = dict(vars(_HERE)), []
    _HERE.barriers.clear()  # what warpgroups share is kept until all are done

    def work(part: Any, arguments: tuple[Any, ...], num_warps: int) -> None:
        vars(_HERE).update(mine, num_warps=num_warps, among_others=True)
        try:
            part(*arguments)
        except BaseException as error:
            failed.append(error)

    everyone = zip(parts, (_HERE.num_warps, *warps), strict=True)
    threads = [threading.Thread(target=work, args=(*part, count)) for part, count in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


class Kernel:
    """A function of a text: called by others, or launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            given = [_argument(value) for value in arguments]
            for program in range(grid[0]):
                vars(_HERE).update(program=Int(program), programs=Int(grid[0]), num_warps=num_warps)
                vars(_HERE).update(changed=threading.Condition(), among_others=False, begun=[], groups=[])
                _HERE.barriers = set()
                self._function(*given)
                assert not _HERE.barriers, "a barrier whose memory may be another's after the last wait"
                assert not _HERE.begun and not _HERE.groups, "a copy that nobody waits for ends in another's memory"

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.to(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


class _Layout:
    def __init__(self, *_: object, **__: object) -> None:
        pass


class _BarrierLayout(_Layout):
    pass


def _ints(*bounds: int) -> Iterator[Int]:
    return map(Int, range(*bounds))


LANGUAGE = SimpleNamespace(
    **dict.fromkeys(("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), _Layout),
    NVMMASharedLayout=SimpleNamespace(get_default_for=_Layout),
    SwizzledSharedLayout=_Layout,
    constexpr=lambda value: value,
    **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "zeros_like", "exp2")},
    log2=lambda x: torch.log2(x) if isinstance(x, Tensor) else math.log2(x),
    arange=lambda first, last, layout: torch.arange(first, last),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    where=_where,
    maximum=_extreme(torch.maximum, max),
    minimum=_extreme(torch.minimum, min),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    load=_load,
    store=_store,
    cast=lambda x, dtype: x,
    convert_layout=lambda x, layout: x,
    static_range=_ints,
    allocate_shared_memory=_allocate,
    program_id=lambda axis: _HERE.program,
    num_programs=lambda axis: _HERE.programs,
    num_warps=lambda: _HERE.num_warps,
    warp_specialize=_specialise,
)
HOPPER = SimpleNamespace(
    fence_async_shared=lambda: None,
    mbarrier=SimpleNamespace(
        MBarrierLayout=_BarrierLayout,
        init=_init,
        invalidate=_invalidate,
        expect=_expect,
        wait=_wait,
        arrive=_arrive,
    ),
    tma=SimpleNamespace(async_load=_copy_tile),
    warpgroup_mma=_product,
    warpgroup_mma_wait=_product_wait,
)


AMPERE = SimpleNamespace(
    async_copy=SimpleNamespace(async_load=_copy_row, commit_group=_commit_group, wait_group=_wait_group)
)
ROOT = "triton.experimental"
STAND_INS: dict[str, Any] = {
    ROOT: SimpleNamespace(gluon=SimpleNamespace(jit=_jit)),
    f"{ROOT}.gluon": SimpleNamespace(language=LANGUAGE),
    f"{ROOT}.gluon.language.nvidia.ampere": AMPERE,
    f"{ROOT}.gluon.language.nvidia.hopper": HOPPER,
}


@cache
def load(name: str) -> ModuleType:
    """A text in Gluon, upon this stand-in. What others have imported of Triton stays theirs."""
    path = Path(generated_dir(), f"{name}.py")
    module = ModuleType(name)
    vars(module).update(range=_ints)
    real = {name: sys.modules.get(name) for name in STAND_INS}
    sys.modules.update(STAND_INS)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    finally:
        for name, found in real.items():
            sys.modules.pop(name) if found is None else sys.modules.update({name: found})
    return module
