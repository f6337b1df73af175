"""Gains of neurons: factors on what MLP neurons write, fitted to their contributions to the margins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import expit, log_expit
from torch import Tensor

from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Scale
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates, require_shares
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import margins_of
from rmtension.repair._solvers import Margins, fit_bounded
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# Weights of the weak objective that are tried.
GAIN_SHARES = (0.3, 0.5, 0.7)
# Shares of all neurons that are tried.
_FRACTIONS = (0.001, 0.003, 0.01, 0.03)
# The margins are linear in the gains only near 1, so a fit is repeated at what it found, at most this often.
N_STEPS = 4
# A step is halved this often before the fit ends.
_MOST_HALVINGS = 3


@dataclass(frozen=True)
class GainOptions:
    """How gains are fitted: the weight of the weak objective, the penalty, and the largest change.

    `share` weights the weak objective's loss, `ridge` the sum of squares of the changes, of which none is larger than
    `bound`.
    """

    share: float = 0.5
    ridge: float = 1e-3
    bound: float = 0.9


@dataclass(frozen=True, eq=False)
class FittedGains:
    """Gains of some neurons, the margins of the development pairs with them, and how often they were fitted."""

    gains: Float[Tensor, "layer neuron"]
    margins: Mapping[str, Float[Tensor, "pair"]]
    n_steps: int


class GainFitter:
    """Fits gains of sets of neurons of one model; the contributions at gains of 1 are computed once for all sets.

    Cost: a forward and a backward pass over the fit pairs, and a forward pass over the development pairs; for every
    fit, at most `steps` of each.
    """

    def __init__(
        self, head: RewardHead, pairs: RepairPairs, *, steps: int = N_STEPS, progress: bool | None = None
    ) -> None:
        if type(steps) is not int or steps < 1:
            raise OptionError(f"steps: expected a whole number from 1, got {steps!r}.")
        self.head, self.pairs, self._steps = head, pairs, steps
        self._progress = progress
        self._shape = (head.n_layers, head.n_neurons(SITE))
        self.objectives = (pairs.weak, pairs.strong)
        self.before = margins_of(head, pairs.development, progress=progress)
        self._fit_before = margins_of(head, pairs.fit, progress=progress)
        self._first = {name: self._contributions(pairs.fit[name]) for name in self.objectives}

    def ranking(self, share: float) -> Float[Tensor, "layer neuron"]:
        """How fast the loss changes with each neuron's gain, at 1: by its size, which neurons to change first."""
        slope = sum(
            weight * torch.einsum("p,pln->ln", torch.from_numpy(expit(-margins.numpy())), part.double()) / len(margins)
            for weight, margins, part in (
                (w, self._fit_before[name], self._first[name])
                for w, name in zip(_shares(share), self.objectives, strict=True)
            )
        )
        assert isinstance(slope, Tensor)
        return slope

    def fit(self, neurons: NeuronSet, options: GainOptions = GainOptions()) -> FittedGains:
        """The gains with the least loss on the fit pairs, as long as that of the development pairs falls too."""
        places = neurons.mask
        gains = torch.ones(self._shape, dtype=torch.float64)
        fit_margins, contributions = self._fit_before, self._first
        best, best_loss = self.before, self._loss(self.before, options)
        n_steps = 0
        for step in range(self._steps):
            change = gains[places].numpy() - 1
            found = self._solve(fit_margins, contributions, places, gains, options)
            share = 1.0
            for _ in range(_MOST_HALVINGS):
                tried = gains.clone()
                tried[places] = torch.from_numpy(1 + change + share * (found - change))
                with AblationContext(self.head, neurons, Scale(tried)):
                    now = margins_of(self.head, self.pairs.development, progress=self._progress)
                if (loss := self._loss(now, options)) < best_loss:
                    break
                share /= 2
            else:
                break
            gains, best, best_loss, n_steps = tried, now, loss, step + 1
            if step + 1 < self._steps:
                with AblationContext(self.head, neurons, Scale(gains)):
                    fit_margins = margins_of(self.head, self.pairs.fit, progress=self._progress)
                    contributions = {name: self._contributions(self.pairs.fit[name]) for name in self.objectives}
        return FittedGains(gains, best, n_steps)

    def strongest(self, share: float, count: int) -> NeuronSet:
        """The neurons whose gain changes the loss fastest."""
        order = self.ranking(share).abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:count]] = True
        return NeuronSet(mask.view(self._shape), SITE, self.head.architecture)

    def path(self, counts: Sequence[int], shares: Sequence[float]) -> tuple[Edit | None, pd.DataFrame]:
        """The best gains of the neurons that matter most, or None, and a row for every share and count."""
        fitted, candidates = [], []
        for share in shares:
            for count in counts:
                fitted.append(self.fit(self.strongest(share, count), GainOptions(share=share)))
                settings = {"share": share, "numbers": count, "steps": fitted[-1].n_steps}
                candidates.append(Candidate(settings, fitted[-1].margins))
        table = compare_candidates(self.pairs, self.before, candidates)
        best = best_candidate(self.pairs, table)
        if best is None:
            return None, table
        return Edit("gains", self.head.fingerprint, self.head.architecture, gains=fitted[best].gains), table

    # -- inside --------------------------------------------------------------------------------------------------------

    def _solve(
        self,
        margins: Mapping[str, Float[Tensor, "pair"]],
        contributions: Mapping[str, Float[Tensor, "pair layer neuron"]],
        places: Tensor,
        gains: Float[Tensor, "layer neuron"],
        options: GainOptions,
    ) -> Float[np.ndarray, "changed"]:
        """The changes of the gains with the least loss, for margins that are linear around the present gains."""
        now = gains[places].numpy()
        parts = []
        for weight, name in zip(_shares(options.share), self.objectives, strict=True):
            # The contribution of a scaled neuron is that of the neuron times its gain.
            slopes = contributions[name][:, places].double().numpy() / now
            parts.append((slopes, margins[name].numpy() - slopes @ (now - 1), weight / len(slopes)))
        joined = Margins(
            np.concatenate([slopes for slopes, _, _ in parts]),
            np.concatenate([offset for _, offset, _ in parts]),
            np.concatenate([np.full(len(offset), weight) for _, offset, weight in parts]),
        )
        return fit_bounded(joined, ridge=options.ridge, bound=options.bound)

    def _contributions(self, part: PreferencePairs) -> Float[Tensor, "pair layer neuron"]:
        attribution = NeuronAttribution(self.head, "gradient_x_activation", site=SITE)
        by_pair = attribution.per_pair(part, progress=self._progress)
        return by_pair.values  # noqa: PD011 - a tensor

    def _loss(self, margins: Mapping[str, Float[Tensor, "pair"]], options: GainOptions) -> float:
        return sum(
            weight * float(-log_expit(margins[name].numpy()).mean())
            for weight, name in zip(_shares(options.share), self.objectives, strict=True)
        )


