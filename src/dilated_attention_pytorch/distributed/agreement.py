"""Before ranks wait for each other: whose group, and whether all of them make the same call.

Every call begins with one exchange of four integers a rank over the CPU, which no GPU waits for. Only where they
differ do ranks tell each other in words, so that all of them raise the same sentence instead of waiting for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ArgumentError, ArgumentTypeError, DisagreementError, LostRankError

Group = dist.ProcessGroup | DeviceMesh | tuple[DeviceMesh, int | str] | None
"""Ranks that share a sequence: a process group, a mesh of one dimension, a mesh and its dimension, or None for all."""


def as_group(group: Group) -> dist.ProcessGroup:
    """The process group that is meant.

    Raises:
        ArgumentError: There is none yet, it leaves this rank out, or a mesh has several dimensions.
        ArgumentTypeError: It is nothing of the kind.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ArgumentError(f"group must be one dimension of {group}: write (mesh, name) or mesh[name]")
        return group.get_group()
    if isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], DeviceMesh):
        return group[0].get_group(group[1])
    if group is None:
        if not dist.is_initialized():
            raise ArgumentError("there is no process group yet: call torch.distributed.init_process_group first")
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ArgumentError("this rank is no member of group; make the call on the group's ranks alone")
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentTypeError(
            f"group must be a ProcessGroup, a DeviceMesh of one dimension or (DeviceMesh, dimension), got {group!r}"
        )
    return group


def agree(
    group: dist.ProcessGroup,
    device: torch.device,
    facts: Mapping[str, str],
    length: int,
    refusal: Exception | None = None,
) -> tuple[int, ...]:
    """Hold the ranks of a group to one call.

    Args:
        group: All of its ranks call this.
        device: Where the tensors of the call lie.
        facts: What must be equal on all ranks, by its name in a message.
        length: Steps of this rank.
        refusal: What this rank found wrong with its arguments, so that the others do not wait for it.

    Returns:
        Steps of every rank.

    Raises:
        DisagreementError: The ranks differ or one of them refuses, with one sentence on all ranks.
        LostRankError: A rank did not come within the group's timeout, or is gone.
    """
    channel = _channel(group)
    mine = torch.tensor([*_words(tuple(facts.items())), length, refusal is not None], device="cpu")
    table = [torch.empty_like(mine) for _ in range(group.size())]
    with waiting(group, "the other ranks' arguments"):
        dist.all_gather(table, mine, group=channel)
        said = [tuple(row.tolist()) for row in table]
        if all(row[:2] == said[0][:2] and not row[3] for row in said):
            _meet(group, device)
            return tuple(row[2] for row in said)
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, (None if refusal is None else str(refusal), dict(facts)), group=channel)
    raise DisagreementError(_difference(told)) from refusal


@contextmanager
def waiting(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Where torch's collectives fail, say who waited for what."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"rank {group.rank()} of {group.size()} waited in vain for {what}: a rank has ended, or takes no part in "
            f"this call; torch.distributed says: {error}"
        ) from error


_CHANNELS: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""For each group, the one that its ranks agree through."""


def _channel(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group itself where it takes CPU tensors, else one of gloo with the same ranks, made at the first call."""
    if group in _CHANNELS:
        return _CHANNELS[group]
    channel = group
    with waiting(group, "the group's first call"):
        if "cpu" not in dist.get_backend_config(group):
            ranks = dist.get_process_group_ranks(group)
            channel = dist.new_group(ranks, timeout(group), "gloo", use_local_synchronization=True)
    _CHANNELS[group] = channel
    return channel


_MET: WeakSet[dist.ProcessGroup] = WeakSet()


def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """Messages between some of a group's GPUs are allowed only after all of them have met once."""
    if device.type != "cpu" and group not in _MET:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _MET.add(group)


def timeout(group: dist.ProcessGroup) -> Any:
    """How long the group's collectives wait, as torch was told; the tensors of a wrong call may lie anywhere."""
    return group._get_backend(group._device_types[0]).options._timeout


@lru_cache(maxsize=256)
def _words(facts: tuple[tuple[str, str], ...]) -> tuple[int, int]:
    """128 bits of what must be equal."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    first, second = (int.from_bytes(digest[place : place + 8], "little", signed=True) for place in (0, 8))
    return first, second


def _difference(told: list[tuple[str | None, dict[str, str]]]) -> str:
    """What sets ranks apart, in one sentence that is the same on each of them."""
    refused = [(rank, refusal) for rank, (refusal, _) in enumerate(told) if refusal is not None]
    if refused:
        return "; ".join(f"rank {rank} refuses its arguments: {refusal}" for rank, refusal in refused)
    for name in dict.fromkeys(name for _, facts in told for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(told):
            ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            what = "; ".join(f"{text} on rank {', '.join(map(str, who))}" for text, who in ranks.items())
            return f"the ranks of a group must make the same call, but {name} is {what}"
    return "the ranks of a group must make the same call"
