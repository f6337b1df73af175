"""Scores of neurons per pair, from which a bootstrap over prompts or a comparison within one model is computed."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import neuron_columns
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.neurons._signs import with_direction
from rmtension.store._provenance import Provenance
from rmtension.store._records import read_objects
from rmtension.store._storage import read_result, write_result


@dataclass(frozen=True, eq=False, repr=False)
class PairAttributions:
    """One signed score per pair and neuron, in the order of `pairs`, in the dtype of rewards.

    Memory: `pairs x layers x neurons` numbers; 500 pairs of a model with 6 x 1,536 neurons take 18 MB in float32.

    Examples:
        >>> by_pair = NeuronAttribution(head, "direct_effect").per_pair(pairs["helpful"])
        >>> by_pair.values.shape, by_pair.mean().shape, len(by_pair.pairs)
        (torch.Size([24, 2, 24]), torch.Size([2, 24]), 24)
    """

    values: Float[Tensor, "pair layer neuron"]
    pairs: PreferencePairs
    provenance: Provenance

    def __post_init__(self) -> None:
        if len(self.values) != len(self.pairs):
            raise OptionError(f"values: expected one row per pair ({len(self.pairs)}), got {len(self.values)} rows.")

    def __repr__(self) -> str:
        n, layers, neurons = self.values.shape
        where = self.provenance
        shape = f"{n} pairs, {layers} x {neurons} {where.site} neurons"
        return f"PairAttributions({where.label}: {shape} of {where.architecture})"

    def __len__(self) -> int:
        return len(self.pairs)

    def mean(self) -> Float[Tensor, "layer neuron"]:
        """The mean over pairs, in float64: the values of `NeuronAttribution.score`."""
        return self.values.double().mean(dim=0)

    def take(self, rows: list[int]) -> "PairAttributions":
        """The scores of the pairs with the indices `rows`; the provenance stays that of all pairs."""
        return PairAttributions(self.values[rows], PreferencePairs(self.pairs[row] for row in rows), self.provenance)

    def to_frame(self) -> pd.DataFrame:
        """One row per pair and neuron: id, layer, neuron, score, and its direction for that pair's margin.

        `direction` is as in `NeuronScores.to_frame`.
        """
        n, layers, neurons = self.values.shape
        index = pd.MultiIndex.from_product(
            [[pair.id for pair in self.pairs], range(layers), range(neurons)], names=["id", "layer", "neuron"]
        )
        frame = pd.DataFrame({"score": self.values.reshape(n * layers * neurons).numpy()}, index=index).reset_index()
        places = neuron_columns(
            self.provenance.site, self.provenance.architecture, frame["layer"].to_numpy(), frame["neuron"].to_numpy()
        )
        for number, name in enumerate([name for name in places if name not in frame]):
            frame.insert(3 + number, name, places[name])
        return with_direction(frame, self.values, self.provenance)

    def save(self, path: str | Path) -> None:
        """Write scores, pairs and provenance to one safetensors file."""
        values = {"pairs": [pair.to_dict() for pair in self.pairs], "provenance": self.provenance.to_dict()}
        write_result(path, "PairAttributions", {"values": self.values}, values)

    @classmethod
    def load(cls, path: str | Path) -> "PairAttributions":
        """Read what `save` wrote."""
        expected = {"pairs": list, "provenance": dict}
        tensors, values = read_result(
            path, "PairAttributions", tensors={"values": "float pair layer neuron"}, values=expected
        )
        pairs = PreferencePairs.from_records(read_objects(Path(path), values["pairs"]))
        return cls(tensors["values"], pairs, Provenance.from_dict(values["provenance"]))
