"""Where a result came from, and whether two results may be combined."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from rmtension.errors import ProvenanceError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from.

    `architecture` names the neurons (family, layers, widths): sets and scores of two models can be compared only if
    it agrees. `model` is a fingerprint of the weights, `data` of the pairs. `n_tokens` counts the tokens that entered.
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
    def from_dict(cls, values: dict[str, Any]) -> "Provenance":
        """The inverse of `to_dict`; raises `ProvenanceError` when a field is missing or has another type."""
        for field in fields(cls):
            if not isinstance(values.get(field.name), field.type):  # type: ignore[arg-type]
                raise ProvenanceError(f"provenance: field {field.name!r} is missing or not {field.type}.")
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def fingerprint(parameters: "Iterable[Tensor]", *values: object) -> str:
    """16 hexadecimal digits over all bytes of `parameters`, and over `values` as they print."""
    import torch

    digest = hashlib.blake2b(repr(values).encode(), digest_size=8)
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
