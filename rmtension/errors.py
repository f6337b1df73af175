"""What the library raises: every message names the argument, what was expected, what came, and the next step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CheckError",
    "DataError",
    "ModelError",
    "OptionError",
    "ProvenanceError",
    "RMTensionError",
    "RMTensionWarning",
    "ShardError",
    "StorageError",
]


class RMTensionError(Exception):
    """Base of every error that rmtension raises on purpose.

    Examples:
        >>> try:
        ...     scores.top(2.0)
        ... except RMTensionError as error:
        ...     print(error)
        fraction: expected a number in (0, 1], got 2.0.
    """


class RMTensionWarning(UserWarning):
    """Every warning of this library, so that it can be told apart from those of the libraries underneath."""


class DataError(RMTensionError, ValueError):
    """A preference pair, a text or a data file cannot be used as it is."""


class ModelError(RMTensionError, ValueError):
    """A checkpoint or a model cannot serve as a reward model here."""


class CheckError(ModelError):
    """`RewardHead.check` found something wrong; `table` holds every check, passed or not."""

    def __init__(self, message: str, table: "pd.DataFrame") -> None:
        super().__init__(message)
        self.table = table


class OptionError(RMTensionError, ValueError):
    """An argument has a value outside what the call accepts."""


class ProvenanceError(RMTensionError, ValueError):
    """Two results, or a result and a model, do not belong together."""


class StorageError(RMTensionError, OSError):
    """A result could not be written to, or read from, disk."""


class ShardError(RMTensionError, RuntimeError):
    """Processes that share the work have lost one another, or do not do the same."""
