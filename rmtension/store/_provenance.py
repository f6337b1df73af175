"""What a result was computed from, and whether two results may be combined."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rmtension.errors import OptionError, ProvenanceError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

# What `rmtension.training` notes about a training; it changes nothing that the model computes.
TRAINING_RECORD = "rmtension_training.json"
# The files of a checkpoint that identify it: all files that can change what its model computes.
_WEIGHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin", "*.py")
# The fields that say how a result was computed; they must agree before two results are compared.
METHOD_FIELDS = ("method", "aggregate", "replacement", "steps", "graddrop", "pool_tokens", "base")


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from, and how.

    `architecture` identifies the neurons (family, layers, widths): sets and scores of two models can be compared only
    if it agrees. `model` is a fingerprint of the weights and the head, `body` of the weights alone, which the outputs
    of one model share, and `data` of the pairs. `output` names the output that was the reward, if the head has several.
    `n_tokens` counts the tokens used. `skipped` holds the ids of pairs that were skipped because they gave NaN or
    infinite values.

    `sign` says what a positive score of a neuron means: 1, the neuron supports the margin, which falls without it; -1,
    the neuron opposes the margin; None, no direction (magnitudes, frequencies, and results that are not scores).

    `method` is the name of the method. Its options are None or False if the method has no such option: `aggregate`
    ("signed" or "absolute": what is averaged over pairs), `replacement` (what activations are replaced by), `steps` (of
    integrated gradients), `graddrop`, `pool_tokens` (every token counts once, not every text), `base` (the fingerprint
    of the model from which a change is measured). `label` is the method with its options as text.

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
    body: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if self.sign not in (1, -1, None):
            raise ProvenanceError(f"provenance: expected 1, -1 or None in field 'sign', got {self.sign!r:.80}.")

    @property
    def label(self) -> str:
        """The method with its options as text, for tables, figures and messages; results are never compared by it."""
        return method_label(**{name: getattr(self, name) for name in METHOD_FIELDS})

    def has_same_neurons(self, other: "Provenance") -> bool:
        """Whether both results are of one body, whichever output of it was the reward."""
        if self.body is None or other.body is None:
            return self.model == other.model
        return self.body == other.body

    def require_same(self, other: "Provenance", names: Iterable[str], *, what: str) -> None:
        """Raise `ProvenanceError` naming the first of the fields `names` in which `other` differs."""
        for name in names:
            first, second = getattr(self, name), getattr(other, name)
            if first != second:
                raise ProvenanceError(
                    f"{what}: {name} differs: {first!r} here, {second!r} there. Compute both with the same {name}."
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
        if not isinstance(skipped, list | tuple) or not all(isinstance(id_, str) for id_ in skipped):
            raise ProvenanceError(
                f"provenance: expected a list of ids in field 'skipped', got {skipped!r:.80}. Compute the result again."
            )
        given = values | {"skipped": tuple(skipped)}
        for field in fields(cls):
            kind: Any = tuple if field.name == "skipped" else field.type
            if field.name not in given or type(given[field.name]) not in (get_args(kind) or (kind,)):
                raise ProvenanceError(
                    f"provenance: field {field.name!r} is missing or not of type {field.type}. Compute the result "
                    "again."
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

    on_cpu = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{on_cpu.dtype} {tuple(on_cpu.shape)}".encode())
    digest.update(on_cpu.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def fingerprint(parameters: "Iterable[Tensor]", *values: object) -> str:
    """16 hexadecimal digits over all bytes of `parameters` and the `repr` of `values`."""
    import torch

    digest = hashlib.blake2b(repr(values).encode(), digest_size=8)
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str | None:
    """A SHA-256 digest of a tokenizer's vocabulary and steps; None without a backend in Rust.

    How the last call padded and cut its texts is kept in the backend too, and is left out: the next call sets it anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    steps = {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


def digest_of_folder(folder: Path) -> str:
    """32 hexadecimal digits over names and contents of a checkpoint's files; reads all files, opens no model."""
    files = sorted({path for pattern in _WEIGHED for path in folder.glob(pattern)} - {folder / TRAINING_RECORD})
    if not files:
        raise OptionError(f"model: expected a checkpoint in {folder}, got no file like {list(_WEIGHED)}.")
    digest = hashlib.sha256()
    try:
        for path in files:
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise StorageError(f"{folder}: the checkpoint cannot be read ({error}). Check its permissions.") from error
    return digest.hexdigest()[:32]
