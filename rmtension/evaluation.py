"""How well rewards rank pairs, with intervals: accuracy, margins, refusing and responding, changes, length."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension.errors import DataError, OptionError
from rmtension.pairs import PreferencePairs
from rmtension.scored import ScoredPairs

Quantity = Literal["accuracy", "margin"]

N_BOOTSTRAP = 2000
# Subset names that say what the chosen response does with the request.
REFUSE_SUBSETS = ("should_refuse",)
RESPOND_SUBSETS = ("should_respond",)
# Bootstrap weights drawn at a time: 2,000 resamples of 100,000 prompts would take 1.6 GB at once.
_WEIGHTS_AT_A_TIME = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs with the ends of its interval, the number of pairs and of prompts behind it."""

    value: float
    low: float
    high: float
    n: int
    n_prompts: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        """A plain dict, for tables and JSON."""
        return asdict(self)


def accuracy(scored: ScoredPairs, *, tie: float = 0.5, level: float = 0.95, seed: int = 0) -> Estimate:
    """Share of pairs ranked correctly, ties counting `tie`, with a bootstrap interval over prompts.

    Where all pairs of all prompts agree the bootstrap has no spread, and the interval is Clopper and Pearson's for as
    many trials as there are prompts.
    """
    return _bounded(_correct(scored, tie), scored.pairs, level=level, seed=seed)


