"""`with dap.options(...)`: how calls inside choose their launches. Each thread and each async task has its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ..config import EVERY_OP, OPS, LaunchConfig
from ..errors import ArgumentError, ArgumentTypeError

ON_MISS = ("fallback", "error")


@dataclass(frozen=True)
class Options:
    """The options in force.

    Attributes:
        config: (op, config) pairs that go before every measurement.
        database: Folder of the user's own tuning database, which goes before the committed one.
        on_miss: "fallback", or "error": refuse to launch what was never measured.
        deterministic: Exclude atomics; None follows `torch.use_deterministic_algorithms`.
        miss_log: File that calls without a measurement are appended to.
    """

    config: tuple[tuple[str, LaunchConfig], ...] = ()
    database: Path | None = None
    on_miss: str = "fallback"
    deterministic: bool | None = None
    miss_log: Path | None = None


DEFAULTS = Options()

_current: ContextVar[Options] = ContextVar("dilated_attention_options", default=DEFAULTS)


def current() -> Options:
    """The options of the innermost `with options(...)`, or the defaults."""
    return _current.get()


@contextmanager
def options(
    config: LaunchConfig | Mapping[str, LaunchConfig] | None = None,
    database: str | Path | None = None,
    on_miss: str = "fallback",
    deterministic: bool | None = None,
    miss_log: str | Path | None = None,
) -> Iterator[Options]:
    """Sets how the calls inside choose their kernels; also works as a decorator.

    `config`, `database`, `deterministic` and `miss_log` that are None stay as the enclosing `options` set them.

    Args:
        config: Launch configuration of every kernel, or of those named: "fwd", "dkdv", "dq", or "bwd", which has one
            launch give all gradients. It goes before every measurement, and one that the device cannot launch is an
            error.
        database: Folder of a tuning database that goes before the committed one.
        on_miss: "fallback" takes the nearest measurement or an untuned default where nothing was measured for a
            problem; "error" raises `DatabaseMiss`.
        deterministic: Exclude atomics, whatever `torch.use_deterministic_algorithms` says.
        miss_log: File to which every new kind of problem is appended that ran without a measurement of its own, at most
            1,000; `dilated-attention tune --from-misses` measures them.

    Raises:
        ArgumentError, ArgumentTypeError: A value is none of these.
    """
    outer = current()
    chosen = Options(
        config=outer.config if config is None else _pairs(config),
        database=outer.database if database is None else _folder(database),
        on_miss=on_miss,
        deterministic=outer.deterministic if deterministic is None else deterministic,
        miss_log=outer.miss_log if miss_log is None else _file(miss_log),
    )
    if on_miss not in ON_MISS:
        raise ArgumentError(f"on_miss must be one of {', '.join(ON_MISS)}, got {on_miss!r}")
    if not isinstance(chosen.deterministic, (bool, type(None))):
        raise ArgumentTypeError(f"deterministic must be True, False or None, got {deterministic!r}")
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)


def _pairs(config: LaunchConfig | Mapping[str, LaunchConfig]) -> tuple[tuple[str, LaunchConfig], ...]:
    named = dict.fromkeys(OPS, config) if isinstance(config, LaunchConfig) else config
    if not isinstance(named, Mapping) or not all(isinstance(value, LaunchConfig) for value in named.values()):
        raise ArgumentTypeError(f"config must be a LaunchConfig or a mapping of op to LaunchConfig, got {config!r}")
    if unknown := sorted(str(op) for op in named if op not in EVERY_OP):
        raise ArgumentError(f"config names {unknown[0]!r}; kernels are {', '.join(EVERY_OP)}")
    return tuple((op, named[op]) for op in EVERY_OP if op in named)


def _folder(database: str | Path) -> Path:
    if not isinstance(database, (str, Path)):
        raise ArgumentTypeError(f"database must be a path, got {database!r}")
    path = Path(database).expanduser().resolve()
    if not path.is_dir():
        raise ArgumentError(f"database {str(database)!r} is no folder; give one that holds <arch>/<device>/<op>.yaml")
    return path


def _file(miss_log: str | Path) -> Path:
    if not isinstance(miss_log, (str, Path)):
        raise ArgumentTypeError(f"miss_log must be a path, got {miss_log!r}")
    path = Path(miss_log).expanduser().resolve()
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentError(f"miss_log {str(miss_log)!r} is no file in a folder that exists; name one")
    return path
