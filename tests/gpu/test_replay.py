"""Launches that are made again, on a GPU: the same bits as Triton's own, wherever they are queued."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch as dap
from dilated_attention_pytorch.runtime import launch, replay
from tests.kernels import poisoned_outputs

pytestmark = pytest.mark.gpu


def inputs(length: int = 1000) -> list[Tensor]:
    """q, k, v and dout; no two calls give the same."""
    return [torch.randn(2, length, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def step(tensors: list[Tensor], segments: tuple[int, ...] = (128, 512)) -> list[Tensor]:
    """out and gradients."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = dap.dilated_attention(q, k, v, segments, [1, segments[1] // segments[0]], backend="triton")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


@contextmanager
def only_again() -> Iterator[None]:
    """Triton's function launches nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(launch, "run_kernel")
        yield


def by_triton(tensors: list[Tensor], segments: tuple[int, ...] = (128, 512)) -> list[Tensor]:
    """A step that nothing came before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_KNOWN", {})
        return step(tensors, segments)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("length", "segments"), [(1000, (128, 512)), (4096, (1024, 2048))])
def test_on_any_stream(length: int, segments: tuple[int, ...]) -> None:
    """A launcher that this version of Triton wants called otherwise; a stream or a descriptor of the first call."""
    step(inputs(length), segments)
    tensors = inputs(length)
    wanted = by_triton(tensors, segments)
    with only_again(), poisoned_outputs():
        assert same(step(tensors, segments), wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with only_again(), torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [x * 1 for x in tensors]
        found = step(late, segments)
    stream.synchronize()
    assert same(found, wanted)


def test_in_a_graph() -> None:
    """A capture that holds addresses of the call that was kept."""
    step(inputs())
    held = inputs()
    graph = torch.cuda.CUDAGraph()
    with only_again(), torch.cuda.graph(graph):
        found = step(held)
    for _ in range(2):
        tensors = inputs()
        for place, x in zip(held, tensors, strict=True):
            place.copy_(x)
        graph.replay()
        assert same(found, by_triton(tensors))


def test_from_threads() -> None:
    """A current device or stream of another thread."""
    step(inputs())
    every = [inputs() for _ in range(4)]
    wanted = [by_triton(tensors) for tensors in every]
    right = []

    def often(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            right.extend(same(step(every[place]), wanted[place]) for _ in range(20))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=often, args=(place,)) for place in range(4)]
    with only_again():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 80
