"""The real templates and the real matrix: what is committed under generated/."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from codegen import ROOT
from codegen.matrix import VARIANTS
from codegen.sync import compare, render_all
from dilated_attention_pytorch.variant import Variant
from dilated_attention_pytorch.workloads import WORKLOADS


def test_what_is_committed_is_what_is_rendered_and_quickly() -> None:
    """A template would be reviewed, and another kernel run; or nobody would wait for the check."""
    start = time.process_time()
    texts = render_all(VARIANTS)
    seconds = time.process_time() - start
    assert compare(texts) == []
    assert seconds < 5


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_generated_code_passes_ruff_as_rendered(command: list[str]) -> None:
    """A formatter in an editor would make every file stale."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT / "generated")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_names_read_back_as_variants() -> None:
    """A file whose name means another variant would be loaded for it."""
    assert [Variant.from_name(variant.name) for variant in VARIANTS] == list(VARIANTS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_branch_of_a_workload_has_texts_of_its_own(name: str) -> None:
    """A model that we name would quietly run through the general variant."""
    branches = {
        Variant(
            "full" if problem.is_full(branch) else problem.segment(branch), dilation, problem.order, problem.queries
        )
        for problem in WORKLOADS[name].problems()
        for branch, (_, dilation) in enumerate(problem.branches)
    }
    assert branches <= VARIANTS.keys()