def mean_margin(scored: ScoredPairs, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of r(chosen) - r(rejected), in the model's own reward units, with a bootstrap interval over prompts."""
    return bootstrap_mean(scored.margin, scored.pairs, level=level, seed=seed)


def change(
    after: ScoredPairs, before: ScoredPairs, *, quantity: Quantity = "accuracy", level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean change of accuracy (ties 1/2) or margin from `before` to `after` on the same pairs, paired by pair."""
    return bootstrap_mean(pair_change(after, before, quantity), after.pairs, level=level, seed=seed)


def pair_change(after: ScoredPairs, before: ScoredPairs, quantity: str) -> Float[Tensor, "pair"]:
    """The change of every pair; raises `DataError` unless both hold the same pairs in the same order."""
    if quantity not in ("accuracy", "margin"):
        raise OptionError(f"quantity: expected 'accuracy' or 'margin', got {quantity!r}.")
    if after.pairs != before.pairs:
        raise DataError(
            "change: expected rewards of the same pairs in the same order. Score both models on one data set."
        )
    if quantity == "margin":
        return after.margin.double() - before.margin.double()
    return _correct(after, 0.5) - _correct(before, 0.5)


@dataclass(frozen=True)
class AgainstRandom:
    """The effect of one neuron set beside the effects of random ones.

    `difference` is effect - mean random effect. Its interval adds in quadrature the spread between random sets, as
    Student's prediction interval for one more draw, and the bootstrap error over prompts: it covers 0 when the set is
    one more random draw.
    """

    random_mean: float
    random_sd: float
    n_draws: int
    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """A plain dict, for tables and JSON."""
        return asdict(self)


NO_CONTROL = AgainstRandom(np.nan, np.nan, 0, np.nan, np.nan, np.nan)


def against_random(
    effect: Float[Tensor, "pair"],
    random: Sequence[Float[Tensor, "pair"]],
    pairs: PreferencePairs,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> AgainstRandom:
    """Compare the change of every pair under one set with that under random sets (at least two)."""
    if len(random) < 2:
        raise OptionError(f"random: expected at least two draws to know their spread, got {len(random)}.")
    draws = torch.stack(list(random)).double()
    per_draw = draws.mean(dim=1)
    gap = effect.double() - draws.mean(dim=0)
    _, standard_error = _bootstrap(gap, pairs, seed)
    n = len(random)
    spread = float(per_draw.std()) * np.sqrt(1 + 1 / n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * np.hypot(spread, standard_error)
    value = float(gap.mean())
    return AgainstRandom(float(per_draw.mean()), float(per_draw.std()), n, value, value - half, value + half)


def balance(
    scored: ScoredPairs,
    *,
    refuse: Iterable[str] = REFUSE_SUBSETS,
    respond: Iterable[str] = RESPOND_SUBSETS,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Accuracy where refusing is right (`refusing`), where responding is right (`responding`), and their mean.

    A model that always refuses gets 1, 0 and 0.5. Empty when one of the two kinds of subset is absent.
    """
    parts = [_positions(scored.pairs, refuse), _positions(scored.pairs, respond)]
    if not all(parts):
        return {}
    correct = _correct(scored, 0.5)
    groups = [(correct[part], PreferencePairs(scored.pairs[i] for i in part)) for part in parts]
    refusing, responding = (_bounded(values, pairs, level=level, seed=seed) for values, pairs in groups)
    # Intervals of a mean from those of its parts (Zou and Donner 2008), which keeps its width where a part is 0 or 1.
    # The two kinds of subset have prompts of their own, so the parts are independent.
    mean = (refusing.value + responding.value) / 2
    below = float(np.hypot(refusing.value - refusing.low, responding.value - responding.low)) / 2
    above = float(np.hypot(refusing.high - refusing.value, responding.high - responding.value)) / 2
    sizes = (refusing.n + responding.n, refusing.n_prompts + responding.n_prompts)
    balanced = Estimate(mean, mean - below, mean + above, *sizes, level)
    return {"refusing": refusing, "responding": responding, "balanced": balanced}


def length_baseline(pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Accuracy of preferring the response with more characters (equal: 1/2); one minus it is that of the shorter."""
    longer = torch.tensor([float(np.sign(len(pair.chosen) - len(pair.rejected))) / 2 + 0.5 for pair in pairs])
    return _bounded(longer.double(), pairs, level=level, seed=seed)


def bootstrap_mean(
    values: Float[Tensor, "pair"], pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of one value per pair; percentile bootstrap over prompts, because pairs of one prompt are not independent.

    Cost: `N_BOOTSTRAP` (2,000) resamples, no model pass. The ends are NaN for a single prompt, which says nothing about
    others. An interval without width means that all prompts have one mean, not that the value is known exactly.
    """
    if not len(pairs):
        raise DataError("pairs: expected at least one preference pair, got none.")
    if not 0 < level < 1:
        raise OptionError(f"level: expected a number in (0, 1), got {level}.")
    resamples, _ = _bootstrap(values, pairs, seed)
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    if len(pairs.prompts) == 1:
        low = high = np.nan
    return Estimate(float(values.double().mean()), float(low), float(high), len(pairs), len(pairs.prompts), level)


def _bootstrap(
    values: Float[Tensor, "pair"], pairs: PreferencePairs, seed: int
) -> tuple[Float[np.ndarray, "resample"], float]:
    """Resampled means, and their standard deviation."""
    index = {prompt: number for number, prompt in enumerate(pairs.prompts)}
    owner = np.array([index[pair.prompt] for pair in pairs])
    sums = np.bincount(owner, weights=values.double().numpy(), minlength=len(index))
    counts = np.bincount(owner, minlength=len(index))
    generator = np.random.default_rng(seed)
    means = []
    left = N_BOOTSTRAP
    while left:
        rows = min(left, max(1, _WEIGHTS_AT_A_TIME // len(index)))
        drawn = generator.integers(len(index), size=(rows, len(index))) + len(index) * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * len(index)).reshape(rows, -1)
        means.append((weights @ sums) / (weights @ counts))
        left -= rows
    resamples = np.concatenate(means)
    return resamples, float(resamples.std(ddof=1))


def _bounded(values: Float[Tensor, "pair"], pairs: PreferencePairs, *, level: float, seed: int) -> Estimate:
    """`bootstrap_mean` of values in [0, 1], with an interval of positive width also where all are 0 or all are 1."""
    estimate = bootstrap_mean(values, pairs, level=level, seed=seed)
    if estimate.value not in (0.0, 1.0):
        return estimate
    hits = estimate.n_prompts * int(estimate.value)
    interval = stats.binomtest(hits, estimate.n_prompts).proportion_ci(level, method="exact")
    return Estimate(
        estimate.value, float(interval.low), float(interval.high), estimate.n, estimate.n_prompts, estimate.level
    )


def _correct(scored: ScoredPairs, tie: float) -> Float[Tensor, "pair"]:
    return scored.correct.double() + tie * scored.tied.double()


def _positions(pairs: PreferencePairs, subsets: Iterable[str]) -> list[int]:
    wanted = set(subsets)
    return [number for number, pair in enumerate(pairs) if pair.subset in wanted]
