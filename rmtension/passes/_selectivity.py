"""Selectivity: how unevenly a neuron is active over the objectives, from one activation profile per objective."""

from collections.abc import Mapping
from dataclasses import replace
from math import log

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.errors import OptionError
from rmtension.neurons._neuron_scores import NeuronScores, jackknife_stderr
from rmtension.passes._activation_profile import ActivationProfile
from rmtension.store._provenance import METHOD_FIELDS


def selectivity(profiles: Mapping[str, ActivationProfile], *, quantile: float = 0.95) -> NeuronScores:
    """How selectively every neuron is active for some of the objectives, from one profile per objective. No model pass.

    With P_o the activation frequency on objective o and q_o = P_o / sum P, the entropy H = -sum q log q is smallest for
    a neuron that is active on a single objective (LAPE; Tang et al. 2024). The score is log(K) - H for K objectives: 0
    for equal frequencies, at most log(K). As in LAPE, a neuron scores 0 unless one of its frequencies is above the
    `quantile` of all frequencies, because rarely active neurons look selective by chance.

    Raises `OptionError` for fewer than two profiles or a `quantile` outside [0, 1), and `ProvenanceError` for profiles
    of different models, sites or positions.

    Examples:
        >>> from rmtension.passes import collect_profiles
        >>> profiles = {
        ...     name: collect_profiles(head, part, positions=["response"])["mlp", "response"]
        ...     for name, part in pairs.items()
        ... }
        >>> selectivity(profiles).to_frame().nlargest(2, "score").round(2)
            layer  neuron  score  stderr
        29      1       5   0.02    0.01
        0       0       0   0.00    0.00
    """
    if len(profiles) < 2:
        raise OptionError(
            f"profiles: expected the profiles of at least two objectives, got {list(profiles)}. Collect one per "
            "objective with collect_profiles."
        )
    if not 0 <= quantile < 1:
        raise OptionError(f"quantile: expected a number in [0, 1), got {quantile}.")
    first, *others = profiles.values()
    for other in others:
        first.provenance.require_same(
            other.provenance, ("architecture", "model", "site", "positions", *METHOD_FIELDS), what="selectivity"
        )
    scores = [profile.scores("frequency") for profile in profiles.values()]
    frequencies = torch.stack([score.values for score in scores])
    eligible = frequencies.amax(dim=0) > np.quantile(frequencies.numpy(), quantile)
    values = _unevenness(frequencies) * eligible
    without = torch.stack([score.without_block for score in scores if score.without_block is not None])
    without_block = _unevenness(without) * eligible
    provenance = replace(
        scores[0].provenance,
        method="selectivity",
        data="+".join(profile.provenance.data for profile in profiles.values()),
        n_pairs=sum(profile.provenance.n_pairs for profile in profiles.values()),
        n_tokens=sum(profile.provenance.n_tokens for profile in profiles.values()),
        skipped=tuple(name for profile in profiles.values() for name in profile.provenance.skipped),
    )
    return NeuronScores(values, jackknife_stderr(without_block), provenance, without_block)


def _unevenness(frequencies: Float[Tensor, "objective *rest"]) -> Float[Tensor, "*rest"]:
    """log(K) minus the entropy over the first axis; 0 where all frequencies are 0."""
    shares = frequencies / frequencies.sum(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    entropy = torch.special.entr(shares).sum(dim=0)
    return torch.where(frequencies.sum(dim=0) > 0, log(len(frequencies)) - entropy, torch.zeros_like(entropy))
