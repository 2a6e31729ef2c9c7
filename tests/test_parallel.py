"""Models that are wrapped for several processes: DistributedDataParallel and FSDP2, on CPUs with gloo."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dilated_attention_pytorch as dap

RANKS = 2


class Block(nn.Module):
    """Projections around attention; as small as a model gets."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
        return self.out(dap.dilated_attention(q, k, v, [8, 32], [1, 4], order="hilbert").flatten(-2))


def _train(rank: int, port: int, batch: Tensor, folder: Path) -> None:
    """One rank: a step of the same model under both wrappers; rank 0 writes the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    own = batch[rank::RANKS]
    for wrapper in ("ddp", "fsdp2"):
        torch.manual_seed(0)
        block = Block()
        model = DistributedDataParallel(block) if wrapper == "ddp" else fully_shard(block, mesh=mesh)
        model(own).square().mean().backward()
        gradients = {}
        for name, weight in block.named_parameters():
            assert weight.grad is not None
            gradients[name] = weight.grad.full_tensor() if wrapper == "fsdp2" else weight.grad
        if rank == 0:
            torch.save(gradients, folder / f"{wrapper}.pt")
    dist.destroy_process_group()


def test_gradients_of_wrapped_models_are_those_of_one_process(tmp_path: Path) -> None:
    """A gradient that bypasses the hooks of a wrapper, or parameters resharded while it needs them."""
    batch = torch.randn(2 * RANKS, 37, 32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, (port, batch, tmp_path), nprocs=RANKS)
    torch.manual_seed(0)
    block = Block()
    block(batch).square().mean().backward()
    for wrapper in ("ddp", "fsdp2"):
        gradients = torch.load(tmp_path / f"{wrapper}.pt", weights_only=True)
        for name, weight in block.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6)
