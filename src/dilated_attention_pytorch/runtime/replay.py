"""What a call launched is kept, so that the next call of its kind puts its pointers in and launches again.

Triton binds, specialises and looks up a kernel in Python at every launch; its own launcher, which this calls instead,
takes a small part of that time. Nothing is measured or chosen here: the launches are those of the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import count
from operator import itemgetter, or_
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entry import Entry, entry

KEPT = 1024
"""Kinds of calls that are kept; beyond them all are forgotten at once."""

ADDRESSES = 64
"""Addresses for which a tensor descriptor is kept as encoded, and a launch with all that it is given, likewise."""

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
    addresses = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
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


class Encoded:
    """A tensor descriptor as the kernel takes it, by address: memory that is freed and taken again has few."""

    def __init__(self, place: int, encode: Callable[[int], Any]) -> None:
        """`place` is its address's among the call's."""
        self._place, self._encode = place, encode
        self._known: dict[int, Any] = {}

    def at(self, addresses: tuple[int, ...]) -> Any:
        """Of a call."""
        address = addresses[self._place]
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= ADDRESSES:
                self._known.clear()
            found = self._known[address] = self._encode(address)
        return found


class Step(NamedTuple):
    """A launch to make again.

    Attributes:
        entry: What launches.
        constants: Arguments that are no addresses of the call.
        encoded: Tensor descriptors.
        pick: All arguments, from the call's addresses, then `constants`, then `encoded`.
    """

    entry: Entry
    constants: list[Any]
    encoded: list[Encoded]
    pick: Callable[[list[Any]], tuple[Any, ...]]

    def behind(self, addresses: tuple[int, ...]) -> tuple[Any, ...]:
        """What the entry's function is given behind the stream."""
        _, _, behind, packed, _ = self.entry
        arguments = self.pick([*addresses, *self.constants, *(item.at(addresses) for item in self.encoded)])
        return (*behind, arguments) if packed else (*behind, *arguments)


Given = tuple[Callable[..., None], tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class Recording:
    """The launches of one kind of call, on one device.

    Attributes:
        kept: What has to stay alive: what the key tells by its identity, and kernels, which have handles.
        steps: The launches.
        driver: Triton's.
        knobs: Triton's.
        device: Number of the device.
        given: By a call's addresses, each launch's function, and what it is given before and behind the stream. A
            step of training finds the memory of the step before, for each layer its own.
    """

    kept: tuple[object, ...]
    steps: tuple[Step, ...]
    driver: Any
    knobs: Any
    device: int
    given: dict[tuple[int, ...], list[Given]] = field(default_factory=dict)

    def hooked(self) -> bool:
        """A profiler wants to be told of launches, with what Triton's function knows of each."""
        enter, leave = self.knobs.runtime.launch_enter_hook, self.knobs.runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def replay(self, addresses: tuple[int, ...]) -> None:
        """Launch on the device's current stream."""
        active = self.driver.active
        if active.get_current_device() != self.device:
            with torch.cuda.device(self.device):
                self.replay(addresses)
            return
        stream = active.get_current_stream(self.device)
        for launch, before, behind in self.given.get(addresses) or self._given(addresses):
            launch(*before, stream, *behind)

    def _given(self, addresses: tuple[int, ...]) -> list[Given]:
        if len(self.given) >= ADDRESSES:
            self.given.clear()
        given = self.given[addresses] = [
            (step.entry.launch, step.entry.before, step.behind(addresses)) for step in self.steps
        ]
        return given


# ---- The first call, taken down --------------------------------------------------------------------------------------


def _recorded(
    owners: tuple[object, ...], launches: tuple[Launch, ...], addresses: Mapping[str, int]
) -> Recording | None:
    """The launches to make again; None where Triton is not as known here, or its interpreter runs."""
    from triton import knobs
    from triton.runtime import driver

    steps = []
    for launch in launches:
        step = _step(launch, addresses, owners)
        if step is None:
            return None
        steps.append(step)
    kept = owners, tuple(launch.compiled for launch in launches)
    return Recording(kept, tuple(steps), driver, knobs, driver.active.get_current_device())


class _Slot(NamedTuple):
    """The tensor of a call in this place, to who asks for nothing but its address."""

    place: int
    address: int

    def data_ptr(self) -> int:
        """Of its first element."""
        return self.address


def _step(launch: Launch, addresses: Mapping[str, int], owners: tuple[object, ...]) -> Step | None:
    found = entry(launch.compiled, launch.programs, len(launch.arguments))
    if found is None:
        return None
    given: list[Any] = []
    described: list[int] = []
    for name, value in launch.arguments.items():
        tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)  # of a tensor descriptor
        if tensor is None:
            given.append(value)
            continue
        slot = _slot(name, tensor, addresses)
        assert slot is not None or _is_owned(tensor, owners), f"{name} of {launch.compiled.name} is not of the call"
        if tensor is not value:
            if slot is None or found.expand is None:
                return None
            described.append(len(given))
            given.append(SimpleNamespace(**{**vars(value), "base": slot}))
        else:
            given.append(tensor.data_ptr() if slot is None else slot)
    items = _encoded(found.expand, given, described) if found.expand and described else given
    constants = [item for item in items if not isinstance(item, (_Slot, Encoded))]
    encoded = [item for item in items if isinstance(item, Encoded)]
    of_constants, of_encoded = count(len(addresses)), count(len(addresses) + len(constants))
    places = [
        item.place if isinstance(item, _Slot) else next(of_encoded if isinstance(item, Encoded) else of_constants)
        for item in items
    ]
    return Step(found, constants, encoded, itemgetter(*places))


def _slot(name: str, tensor: Tensor, addresses: Mapping[str, int]) -> _Slot | None:
    """Which of the call's tensors an argument is: the one of its name, unless another took its place."""
    address, names = tensor.data_ptr(), list(addresses)
    if addresses.get(name) == address:
        return _Slot(names.index(name), address)
    return next((_Slot(place, address) for place, other in enumerate(names) if addresses[other] == address), None)


def _is_owned(tensor: Tensor, owners: tuple[object, ...]) -> bool:
    """It lies in memory that stays where it is."""
    address = tensor.untyped_storage().data_ptr()
    return any(isinstance(owner, Tensor) and owner.untyped_storage().data_ptr() == address for owner in owners)


def _encoded(expand: Callable[[list[Any]], list[Any]], given: list[Any], described: list[int]) -> list[Any]:
    """The arguments as the kernel takes them: a descriptor is what it is encoded as, then sizes and strides."""
    unchanged, which = set(map(id, given)), iter(described)
    items: list[Any] = []
    for index, item in enumerate(expand(given)):
        if id(item) in unchanged or isinstance(item, (int, _Slot)):
            items.append(item)
        else:
            descriptor = next(which)
            items.append(Encoded(given[descriptor].base.place, partial(_encode, expand, given, descriptor, index)))
    return items


def _encode(
    expand: Callable[[list[Any]], list[Any]], given: list[Any], descriptor: int, index: int, address: int
) -> Any:
    moved = SimpleNamespace(**{**vars(given[descriptor]), "base": _Slot(given[descriptor].base.place, address)})
    return expand([*given[:descriptor], moved, *given[descriptor + 1 :]])[index]
