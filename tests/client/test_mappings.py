"""Mappings are made once, kept within bounds, and right wherever they are used."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import order
from dilated_attention_pytorch.kernels import HilbertAttentionCore, HilbertAttentionTritonWrapper
from dilated_attention_pytorch.order import CACHED_TABLES, TokenOrder
from dilated_attention_pytorch.utils import HilbertAttentionMixin


class Mixed(nn.Module, HilbertAttentionMixin):
    """A class of the client's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.setup_hilbert_attention(24, 3, 16, 2, use_hilbert_core=True, order="hilbert")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 8)).unbind(2)
        return self.compute_hilbert_attention(q, k, v).flatten(2)


MODULES = {
    "core": lambda: HilbertAttentionCore(24, 3, 16, 2, order="hilbert"),
    "image": lambda: HilbertAttentionCore(24, 3, 16, 2, order=TokenOrder("hilbert", grid=(6, 10), prefix=1)),
    "mixin": Mixed,
}
EACH = pytest.mark.parametrize("name", MODULES)


def test_made_once() -> None:
    """A mapping that is made again for the backward, for each module, for the mixin or for each call."""
    length = 1297  # used by no other test
    with mock.patch.object(order, "hilbert_walk", wraps=order.hilbert_walk) as walk:
        for make in (MODULES["core"], MODULES["mixin"]):
            module = make()
            for dtype in (torch.float32, torch.float64):
                module.to(dtype)(torch.randn(1, length, 24, dtype=dtype)).sum().backward()
        module.get_hilbert_indices(length, "cpu")
        module.get_inverse_hilbert_indices(length, "cpu")
    assert walk.call_count == 1


def test_bounded() -> None:
    """A service that meets ever new lengths, and keeps a mapping of each for ever."""
    module = Mixed()
    for length in range(200, 200 + 2 * CACHED_TABLES):
        module.get_hilbert_indices(length, "cpu")
    assert len(order._CURVE_TABLES._tables) <= CACHED_TABLES


@EACH
def test_devices(name: str) -> None:
    """A mapping that stays where the module was used first."""
    module = MODULES[name]()
    x = torch.randn(2, 61, 24)
    wanted = module(x)
    indices = Mixed().get_hilbert_indices(61, "meta")
    assert indices.device.type == "meta"
    torch.testing.assert_close(module(x), wanted)


@EACH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_duplicates(name: str, duplicate: Any) -> None:
    """A module that cannot be copied or sent to a worker, or that comes out attending otherwise."""
    module = MODULES[name]()
    x = torch.randn(2, 61, 24)
    out = module(x)
    torch.testing.assert_close(duplicate(module)(x), out)


@EACH
def test_inference_first(name: str) -> None:
    """A mapping made in inference mode that no later backward may save."""
    module = MODULES[name]()
    length = 61 if name == "image" else 1301
    x = torch.randn(1, length, 24)
    with torch.inference_mode():
        wanted = module(x).clone()
    out = module(x)
    out.sum().backward()
    torch.testing.assert_close(out, wanted)


def test_threads() -> None:
    """Threads that evict, make and read mappings at once."""
    attention = HilbertAttentionTritonWrapper([16], [2], num_heads=1, head_dim=8, order="hilbert")
    tensors = [torch.randn(1, 100 + place, 1, 8, requires_grad=True) for place in range(CACHED_TABLES + 8)]

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(attention(x, x, x).square().sum(), x)[0]

    alone = [gradient(x) for x in tensors]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(gradient, tensors * 2))
    for mine, wanted in zip(together, alone * 2, strict=True):
        torch.testing.assert_close(mine, wanted)
