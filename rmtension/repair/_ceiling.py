"""What could be reached: the ensemble of two specialists, or the best row on the states that the model has."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import Estimate, resampled_sums
from rmtension.repair._choice import correct
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead


class SpecialistEnsemble:
    """The sum of two specialists' rewards, each divided by the standard deviation of its margins on the fit pairs.

    No single set of weights has to satisfy both objectives here, so its accuracy is what the objectives allow together.
    """

    def __init__(
        self, specialists: Mapping[str, RewardHead], pairs: RepairPairs, *, progress: bool | None = None
    ) -> None:
        if set(specialists) != {pairs.weak, pairs.strong}:
            raise OptionError(
                f"specialists: expected a model for {pairs.weak!r} and one for {pairs.strong!r}, got "
                f"{sorted(specialists)}."
            )
        self._specialists, self._progress = dict(specialists), progress
        both = sum(pairs.fit.values(), start=PreferencePairs([]))
        self._scale = {name: float(self._of(name, both).std()) for name in specialists}

    def margins(self, part: PreferencePairs) -> Float[Tensor, "pair"]:
        """The ensemble's margins. Cost: a forward pass of each specialist."""
        scaled = [self._of(name, part) / scale for name, scale in self._scale.items()]
        return torch.stack(scaled).sum(dim=0)

    def _of(self, name: str, part: PreferencePairs) -> Float[Tensor, "pair"]:
        return self._specialists[name].score_pairs(part, progress=self._progress).margin.double()


def closed_share(
    part: PreferencePairs,
    before: Float[Tensor, "pair"],
    after: Float[Tensor, "pair"],
    ceiling: Float[Tensor, "pair"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """(accuracy after - before) / (ceiling - before), with a bootstrap interval over prompts of the ratio.

    1 means that the edit reaches the ceiling; a negative share means that it made the objective worse. If the ceiling
    is not above the accuracy before, there is no gap, and everything is NaN. An end is infinite if too many resamples
    of the prompts have no gap.
    """
    gain, gap = (correct(margins) - correct(before) for margins in (after, ceiling))
    sums = resampled_sums(torch.stack([gain, gap], dim=1), part, seed=seed)
    whole = float(gap.sum())
    n_prompts = len(part.prompts)
    if whole <= 0:
        return Estimate(float("nan"), float("nan"), float("nan"), len(part), n_prompts, level)
    shares = np.select([sums[:, 0] > 0, sums[:, 0] < 0], [np.inf, -np.inf], 0.0)
    np.divide(sums[:, 0], sums[:, 1], out=shares, where=sums[:, 1] > 0)
    # Interpolating between infinite values would give NaN.
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf").tolist()
    return Estimate(float(gain.sum()) / whole, low, high, len(part), n_prompts, level)
