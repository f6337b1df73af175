"""Set neurons that follow a surface feature to their medians: a published recipe against style biases."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from rmtension.data._chat import n_characters
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates, require_values
from rmtension.repair._down_projection import projection_inputs
from rmtension.repair._edit import Edit
from rmtension.repair._features import margins_of
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.1)


def set_to_medians(
    head: RewardHead,
    pairs: RepairPairs,
    feature: Callable[[PreferencePair, str], float] | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """Find the neurons whose activations follow a surface feature most, up or down, and set them to their medians.

    `feature` is a number for a response: `feature(pair, "chosen")`; by default its length. Neurons are ordered by the
    Spearman correlation of the feature with the activation at the token that the reward is read from, over the texts of
    all fit pairs; of every fraction of the neurons, half come from either end. The medians are of the same activations.
    Cost: a forward pass over the fit pairs, and one over the development pairs per fraction. Memory: 4 numbers per pair
    and neuron.
    """
    measured = feature or response_length
    require_values("fractions", fractions, most=1.0)
    both = sum(pairs.fit.values(), start=PreferencePairs([]))
    inputs = projection_inputs(head, both, range(head.n_layers), slopes=False, progress=progress).inputs
    values = [measured(pair, side) for side in ("chosen", "rejected") for pair in both]
    if len(set(values)) < 2:
        raise DataError("feature: all responses of the fit pairs have equally much of it. Pass another feature.")
    correlations = spearman(inputs, torch.tensor(values, dtype=torch.float64))
    medians = inputs.median(dim=1).values  # noqa: PD011 - a tensor
    order = correlations.flatten().argsort(stable=True)
    before = margins_of(head, pairs.development, progress=progress)
    edits, candidates = [], []
    for fraction in fractions:
        n_each = max(1, round(fraction * len(order) / 2))
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[torch.cat([order[:n_each], order[-n_each:]])] = True
        mask = chosen.view(correlations.shape)
        edits.append(
            Edit(
                "medians", head.fingerprint, head.architecture,
                gains=(~mask).double(), constants=torch.where(mask, medians, 0.0),
            )
        )  # fmt: skip
        settings: dict[str, Any] = {"fraction": fraction, "numbers": edits[-1].n_numbers}
        candidates.append(Candidate(settings, margins_of(edits[-1].apply(head), pairs.development, progress=progress)))
    table = compare_candidates(pairs, before, candidates)
    best = best_candidate(pairs, table)
    return (None if best is None else edits[best]), table


def spearman(
    activations: Float[Tensor, "layer text neuron"], feature: Float[Tensor, "text"]
) -> Float[Tensor, "layer neuron"]:
    """The rank correlation of a feature with every neuron's activations; 0 for a neuron that never changes."""
    wanted = _centred(feature.numpy()[:, None])[:, 0]
    rows = []
    for layer in activations:
        ranks = _centred(layer.numpy())
        sizes = np.sqrt((ranks**2).sum(axis=0) * (wanted**2).sum())
        rows.append(np.divide(wanted @ ranks, sizes, out=np.zeros(ranks.shape[1]), where=sizes > 0))
    return torch.from_numpy(np.stack(rows))


def _centred(values: Float[np.ndarray, "text column"]) -> Float[np.ndarray, "text column"]:
    ranks: Float[np.ndarray, "text column"] = rankdata(values, axis=0) - (len(values) + 1) / 2
    return ranks


def response_length(pair: PreferencePair, side: str) -> float:
    """How many characters the chosen or the rejected response has."""
    return float(n_characters(pair.chosen if side == "chosen" else pair.rejected))
