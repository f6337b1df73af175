"""Ablate the top sets of every method, and random sets of equal size, and compare the effects with the predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension._progress import progress_bar
from rmtension.data._pairs import PreferencePairs
from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.interventions._ablation import AblationContext
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead


@dataclass(frozen=True)
class PlannedSet:
    """A set to ablate, with its random controls."""

    method: str
    fraction: float
    neurons: NeuronSet
    predicted: float
    match: str
    random: list[NeuronSet]


def plan_sets(
    named: Mapping[str, NeuronScores], fractions: Sequence[float], n_random: int, seed: int
) -> list[PlannedSet]:
    """Draw all sets before the model runs, so that a set that cannot be drawn raises at once."""
    planned = []
    for name, scores in named.items():
        for fraction in fractions:
            neurons = scores.top(fraction)
            predicted = float(scores.as_effects()[neurons.mask].sum())
            # A layer that is mostly in the set has too few other neurons for a random set of equal size.
            fits = all(2 * n <= neurons.mask.shape[1] for n in neurons.n_per_layer)
            match = "layer" if fits else "model"
            random = [neurons.matched_random(seed=seed + draw, match=match) for draw in range(n_random)]
            planned.append(PlannedSet(name, fraction, neurons, predicted, match, random))
    return planned


def ablate_sets(
    head: RewardHead,
    planned: Sequence[PlannedSet],
    pairs: PreferencePairs,
    ablate: Callable[..., AblationContext],
    level: float,
    seed: int,
    progress: bool | None,
) -> pd.DataFrame:
    """True and predicted effects of ablating the top sets of each method."""
    if not planned:
        return pd.DataFrame()
    base = head.score_pairs(pairs).margin
    rows = []
    total = sum(1 + len(plan.random) for plan in planned)
    with progress_bar(progress=progress, total=total, desc="ablate sets", unit="set") as bar:

        def change(neurons: NeuronSet) -> Float[Tensor, "pair"]:
            with ablate(neurons=neurons):
                margin = head.score_pairs(pairs).margin
            bar.update()
            return (margin - base).double()

        for plan in planned:
            estimate = bootstrap_mean(change(plan.neurons), pairs, level=level, seed=seed)
            random = [float(change(neurons).mean()) for neurons in plan.random]
            rows.append(
                {
                    "method": plan.method,
                    "fraction": plan.fraction,
                    "size": len(plan.neurons),
                    "predicted": plan.predicted,
                    "effect": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n": estimate.n,
                    "random": float(np.mean(random)) if random else np.nan,
                    "random_min": min(random, default=np.nan),
                    "random_max": max(random, default=np.nan),
                    "n_random": len(random),
                    "match": plan.match,
                }
            )
    return pd.DataFrame(rows)