def fit_gains(
    head: RewardHead,
    pairs: RepairPairs,
    *,
    counts: Sequence[int] | None = None,
    shares: Sequence[float] = GAIN_SHARES,
    steps: int = N_STEPS,
    fitter: GainFitter | None = None,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best gains of the neurons that matter most, and the path: every number of neurons that was tried.

    For each share and count, the neurons are those whose gain changes the loss fastest; by default 1, and .1%, .3%, 1%
    and 3% of all. The margins are linear in the gains only near 1, so a fit is repeated at what it found, at most
    `steps` times. The edit is None if no gains help the weak objective and spare the strong one, on the development
    pairs. Cost: a forward and a backward pass over the fit pairs and a forward pass over the development pairs, and for
    each share and count at most `steps` of both. With a `fitter` of these pairs, the first passes are not repeated, and
    its own `steps` apply.
    """
    total = head.n_layers * head.n_neurons(SITE)
    is_list = isinstance(counts, Sequence) and len(counts) > 0
    if counts is not None and not (is_list and all(type(n) is int and 1 <= n <= total for n in counts)):
        raise OptionError(f"counts: expected a list of numbers of neurons, from 1 to {total:,}, got {counts!r}.")
    require_shares(shares)
    tried = counts or sorted({1, *(math.ceil(fraction * total) for fraction in _FRACTIONS)})
    return (fitter or GainFitter(head, pairs, steps=steps, progress=progress)).path(tried, shares)


def _shares(share: float) -> tuple[float, float]:
    """The weights of the weak and of the strong objective."""
    return share, 1 - share
