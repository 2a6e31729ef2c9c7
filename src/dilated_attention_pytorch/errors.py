"""Every mistake this package can name, one class each.

A message names the value, the rule it breaks and the remedy. All classes descend from `DilatedAttentionError`, and
from the built-in exception a Python user would expect, so that `except ValueError` keeps working.
"""

from __future__ import annotations


class DilatedAttentionError(Exception):
    """Base class of every error raised on purpose by this package."""


class ArgumentError(DilatedAttentionError, ValueError):
    """A call's argument has a wrong value, shape, dtype or device."""


class ArgumentTypeError(DilatedAttentionError, TypeError):
    """A call's argument is of a wrong type."""


class OrderError(ArgumentError):
    """A token order is no permutation of 0..N-1, or does not fit its sequence or grid."""


class ConfigError(DilatedAttentionError, ValueError):
    """A launch configuration or a variant name that nothing can be built from."""


class UnsupportedError(DilatedAttentionError, NotImplementedError):
    """The asked-for backend refuses this problem; the message holds its reason."""


class DisagreementError(DilatedAttentionError, ValueError):
    """The ranks of a group do not make the same call; all of them get the same message."""


class LostRankError(DilatedAttentionError, RuntimeError):
    """A rank waited for others in vain; the message holds what torch.distributed said."""


class DatabaseError(DilatedAttentionError, ValueError):
    """A file of the tuning database breaks its schema; the message names file, line and remedy."""


class DatabaseMiss(DilatedAttentionError, LookupError):
    """`options(on_miss="error")` is on and the database holds no entry for this problem."""


class MissingPackageError(DilatedAttentionError, ImportError):
    """What was asked for needs a package that is not installed; the message says how to install it."""


class UnknownDeviceError(DilatedAttentionError, ValueError):
    """A simulated device's name is not in tune_db/devices.yaml."""


class CodegenError(DilatedAttentionError, ValueError):
    """A template, a variant or the rendered text of one is not well formed."""
