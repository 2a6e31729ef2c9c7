"""What a call launched is kept, so that the next call of its kind puts its pointers in and launches again.

Triton binds, specialises and looks up a kernel at every launch, 12 to 17 µs of Python each; its own launcher, which
this calls instead, takes 2 to 3. Nothing is measured or chosen here: the launches are those of the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import itemgetter, or_
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 1024
"""Kinds of calls that are kept; beyond them all are forgotten at once."""

ALIGNMENT = 16
"""Bytes. Triton compiles another kernel for pointers that are no multiples of it."""

_KNOWN: dict[Hashable, Recording] = {}
"""By all that the launches depend on besides addresses. Values never change, so threads need no lock."""


class Launch(NamedTuple):
    """A launch that was made.

    Attributes:
        compiled: What Triton's function returned: the compiled kernel, or None from the interpreter.
        arguments: By name, in the kernel's order.
        programs: Number of programs.
    """

    compiled: Any
    arguments: Mapping[str, Any]
    programs: int


def run(
    key: Hashable,
    owners: tuple[object, ...],
    names: tuple[str, ...],
    tensors: tuple[Tensor | None, ...],
    first: Callable[[], Iterable[Launch]],
) -> None:
    """Make the launches of a call: as the call of this kind before it did, else by `first`.

    Args:
        key: All that the launches depend on besides the addresses of `tensors`; `owners` by their identity.
        owners: Kept alive with the launches. They own the tensors among the arguments that are not of `tensors`.
        names: What the kernels call each of `tensors`.
        tensors: All on one device, the first of them not None.
        first: Makes the launches through Triton, on the current device, and tells of each. It does nothing else.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    aligned = reduce(or_, addresses) % ALIGNMENT == 0
    known = _KNOWN.get(key) if aligned else None
    if known is not None and not known.hooked():
        known.replay(addresses)
        return
    with _on(tensors[0]):
        launches = tuple(first())
        if not aligned or known is not None:
            return
        recording = _recorded(owners, launches, dict(zip(names, addresses, strict=True)))
    if recording is not None:
        if len(_KNOWN) >= KEPT:
            _KNOWN.clear()
        _KNOWN[key] = recording


def _on(tensor: Tensor | None) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    assert tensor is not None
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class Step(NamedTuple):
    """A launch to make again.

    Attributes:
        call: What launches.
        before: What it is given in front of the stream.
        behind: What it is given between the stream and the kernel's arguments.
        packed: It takes those as one tuple.
        constants: Arguments that are no addresses of the call.
        described: Tensor descriptors among the arguments: where the address is found, and the rest.
        pick: All arguments, from the call's addresses, then `constants`, then the descriptors.
    """

    call: Callable[..., None]
    before: tuple[Any, ...]
    behind: tuple[Any, ...]
    packed: bool
    constants: list[Any]
    described: list[tuple[int, dict[str, Any]]]
    pick: Callable[[list[Any]], tuple[Any, ...]]


@dataclass(frozen=True)
class Recording:
    """The launches of one kind of call, on one device.

    Attributes:
        kept: What has to stay alive: what the key tells by its identity, and kernels, which have handles.
        steps: The launches.
        driver: Triton's.
        knobs: Triton's.
        device: Number of the device.
    """

    kept: tuple[object, ...]
    steps: tuple[Step, ...]
    driver: Any
    knobs: Any
    device: int

    def hooked(self) -> bool:
        """A profiler wants to be told of launches, with what Triton's function knows of each."""
        enter, leave = self.knobs.runtime.launch_enter_hook, self.knobs.runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def replay(self, addresses: list[int]) -> None:
        """Launch on the device's current stream."""
        active = self.driver.active
        if active.get_current_device() != self.device:
            with torch.cuda.device(self.device):
                self.replay(addresses)
            return
        stream = active.get_current_stream(self.device)
        for call, before, behind, packed, constants, described, pick in self.steps:
            values = addresses + constants
            if described:
                values += [SimpleNamespace(base=_Base(addresses[place]), **rest) for place, rest in described]
            if packed:
                call(*before, stream, *behind, pick(values))
            else:
                call(*before, stream, *behind, *pick(values))


class _Base(NamedTuple):
    """A tensor, to who asks for nothing but its address."""

    address: int

    def data_ptr(self) -> int:
        """Of its first element."""
        return self.address


