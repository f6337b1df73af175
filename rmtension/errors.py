"""Errors and warnings: every message names the argument, what was expected, what was passed, and the next step."""

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
    """The base class of all errors that rmtension raises.

    Examples:
        >>> try:
        ...     scores.top(2.0)
        ... except RMTensionError as error:
        ...     print(error)
        fraction: expected a number in (0, 1], got 2.0.
    """


class RMTensionWarning(UserWarning):
    """The category of all warnings of this library, by which they can be filtered.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", RMTensionWarning)
        ...     try:
        ...         scores.top(k=47, rank_by="supports")
        ...     except RMTensionWarning as warning:
        ...         print(str(warning)[:9])
        top: only
    """


class DataError(RMTensionError, ValueError):
    """A preference pair, a text or a data file is invalid; the message names the file, the row and the field.

    Examples:
        >>> from rmtension import PreferencePairs
        >>> try:
        ...     PreferencePairs.from_records([{"prompt": "2 + 2?", "chosen": "4", "rejected": ""}])
        ... except DataError as error:
        ...     print(str(error).partition(";")[0])
        record 0: field 'rejected' is empty
    """


class ModelError(RMTensionError, ValueError):
    """A checkpoint or a model cannot be used as a reward model.

    Examples:
        >>> import tempfile
        >>> from rmtension import RewardHead
        >>> try:
        ...     RewardHead.from_pretrained(tempfile.mkdtemp())
        ... except ModelError:
        ...     print("not a reward model")
        not a reward model
    """


class CheckError(ModelError):
    """A check of `RewardHead.check` failed; `table` holds the results of all checks, passed or not.

    Examples:
        >>> try:
        ...     table = head.check(pairs["helpful"])
        ... except CheckError as error:
        ...     table = error.table
        >>> table.columns.tolist()[0], "tokens" in set(table["check"])
        ('check', True)
    """

    def __init__(self, message: str, table: "pd.DataFrame") -> None:
        super().__init__(message)
        self.table = table


class OptionError(RMTensionError, ValueError):
    """An argument has a type or value that the call does not accept.

    Examples:
        >>> try:
        ...     scores.top(k=100)
        ... except OptionError as error:
        ...     print(error)
        k: expected 1 to 48 neurons, got 100.
    """


class ProvenanceError(RMTensionError, ValueError):
    """Two results, or a result and a model, cannot be combined because they were computed differently.

    Examples:
        >>> from rmtension import NeuronSet
        >>> try:
        ...     neurons & NeuronSet(neurons.mask, "mlp_gate", neurons.architecture)
        ... except ProvenanceError as error:
        ...     print(str(error).partition(". ")[0])
        NeuronSet: site differs: 'mlp' here, 'mlp_gate' there
    """


class StorageError(RMTensionError, OSError):
    """A result could not be written to disk or read from disk.

    Examples:
        >>> from rmtension import NeuronScores
        >>> try:
        ...     NeuronScores.load("missing.safetensors")
        ... except StorageError as error:
        ...     print(error)
        missing.safetensors: there is no such file. Check the path.
    """


class ShardError(RMTensionError, RuntimeError):
    """Inside `sharded()`, a process ended or stopped responding, or the processes do not run the same calls.

    Examples:
        >>> from rmtension.distributed import sharded
        >>> try:
        ...     with sharded():
        ...         rewards = head.score_pairs(pairs["helpful"])
        ... except ShardError as error:
        ...     print("restart all processes:", error)
    """
