"""How likely each neuron is to be in the top set again: with other prompts, and with another seed of the training."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import isotonic_regression
from scipy.stats import norm, rankdata
from torch import Tensor

from rmtension.errors import OptionError
from rmtension.neurons._neuron_scores import NeuronScores, jackknife_stderr
from rmtension.neurons._signs import ranked
from rmtension.store._provenance import METHOD_FIELDS

_SAME = ("architecture", "site", "positions", *METHOD_FIELDS)
# Standard deviations of the parts of the prior, in typical standard errors: from no effect to a very large one.
_SCALES = 2.0 ** np.arange(-3, 12)
_ROUNDS = 200


def replication_probability(
    scores: NeuronScores, fraction: float | None = None, *, k: int | None = None, rank_by: str = "magnitude"
) -> Float[Tensor, "layer neuron"]:
    """The probability that each neuron is in the top set of as many other prompts from the same source.

    `fraction`, `k` and `rank_by` choose the top set, as in `NeuronScores.top`. A neuron just above the cut is often
    there by luck. So its true score is estimated first: a prior for the scores of all neurons, a mixture of normals
    around 0 whose weights are the most likely ones, is combined with the neuron's own score and jackknife standard
    error over prompts (adaptive shrinkage, Stephens 2017). The probability is that the score of new prompts, with the
    same standard error, is beyond the cut, which is halfway between the last neuron inside and the first outside.
    Scores are divided by the mean magnitude of all neurons' scores on the same prompts, because some prompts have
    larger scores of all neurons, which moves no neuron past another.

    No model runs. Raises `OptionError` for scores without blocks of prompts. It says nothing about another training;
    for that there is `replication_across_seeds`.

    Examples:
        >>> probability = replication_probability(scores, k=6)
        >>> bool(probability[neurons.mask].min() > 0.9), bool(probability.median() < 0.1)
        (True, True)
    """
    top = scores.top(fraction, k=k, rank_by=rank_by)
    # The scores of all prompts, and of all but one block each.
    every = torch.cat([scores.values[None].double(), scores.require_blocks().double()])
    sizes = every.abs().mean(dim=(1, 2), keepdim=True)
    every = every / sizes.clamp(min=torch.finfo(torch.float64).tiny)
    values = ranked(every, rank_by, scores.provenance)
    ordered = values[0].flatten().sort(descending=True).values
    cut = float(ordered[len(top) - 1 : len(top) + 1].mean()) if len(top) < len(ordered) else -float("inf")
    # By magnitude, scores of both signs are in the set; otherwise values above the cut.
    both_signs = rank_by == "magnitude"
    compared = every if both_signs else values
    errors = jackknife_stderr(compared[1:])
    observed, spread, inside = (part.flatten().numpy() for part in (compared[0], errors, top.mask))
    # A mean without spread, such as that of an inactive neuron, is known exactly.
    exact = spread <= 1e-12 * max(float(np.abs(observed).max(initial=0.0)), np.finfo(np.float64).tiny)
    probability = inside.astype(np.float64)
    if (~exact).any():
        probability[~exact] = _beyond(observed[~exact], spread[~exact], cut, both_signs=both_signs)
    return torch.from_numpy(probability).view(scores.values.shape)


def replication_across_seeds(
    seeds: Sequence[NeuronScores], fraction: float | None = None, *, k: int | None = None, rank_by: str = "magnitude"
) -> Float[Tensor, "layer neuron"]:
    """The probability that each neuron is in the top set of one more model, trained with another seed.

    `seeds` are the scores of models that differ in nothing else, at least two. For each of them, the neurons are sorted
    by their mean rank in the others, and the share that is in its top set is fitted by an increasing function (isotonic
    regression). The mean of these functions at the neuron's mean rank in all seeds is the probability. No model runs.

    Raises `OptionError` for fewer than two seeds, and `ProvenanceError` if they are scores of different kinds.

    Examples:
        >>> again = NeuronAttribution(head, "gradient_x_activation").score(pairs["harmless"])  # as if of another seed
        >>> probability = replication_across_seeds([scores, again], k=6)
        >>> probability.shape, bool(probability[neurons.mask].mean() > probability[~neurons.mask].mean())
        (torch.Size([2, 24]), True)
    """
    if len(seeds) < 2:
        raise OptionError(f"seeds: expected the scores of at least two seeds, got {len(seeds)}.")
    for scores in seeds[1:]:
        scores.provenance.require_same(seeds[0].provenance, _SAME, what="replication_across_seeds")
    ranks, members = [], []
    for scores in seeds:
        values = ranked(scores.values.double(), rank_by, scores.provenance)
        ranks.append(rankdata(values.flatten().numpy()) / values.numel())
        members.append(scores.top(fraction, k=k, rank_by=rank_by).mask.flatten().double().numpy())
    stacked = np.stack(ranks)
    where = stacked.mean(axis=0)
    curves = []
    for number, inside in enumerate(members):
        others = np.delete(stacked, number, axis=0).mean(axis=0)
        # Neurons of equal rank are one point, so that a tie that the cut divides has the same probability everywhere.
        distinct, point, n_tied = np.unique(others, return_inverse=True, return_counts=True)
        shares = np.bincount(point, weights=inside) / n_tied
        curves.append(np.interp(where, distinct, isotonic_regression(shares, weights=n_tied).x))
    return torch.from_numpy(np.mean(curves, axis=0)).view(seeds[0].values.shape)


# -- inside ------------------------------------------------------------------------------------------------------------


def _beyond(
    observed: Float[np.ndarray, "neuron"], spread: Float[np.ndarray, "neuron"], cut: float, *, both_signs: bool
) -> Float[np.ndarray, "neuron"]:
    """The probability that a new score is above the cut, or with `both_signs` its magnitude."""
    variances = (np.median(spread) * _SCALES) ** 2
    marginal = spread[:, None] ** 2 + variances
    density = norm.pdf(observed[:, None], scale=np.sqrt(marginal))
    weights = np.full(len(variances), 1 / len(variances))
    for _ in range(_ROUNDS):
        parts = density * weights + np.finfo(np.float64).tiny
        weights = (parts / parts.sum(axis=1, keepdims=True)).mean(axis=0)
    parts = density * weights + np.finfo(np.float64).tiny
    parts /= parts.sum(axis=1, keepdims=True)
    shrunk = variances / marginal
    mean = shrunk * observed[:, None]
    # What is not known of the true score, and the noise of the new one.
    deviation = np.sqrt(shrunk * spread[:, None] ** 2 + spread[:, None] ** 2)
    beyond = norm.sf(cut, loc=mean, scale=deviation)
    if both_signs:
        beyond += norm.sf(cut, loc=-mean, scale=deviation)
    probability: Float[np.ndarray, "neuron"] = np.clip((parts * beyond).sum(axis=1), 0, 1)
    return probability
