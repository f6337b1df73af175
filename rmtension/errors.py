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
    """Every warning of this library, so that it can be told apart from those of the libraries underneath.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", RMTensionWarning)
        ...     top = scores.top(k=30)
        >>> print(caught[0].message)
        top: the cut at 30 of 48 neurons falls inside a tie ...
    """


class DataError(RMTensionError, ValueError):
    """A preference pair, a text or a data file cannot be used as it is.

    Examples:
        >>> try:
        ...     PreferencePairs.from_records([{"prompt": "2 + 2?", "chosen": "4"}])
        ... except DataError as error:
        ...     print(error)
        record 0: field 'rejected' is missing...
    """


class ModelError(RMTensionError, ValueError):
    """A checkpoint or a model cannot serve as a reward model here.

    Examples:
        >>> try:
        ...     RewardHead(head.model, weight=[1.0, 2.0])
        ... except ModelError as error:
        ...     print(error)
        weight: expected 24 numbers, ...
    """


class CheckError(ModelError):
    """`RewardHead.check` found something wrong; `table` holds every check, passed or not.

    Examples:
        >>> from rmtension.synthetic.check_matrix import make_classifier
        >>> try:
        ...     head.check(pairs["helpful"][:2], reference=make_classifier("gpt2", 64))
        ... except CheckError as error:
        ...     print(len(error.table), "checks, failed:", list(error.table.query("not passed")["check"])[:1])
        14 checks, failed: ['equal to transformers']
    """

    def __init__(self, message: str, table: "pd.DataFrame") -> None:
        super().__init__(message)
        self.table = table


class OptionError(RMTensionError, ValueError):
    """An argument has a value outside what the call accepts.

    Examples:
        >>> try:
        ...     AblationContext(head, neurons, positions="first")
        ... except OptionError as error:
        ...     print(error)
        positions: expected one of ['all', 'response', 'last'], got 'first'...
    """


class ProvenanceError(RMTensionError, ValueError):
    """Two results, or a result and a model, do not belong together.

    Examples:
        >>> heads = NeuronAttribution(head, "gradient_x_activation", site="attn_head").score(pairs["helpful"])
        >>> try:
        ...     neurons | heads.top(k=1)
        ... except ProvenanceError as error:
        ...     print(error)
        NeuronSet: site differs: 'mlp' here, 'attn_head' there...
    """


class StorageError(RMTensionError, OSError):
    """A result could not be written to, or read from, disk.

    Examples:
        >>> try:
        ...     NeuronSet.load("missing.safetensors")
        ... except StorageError as error:
        ...     print(error)
        missing.safetensors: ...
    """


class ShardError(RMTensionError, RuntimeError):
    """Processes that share the work have lost one another, or do not do the same.

    Examples:
        >>> from rmtension.distributed import sharded
        >>> try:
        ...     with sharded():
        ...         scored = head.score_pairs(pairs["helpful"])
        ... except ShardError as error:
        ...     print("no result:", error)
        >>> scored.accuracy()
        1.0
    """
