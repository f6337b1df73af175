"""The result of collecting activations: four statistics of every neuron, and the mean of every channel."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension._repr_html import N_ROWS, html_table
from rmtension._sites import all_neuron_columns
from rmtension.store._provenance import Provenance, digest_of
from rmtension.store._storage import read_result, write_result

_STATISTICS = ("mean", "abs_mean", "rms", "frequency")


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Activation statistics of every neuron over the selected tokens of both texts of all pairs, in float64.

    `mean` is signed, `abs_mean` is the mean of |a|, `rms` the root of the mean square, `frequency` the share of tokens
    with a > 0. The activation of an attention head is the L2 norm of its output. `channel_mean` is the mean of every
    channel, which mean ablation writes; for `mlp` it equals `mean`.

    Examples:
        >>> means.to_frame().round(2).head(2)
           layer  neuron  mean  abs_mean   rms  frequency
        0      0       0  0.45      0.45  1.14        0.4
        1      0       1  0.00      0.00  0.00        0.0
        >>> means.save("means.safetensors")
        >>> ActivationStatistics.load("means.safetensors").provenance == means.provenance
        True
    """

    mean: Float[Tensor, "layer neuron"]
    abs_mean: Float[Tensor, "layer neuron"]
    rms: Float[Tensor, "layer neuron"]
    frequency: Float[Tensor, "layer neuron"]
    channel_mean: Float[Tensor, "layer channel"]
    provenance: Provenance

    @property
    def n_tokens(self) -> int:
        """The number of tokens that the statistics are computed from."""
        return self.provenance.n_tokens

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over the means that ablation writes."""
        return digest_of(self.channel_mean)

    def __repr__(self) -> str:
        layers, neurons = self.mean.shape
        where = self.provenance
        return (
            f"ActivationStatistics({layers} x {neurons} {where.site} neurons; {where.n_pairs} pairs, {self.n_tokens} "
            f"tokens ({where.positions}), {where.architecture})"
        )

    def _repr_html_(self) -> str:
        """A table of the neurons with the largest `abs_mean`."""
        frame = self.to_frame()
        return html_table(f"{self!r}; largest abs_mean:", frame.nlargest(N_ROWS, "abs_mean"), n_of=len(frame))

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron: layer, neuron and the four statistics; at the site `expert` also expert and index."""
        layers, neurons = self.mean.shape
        columns = all_neuron_columns(self.provenance.site, self.provenance.architecture, (layers, neurons))
        return pd.DataFrame(columns | {name: getattr(self, name).flatten().numpy() for name in _STATISTICS})

    def save(self, path: str | Path) -> None:
        """Write statistics and provenance to one safetensors file."""
        tensors = {name: getattr(self, name) for name in (*_STATISTICS, "channel_mean")}
        write_result(path, "ActivationStatistics", tensors, {"provenance": self.provenance.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> "ActivationStatistics":
        """Read what `save` wrote."""
        shapes = dict.fromkeys(_STATISTICS, "float layer neuron") | {"channel_mean": "float layer channel"}
        tensors, values = read_result(path, "ActivationStatistics", tensors=shapes, values={"provenance": dict})
        return cls(**tensors, provenance=Provenance.from_dict(values["provenance"]))
