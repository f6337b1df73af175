"""Where a result came from, and whether two results may be combined."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rmtension.errors import OptionError, ProvenanceError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

# What a folder of a checkpoint is told apart by: everything that can change what its model computes.
_WEIGHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin", "*.py")
# The fields that say how a result was computed: what has to agree before two results are compared.
METHOD_FIELDS = ("method", "aggregate", "replacement", "steps", "graddrop", "pool_tokens", "base")


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from, and how.

    `architecture` names the neurons (family, layers, widths): sets and scores of two models can be compared only if
    it agrees. `model` is a fingerprint of the weights, `data` of the pairs. `n_tokens` counts the tokens that entered.
    `skipped` has the ids of pairs that were left out because they gave numbers that are not finite.

    `sign` is what a positive score of a neuron says: 1, the neuron supports the margin, which falls without it; -1, the
    neuron opposes the margin; None, no direction (magnitudes, frequencies, and results that are not scores).

    `method` is the name of the method, and these are its options, None or False where it has no such option:
    `aggregate` ("signed" or "absolute": what is averaged over pairs), `replacement` (what activations are replaced by),
    `steps` (of integrated gradients), `graddrop`, `pool_tokens` (every token counts once, not every text), `base` (the
    fingerprint of the model from which a change is measured). `label` is all of that as text, for people to read.

    Examples:
        >>> scores.provenance.method, scores.provenance.n_pairs, scores.provenance.positions, scores.provenance.sign
        ('gradient_x_activation', 24, 'all', 1)
        >>> patching = NeuronAttribution(head, "attribution_patching", aggregate="absolute").score(pairs["helpful"])
        >>> patching.provenance.replacement, patching.provenance.label
        ('zero', 'attribution_patching to zero, absolute')
    """

    architecture: str
    model: str
    site: str
    positions: str
    method: str
    dtype: str
    data: str
    n_pairs: int
    n_tokens: int
    version: str
    skipped: tuple[str, ...] = ()
    sign: int | None = None
    aggregate: str | None = None
    replacement: str | None = None
    steps: int | None = None
    graddrop: bool = False
    pool_tokens: bool = False
    base: str | None = None

    def __post_init__(self) -> None:
        if self.sign not in (1, -1, None):
            raise ProvenanceError(f"provenance: field 'sign' is 1, -1 or None, got {self.sign!r:.80}.")

    @property
    def label(self) -> str:
        """The method with its options, for tables, figures and messages. Nothing is compared by it, or read from it."""
        return method_label(**{name: getattr(self, name) for name in METHOD_FIELDS})

    def require_same(self, other: "Provenance", names: Iterable[str], *, what: str) -> None:
        """Raise `ProvenanceError` naming the first of the fields `names` in which `other` differs."""
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ProvenanceError(
                    f"{what}: {name} differs: {mine!r} here, {theirs!r} there. Compute both with the same {name}."
                )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Provenance":
        """The inverse of `to_dict`; raises `ProvenanceError` when a field is missing or has another type."""
        if not isinstance(values, dict):
            raise ProvenanceError(f"provenance: expected an object, got {type(values).__name__}.")
        skipped = values.get("skipped", ())
        if not isinstance(skipped, list | tuple) or not all(isinstance(one, str) for one in skipped):
            raise ProvenanceError("provenance: field 'skipped' is no list of ids.")
        given = values | {"skipped": tuple(skipped)}
        for field in fields(cls):
            kind: Any = tuple if field.name == "skipped" else field.type
            if field.name not in given or type(given[field.name]) not in (get_args(kind) or (kind,)):
                raise ProvenanceError(
                    f"provenance: field {field.name!r} is missing or not {field.type}. Compute the result again."
                )
        return cls(**{field.name: given[field.name] for field in fields(cls)})


def method_label(
    method: str,
    *,
    aggregate: str | None = None,
    replacement: str | None = None,
    steps: int | None = None,
    graddrop: bool = False,
    pool_tokens: bool = False,
    base: str | None = None,
) -> str:
    """A method and its options as text: `Provenance.label`."""
    parts = [
        method,
        f" from base {base}" if base else "",
        f" to {replacement}" if replacement else "",
        f" in {steps} steps" if steps else "",
        ", graddrop" if graddrop else "",
        ", absolute" if aggregate == "absolute" else "",
        ", tokens pooled" if pool_tokens else "",
    ]
    return "".join(parts)


def digest_of(tensor: "Tensor") -> str:
    """32 hexadecimal digits over the bytes, dtype and shape of a tensor."""
    import torch

    there = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{there.dtype} {tuple(there.shape)}".encode())
    digest.update(there.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def fingerprint(parameters: "Iterable[Tensor]", *values: object) -> str:
    """16 hexadecimal digits over all bytes of `parameters`, and over `values` as they print."""
    import torch

    digest = hashlib.blake2b(repr(values).encode(), digest_size=8)
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Names and contents of the files that make up a checkpoint; reads them all, opens no model."""
    files = sorted({path for pattern in _WEIGHED for path in folder.glob(pattern)})
    if not files:
        raise OptionError(f"model: {folder} holds no checkpoint (none of {list(_WEIGHED)}).")
    digest = hashlib.sha256()
    try:
        for path in files:
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise StorageError(f"{folder}: the checkpoint cannot be read ({error}).") from error
    return digest.hexdigest()[:32]
