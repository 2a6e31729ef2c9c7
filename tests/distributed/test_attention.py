"""Attention across ranks is that of one device: out, lse and all gradients, held to the oracle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ..cases import make_inputs, oracle
from ..tolerances import Results, check_results
from . import loopback
from .conftest import Outcomes
from .ranks import BY_KERNELS, CUTS, Cut, batch, in_token_order, model


def check(cut: Cut, outcomes: Outcomes) -> None:
    """Hold what the ranks have together to the oracle."""
    got = Results(**in_token_order(cut, outcomes(cut.id)))
    inputs = make_inputs(cut.case)
    check_results(got, oracle(cut.case, inputs, mix_grad=cut.mix_grad), cut.case.dtype, dout=inputs.dout)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.id)
def test_ranks_together_compute_what_one_device_does(cut: Cut, outcomes: Outcomes) -> None:
    """A segment cut where a rank ends, a key of a later token, a mask of a rank's own, a row counted twice or never."""
    check(cut, outcomes)


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a process of its own")
@pytest.mark.parametrize("cut", BY_KERNELS, ids=lambda cut: cut.id)
def test_kernels_take_the_gathered_rows(cut: Cut) -> None:
    """Query rows shifted against the keys, or strides of gathered rows that a kernel reads otherwise."""
    inputs = make_inputs(cut.case)
    wanted = oracle(cut.case, inputs, mix_grad=cut.mix_grad)
    check_results(loopback.attend(cut), wanted, cut.case.dtype, dout=inputs.dout)


def test_checkpointing_repeats_the_call(outcomes: Outcomes) -> None:
    """A recomputed forward that draws another seed, or waits for ranks that do not repeat it."""
    assert max(outcomes("recomputed")) < 1e-12


def test_autocast_casts_before_rows_travel(outcomes: Outcomes) -> None:
    """float32 on the wire, or an output in the wrong type."""
    assert all(outcomes("autocast"))


def test_defaults_of_the_caller_do_not_matter(outcomes: Outcomes) -> None:
    """Indices on the default device, or made in inference mode and then of no use to training."""
    assert all(outcomes("elsewhere"))


def test_compiled_code_around_a_call_stays_right(outcomes: Outcomes) -> None:
    """A graph that holds the messages of a call, in the shapes of the first one."""
    for difference, operations in outcomes("compiled"):
        assert difference < 1e-12
        assert operations == 3  # the factor, sin and cos


def test_options_hold_in_the_backward(outcomes: Outcomes) -> None:
    """A backward behind `with options`, or in autograd's own thread, that plans under the defaults."""
    for forward, backward, deterministic in outcomes("planned options"):
        assert forward > 0
        assert backward > 0
        assert deterministic == {True}


def test_a_model_in_two_dimensions_trains_as_on_one_device(outcomes: Outcomes) -> None:
    """Weights whose gradient misses what other ranks' tokens made of this rank's keys, under DDP and FSDP2."""
    one = model()
    one(batch()).square().mean().backward()
    for of_rank in outcomes("two dimensions"):
        for wrapper in ("ddp", "fsdp2"):
            for name, weight in one.named_parameters():
                torch.testing.assert_close(of_rank[wrapper][name], weight.grad, msg=lambda text, n=name: f"{n}: {text}")


def test_groups_are_said_in_several_ways(outcomes: Outcomes) -> None:
    """A mesh of two dimensions taken for one, a word for a group, or a module that cannot be copied with its mesh."""
    for told in outcomes("groups"):
        assert told["same"]
        assert "write (mesh, name)" in told["mesh"]
        assert "got 'sp'" in told["word"]
        assert "add up to 12" in told["lengths"]
        assert "dim must be one of x's 4 dimensions, got -5" in told["dim"]


def test_ranks_agree_through_a_group_of_cpus(outcomes: Outcomes) -> None:
    """A GPU that is waited for at each call, or a group made at each of them."""
    assert outcomes("beside GPUs") == [True, True]


def test_sharding_is_undone(outcomes: Outcomes) -> None:
    """A swapped direction of the order, shares that overlap, gradients of one rank's loss alone."""
    assert outcomes("there and back") == [5, 4, 4]


def test_the_package_has_no_process_group_of_its_own() -> None:
    """A clear word instead of torch's, where a script forgets to start one."""
    import dilated_attention_pytorch as dap

    q = torch.randn(1, 8, 2, 8)
    with pytest.raises(dap.DilatedAttentionError, match="init_process_group"):
        dap.distributed.dilated_attention(q, q, q, 4, 1)
    assert Path(dap.distributed.__file__).parent.name == "distributed"
