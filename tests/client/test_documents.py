"""Every block of code in the client's documents, run word for word."""

from __future__ import annotations

import importlib

import pytest
import torch

from .blocks import BLOCKS, CHECKPOINTS, DOCUMENTS, FENCED, hold

IMPORTS = {
    "kernels": (
        "HilbertAttentionCore",
        "HilbertAttentionFunction",
        "HilbertAttentionTritonFixed",
        "HilbertAttentionTritonWrapper",
        "create_hilbert_mapping",
    ),
    "kernels.hilbert_attention_core": (
        "HilbertAttentionCore",
        "HilbertAttentionFunction",
        "create_hilbert_mapping",
        "hilbert_attention_kernel",
        "standard_attention_kernel",
    ),
    "kernels.hilbert_attention_triton_wrapper": ("HilbertAttentionTritonWrapper", "HilbertAttentionTritonFixed"),
    "utils": ("HilbertAttentionMixin",),
    "utils.hilbert_attention_mixin": ("HilbertAttentionMixin",),
}


@pytest.mark.parametrize("module", IMPORTS)
def test_names_are_where_the_client_imports_them(module: str) -> None:
    """An import line of the client's that fails."""
    found = importlib.import_module(f"dilated_attention_pytorch.{module}")
    assert [name for name in IMPORTS[module] if not hasattr(found, name)] == []


def test_every_block_is_run() -> None:
    """A block of the documents that no test runs."""
    there = {
        (path.name, place)
        for path in DOCUMENTS.iterdir()
        for place in range(len(FENCED.findall(path.read_text(encoding="utf-8"))))
    }
    assert {(block.document, block.place) for block in BLOCKS.values()} == there


@pytest.mark.parametrize("checkpoints", CHECKPOINTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, training: bool, checkpoints: str) -> None:
    """Code of the client's that fails, or computes or learns something else than the contract says."""
    hold(name, "cpu", training=training, checkpoints=checkpoints)


def test_the_upgrade_keeps_results() -> None:
    """The guide's last example changes a model: within one segment both classes are the same attention."""
    old, _ = BLOCKS["before"].run("cpu")
    new, _ = BLOCKS["after"].run("cpu")
    q, k, v = torch.randn(3, 2, 60, 3, 16)
    old.__globals__["my_attention_function"] = lambda *tensors: torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors)
    ).transpose(1, 2)
    torch.testing.assert_close(old(q, k, v), new(q, k, v))