# ---- The first call, taken down --------------------------------------------------------------------------------------


def _recorded(
    owners: tuple[object, ...], launches: tuple[Launch, ...], addresses: Mapping[str, int]
) -> Recording | None:
    """The launches to make again; None where Triton is not as known here, or its interpreter runs."""
    if not launches or not all(_is_known(launch.compiled) for launch in launches):
        return None
    from triton import knobs
    from triton.runtime import driver

    steps = tuple(_step(launch, addresses, owners) for launch in launches)
    kept = owners, tuple(launch.compiled for launch in launches)
    return Recording(kept, steps, driver, knobs, driver.active.get_current_device())


def _step(launch: Launch, addresses: Mapping[str, int], owners: tuple[object, ...]) -> Step:
    constants: list[Any] = []
    described: list[tuple[int, dict[str, Any]]] = []
    sources: list[tuple[int, int]] = []
    for name, value in launch.arguments.items():
        tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)
        place = None if tensor is None else _place(name, tensor.data_ptr(), addresses)
        if place is None:
            assert tensor is None or _is_owned(tensor, owners), f"{name} of {launch.compiled.name} is not of the call"
            sources.append((1, len(constants)))
            constants.append(value if tensor is None else tensor.data_ptr())
        elif tensor is value:
            sources.append((0, place))
        else:
            sources.append((2, len(described)))
            described.append((place, {part: told for part, told in vars(value).items() if part != "base"}))
    starts = 0, len(addresses), len(addresses) + len(constants)
    pick = itemgetter(*(starts[source] + place for source, place in sources))
    return Step(*_entry(launch, len(sources)), constants, described, pick)


def _place(name: str, address: int, addresses: Mapping[str, int]) -> int | None:
    """Which of the call's tensors an argument is: the one of its name, unless another took its place."""
    names = list(addresses)
    if addresses.get(name) == address:
        return names.index(name)
    return next((place for place, other in enumerate(names) if addresses[other] == address), None)


def _is_owned(tensor: Tensor, owners: tuple[object, ...]) -> bool:
    """It lies in memory that stays where it is."""
    address = tensor.untyped_storage().data_ptr()
    return any(isinstance(owner, Tensor) and owner.untyped_storage().data_ptr() == address for owner in owners)


def _entry(launch: Launch, count: int) -> tuple[Callable[..., None], tuple[Any, ...], tuple[Any, ...], bool]:
    """What launches, what it is given in front of and behind the stream, and whether arguments come as one tuple.

    Triton's launcher calls a function in C, with what is the same at every launch unless it takes scratch memory: that
    function is what launches, and a copy of the launcher tells what it is given.
    """
    compiled, launcher = launch.compiled, launch.compiled.run
    grid, behind = (launch.programs, 1, 1), (compiled.function, compiled.packed_metadata, None, None, None)
    if not _is_stateless(launcher):
        return launcher, grid, behind, False
    told: list[tuple[Any, ...]] = []
    teller = copy(launcher)
    teller.launch = lambda *given: told.append(given)
    stream, arguments = object(), tuple(object() for _ in range(count))
    teller(*grid, stream, *behind, *arguments)
    given = told[0]
    packed = given[-1] == arguments
    place, end = given.index(stream), len(given) - (1 if packed else count)
    return launcher.launch, given[:place], given[place + 1 : end], packed


def _is_stateless(launcher: Any) -> bool:
    """It gives its function in C nothing that differs from launch to launch: triton 3.6 to 3.9 have been read."""
    import triton

    read = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
    sizes = (getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile"))
    return read and hasattr(launcher, "launch") and not any(sizes) and not getattr(launcher, "gsan_enabled", False)


def _is_known(compiled: Any) -> bool:
    """Its launcher is called as here. AMD's kernels depend on more than addresses: on how large the storage is."""
    try:
        return compiled.metadata.target.backend == "cuda" and _takes_these(type(compiled.run).__call__)
    except AttributeError:
        return False


@lru_cache
def _takes_these(launcher: Callable[..., None]) -> bool:
    """triton 3.6 to 3.9; what follows `function` has been the same, and was not always spelt out."""
    names = tuple(inspect.signature(launcher).parameters)
    told = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
    first = ("self", "gridX", "gridY", "gridZ", "stream", "function")
    return names in ((*first, "args"), (*first, *told, "args"))
