"""Planted damage: a model that is weak on one objective, because some of its neurons count in the wrong direction."""

from dataclasses import dataclass

import torch

from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.interventions._replacements import Scale
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead


@dataclass(frozen=True, eq=False)
class DamagedModel:
    """A damaged copy of a model, and the truth: which neurons were scaled, and by what.

    Scaling them by 1 / `factor` gives the whole model back.

    Examples:
        >>> damaged = plant_damage(head, pairs["harmless"], n=4, factor=-0.5)
        >>> len(damaged.neurons), damaged.factor
        (4, -0.5)
    """

    head: RewardHead
    neurons: NeuronSet
    factor: float


def plant_damage(
    head: RewardHead, pairs: PreferencePairs, *, n: int, factor: float = -3.0, spare: PreferencePairs | None = None
) -> DamagedModel:
    """Scale the `n` MLP neurons that contribute most to the margins of `pairs` by `factor`, in a copy of the model.

    The contributions are gradient x activation, averaged over the pairs; the size of those to the pairs of `spare` is
    subtracted. The objective of `pairs` then fails although the model still computes what it needs: a gap that an edit
    can close. Cost: a forward and a backward pass over all pairs. Memory: the model a second time.

    Examples:
        >>> damaged = plant_damage(head, pairs["harmless"], n=4, factor=-0.5)
        >>> damaged.head.score_pairs(pairs["harmless"]).accuracy() < head.score_pairs(pairs["harmless"]).accuracy()
        True
    """
    total = head.n_layers * head.n_neurons("mlp")
    if not 1 <= n <= total:
        raise OptionError(f"n: expected 1 to {total} neurons, got {n}.")
    if factor == 0:
        raise OptionError("factor: expected a number other than 0, so that a gain of 1 / factor repairs the damage.")
    attribution = NeuronAttribution(head, "gradient_x_activation")
    scores = attribution.score(pairs)
    values = scores.values.double()
    if spare is not None:
        values = values - attribution.score(spare).values.double().abs()
    order = values.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:n]] = True
    neurons = NeuronSet(mask.view(values.shape), "mlp", head.architecture)
    return DamagedModel(head.with_ablation(neurons, Scale(factor)), neurons, factor)
