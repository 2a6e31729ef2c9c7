"""What the interpreter lacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


@pytest.fixture
def adding_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter loads and stores by descriptor, and cannot add."""
    from triton.runtime import interpreter

    def add(self: Any, kind: Any, described: Any, value: Any, indices: list[Any]) -> Any:
        policies = len(inspect.signature(self.create_descriptor_load).parameters) - 2  # of caches: one from 3.9 on
        before = self.create_descriptor_load(described, indices, *[None] * policies)
        total = interpreter.TensorHandle(before.data + value.data, value.dtype)
        return self.create_descriptor_store(described, total, indices)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", add, raising=False)
