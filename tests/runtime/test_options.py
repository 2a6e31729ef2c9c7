"""`with options(...)`: who sees which, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dilated_attention_pytorch.config import LaunchConfig
from dilated_attention_pytorch.errors import ArgumentError, ArgumentTypeError
from dilated_attention_pytorch.runtime.options import Options, current, options

CONFIG = LaunchConfig(64, 32)


def test_options_end_with_their_block_even_after_an_error() -> None:
    """A config that leaks out of its block retunes the rest of the program."""
    with pytest.raises(RuntimeError), options(config=CONFIG, on_miss="error", deterministic=True):
        assert current() == Options((("fwd", CONFIG), ("dkdv", CONFIG), ("dq", CONFIG)), None, "error", True)
        raise RuntimeError
    assert current() == Options()


def test_inner_options_keep_what_they_do_not_name(tmp_path: Path) -> None:
    """A library that sets one option must not undo its caller's."""
    with options(database=tmp_path, deterministic=True), options(config={"dq": CONFIG}) as inner:
        assert inner == Options((("dq", CONFIG),), tmp_path.resolve(), "fallback", True)


def test_threads_do_not_share_options() -> None:
    """One thread's deterministic run would switch another's kernels."""
    seen: list[Options] = []
    with options(on_miss="error"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [Options()]


def test_options_decorate() -> None:
    """A training step is a function more often than a block."""

    @options(on_miss="error")
    def step() -> str:
        return current().on_miss

    assert (step(), current().on_miss) == ("error", "fallback")


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"on_miss": "ignore"}, ArgumentError, "on_miss must be one of fallback, error, got 'ignore'"),
        ({"config": {"forward": CONFIG}}, ArgumentError, "'forward'; kernels are fwd, dkdv, dq"),
        ({"config": {"block_m": 64}}, ArgumentTypeError, "a LaunchConfig or a mapping"),
        ({"config": (64, 32)}, ArgumentTypeError, "a LaunchConfig or a mapping"),
        ({"deterministic": "yes"}, ArgumentTypeError, "deterministic must be True, False or None, got 'yes'"),
        ({"database": 7}, ArgumentTypeError, "database must be a path, got 7"),
        ({"database": "no/such/folder"}, ArgumentError, "'no/such/folder' is no folder"),
    ],
)
def test_a_wrong_option_is_refused(arguments: dict[str, object], error: type[Exception], complaint: str) -> None:
    """A misspelt option that is ignored is believed to act."""
    with pytest.raises(error, match=complaint), options(**arguments):  # type: ignore[arg-type]
        pass
