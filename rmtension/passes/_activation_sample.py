"""Activations at tokens drawn at random, which resample ablation writes into other texts."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from rmtension.store._provenance import Provenance, digest_of
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False, repr=False)
class ActivationSample:
    """Activations of all layers at tokens drawn at random from the pairs: the donors of resample ablation.

    `keys` identify the prompts of the donors, so that no text gets activations of its own prompt.

    Examples:
        >>> donors = ActivationCollector(head).sample(pairs["helpful"], n=16, seed=0)
        >>> len(donors), donors.values.shape
        (16, torch.Size([16, 2, 24]))
    """

    values: Float[Tensor, "donor layer channel"]
    keys: Int[Tensor, "donor"]
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        where = self.provenance
        return f"ActivationSample({len(self)} tokens at {where.site} ({where.positions}), {where.architecture})"

    @property
    def digest(self) -> str:
        """64 hexadecimal digits over the donors."""
        return digest_of(self.values) + digest_of(self.keys)

    def save(self, path: str | Path) -> None:
        """Write the sample and its provenance to one safetensors file."""
        tensors = {"values": self.values, "keys": self.keys}
        write_result(path, "ActivationSample", tensors, {"provenance": self.provenance.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "ActivationSample":
        """Read what `save` wrote."""
        shapes = {"values": "float donor layer channel", "keys": "int donor"}
        tensors, values = read_result(path, "ActivationSample", tensors=shapes, values={"provenance": dict})
        return cls(tensors["values"], tensors["keys"], Provenance.from_dict(values["provenance"]))
