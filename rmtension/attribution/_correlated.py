"""Correlations of some neurons' activations with those of all neurons, over all tokens of all texts."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._sites import neuron_activations
from rmtension.data._tokens import TokenBatch
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import digest_of

# A variance below this share of the mean square is rounding: the neuron is constant.
_CONSTANT = 1e-12


class CorrelationSums(PairStatistic[tuple[Tensor, Tensor]]):
    """Sums for the correlation of each neuron of a set with every neuron of its site, in float64.

    Computes them as [2 + wanted, layer, neuron] (values, squares, products with each wanted neuron) and the number of
    tokens. Sums of several passes may be added. A token of two texts that share a prompt counts in both.
    """

    name = "correlate"
    keeps_layers = True
    layer_dim = 1

    def __init__(self, head: RewardModel, neurons: NeuronSet) -> None:
        self._head = head
        self._neurons = neurons
        self._sums, self._n_tokens = no_sums(neurons)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The site and the set."""
        return {"site": self._neurons.site, "neurons": digest_of(self._neurons.mask)}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The sums, and the number of tokens."""
        return {"sums": self._sums, "n_tokens": self._n_tokens}

    @torch.no_grad()
    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The sums over the tokens of a batch."""
        head, site = self._head, self._neurons.site
        layers: dict[int, Tensor] = {}

        def keep(_site: str, layer: int, channels: Tensor) -> None:
            values = neuron_activations(channels, site, head.n_neurons(site))
            layers[layer] = values.flatten(0, 1).to(head.device)

        head.observe(batch, [site], keep)
        weights = batch.sum_over_texts(batch.select("all").double()).flatten().to(head.device)
        used = weights > 0
        weights = weights[used]
        wanted = torch.stack([layers[layer][used, neuron].double() for layer, neuron in self._neurons])
        factors = torch.cat([torch.ones_like(weights)[None], wanted]) * weights
        sums = torch.empty(self._sums.shape, dtype=torch.float64)
        for layer, activations in layers.items():
            values = activations[used].double()
            products = factors @ values
            sums[0, layer], sums[2:, layer] = products[0].cpu(), products[1:].cpu()
            sums[1, layer] = (weights @ values.square()).cpu()
        return [sums]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Add the sums."""
        self._sums += observed[0]
        self._n_tokens += batch.select("all").sum().cpu()

    def compute(self, record: PassRecord) -> tuple[Tensor, Tensor]:
        """The sums, and the number of tokens."""
        return self._sums, self._n_tokens


def no_sums(neurons: NeuronSet) -> tuple[Float[Tensor, "sum layer neuron"], Int[Tensor, ""]]:
    """The sums over no token, and their number."""
    sums = torch.zeros(2 + len(neurons), *neurons.mask.shape, dtype=torch.float64)
    return sums, torch.zeros((), dtype=torch.long)


def correlations(
    neurons: NeuronSet, sums: Float[Tensor, "sum layer neuron"], n_tokens: Int[Tensor, ""]
) -> Float[Tensor, "wanted layer neuron"]:
    """Pearson correlations of each neuron of the set with every neuron; NaN for a neuron that is constant."""
    n = n_tokens.double()
    mean, square, products = sums[0] / n, sums[1] / n, sums[2:] / n
    variance = square - mean.square()
    variance = torch.where(variance > _CONSTANT * square, variance, torch.nan)
    of_wanted = neurons.mask
    covariance = products - mean[of_wanted][:, None, None] * mean
    return (covariance / (variance[of_wanted].sqrt()[:, None, None] * variance.sqrt())).clamp(-1, 1)


def most_correlated(neurons: NeuronSet, values: Float[Tensor, "wanted layer neuron"], n: int) -> pd.DataFrame:
    """The `n` other neurons with the largest correlation, in magnitude, of each neuron of the set; ties by index."""
    rows = []
    for (layer, neuron), of_neuron in zip(neurons, values, strict=True):
        sizes = of_neuron.abs().nan_to_num(-1)
        sizes[layer, neuron] = -1
        for index in sizes.flatten().argsort(descending=True, stable=True)[:n].tolist():
            other, number = divmod(index, of_neuron.shape[1])
            if sizes[other, number] >= 0:
                correlation = float(of_neuron[other, number])
                rows.append((layer, neuron, other, number, correlation))
    return pd.DataFrame(rows, columns=["layer", "neuron", "other_layer", "other_neuron", "correlation"])
