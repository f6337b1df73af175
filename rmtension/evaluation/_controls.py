"""The effect of one neuron set compared with the effects of random sets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level, variance_of_mean


@dataclass(frozen=True)
class AgainstRandom:
    """The effect of one neuron set minus the mean effect of random sets, with its interval.

    If the set is itself a random draw, the interval covers 0 with the probability `level`. The difference varies with
    the random sets drawn (`set_sd`, the spread of their effects without the noise of the items) and with the prompts.
    Both variances are added without counting the items' noise twice; degrees of freedom are Satterthwaite's.
    """

    random_mean: float
    random_sd: float
    set_sd: float
    n_draws: int
    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """A plain dict, for tables and JSON."""
        return asdict(self)


NO_CONTROL = AgainstRandom(np.nan, np.nan, np.nan, 0, np.nan, np.nan, np.nan)


def against_random(
    effect: Float[Tensor, "item"],
    random: Sequence[Float[Tensor, "item"]],
    pairs: PreferencePairs,
    *,
    level: float = 0.95,
) -> AgainstRandom:
    """Compare the change of every item under one set with the changes under random sets (at least two).

    `pairs` gives each item's prompt. Let d draws have mean effects e_k with variance s^2. Let v_k be the variance over
    prompts of e_k minus the draws' mean (`variance_of_mean`), and w that of the gap. Then t^2 = max(0, s^2 - mean(v_k)
    d / (d - 1)) estimates the variance between sets, and the gap has variance t^2 (1 + 1/d) + w.
    """
    n = len(random)
    if n < 2:
        raise OptionError(f"random: expected at least two random sets, to estimate their spread, got {n}.")
    check_level(level)
    draws = torch.stack(list(random)).double()
    means = draws.mean(dim=1)
    centre = draws.mean(dim=0)
    gap = effect.double() - centre
    of_gap = variance_of_mean(gap, pairs)
    of_draws = float(np.mean([variance_of_mean(draw - centre, pairs) for draw in draws])) * n / (n - 1)
    spread = float(means.var())
    between = float(np.maximum(0.0, spread - of_draws))  # NaN, as all of these, for a single prompt
    variance = between * (1 + 1 / n) + of_gap
    # Satterthwaite: the variance between sets is estimated from n draws, that of the noise from the prompts.
    n_prompts = max(2, len(pairs.prompts))
    uncertain = (of_gap**2 + (of_draws * (1 + 1 / n)) ** 2 / n) / (n_prompts - 1)
    if between:
        uncertain += (spread * (1 + 1 / n)) ** 2 / (n - 1)
    degrees = max(n - 1, variance**2 / uncertain) if uncertain else n_prompts - 1
    half = float(stats.t.ppf((1 + level) / 2, degrees) * np.sqrt(variance))
    value = float(gap.mean())
    return AgainstRandom(
        random_mean=float(means.mean()),
        random_sd=float(np.sqrt(spread)),
        set_sd=float(np.sqrt(between)),
        n_draws=n,
        difference=value,
        low=value - half,
        high=value + half,
    )
