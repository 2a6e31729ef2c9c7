"""What importing the package costs everybody who only might use it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

BUDGET_S = 0.15
SCRIPT = """
import json, sys, time, torch
before = set(sys.modules)
start = time.process_time()
import dilated_attention_pytorch
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


class Cost(NamedTuple):
    """Processor time beyond torch's, and the top-level packages that came with it."""

    seconds: float
    packages: list[str]


@pytest.fixture(scope="module")
def costs() -> list[Cost]:
    """Of three fresh processes."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    return [Cost(*json.loads(subprocess.run(command, capture_output=True, check=True).stdout)) for _ in range(3)]


def test_an_import_is_quick(costs: list[Cost]) -> None:
    """Work at import: tables, files, a compiler. Least processor time of three: a busy machine passes."""
    assert min(cost.seconds for cost in costs) < BUDGET_S


def test_an_import_brings_no_tools(costs: list[Cost]) -> None:
    """A compiler, a template engine or a YAML reader in the process of everybody who imports a model."""
    tools = {"triton", "jinja2", "yaml", "matplotlib", "transformers", "rich", "filelock", "numpy"}
    assert not tools & set(costs[0].packages)
