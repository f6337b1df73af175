"""Estimates with intervals: bootstrap over prompts, over seeds, and corrections for many tests."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension._repr_html import html_table
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError

N_BOOTSTRAP = 2000
_N_FLIPS = 9999
# Random numbers drawn per step: 2,000 resamples of 100,000 prompts would take 1.6 GB at once.
_DRAWN_AT_A_TIME = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its interval, and the numbers of items, prompts and seeds that it was computed from.

    Examples:
        >>> print(Estimate(0.75, 0.5, 1.0, n=8, n_prompts=8, level=0.95))
        0.750 [0.500, 1.000]
        >>> print(Estimate(0.5, float("nan"), float("nan"), n=1, n_prompts=1))
        0.500 (no interval: one prompt)
    """

    value: float
    low: float
    high: float
    n: int
    n_prompts: int
    level: float = 0.95
    n_seeds: int = 1

    def __str__(self) -> str:
        why = ": one prompt" if self.n_prompts == 1 else ""
        return with_interval(self.value, self.low, self.high, why=why)

    def _repr_html_(self) -> str:
        return html_table("Estimate", pd.DataFrame([self.to_dict()]))

    def to_dict(self) -> dict[str, float]:
        """A plain dict, for tables and JSON."""
        return asdict(self)


def with_interval(value: float, low: float, high: float, *, form: str = ".3f", why: str = "") -> str:
    """A number and its interval as text; if the ends are NaN, "(no interval" followed by the reason `why`.

    Examples:
        >>> with_interval(0.5, 0.25, 0.75, form=".2f"), with_interval(0.5, float("nan"), float("nan"))
        ('0.50 [0.25, 0.75]', '0.500 (no interval)')
    """
    has_ends = low == low and high == high
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if has_ends else f"{value:{form}} (no interval{why})"


def resampled_sums(
    columns: Float[Tensor, "item column"], pairs: PreferencePairs, *, seed: int = 0
) -> Float[np.ndarray, "resample column"]:
    """Sums of every column over `N_BOOTSTRAP` (2,000) resamples of the prompts; `pairs` gives each item's prompt.

    Prompts are drawn, not items, because items of one prompt are not independent. The result has one row per resample:
    ratios of sums, slopes and differences computed from its columns use the same resamples.
    """
    owner = _owners(pairs)
    values = columns.double().numpy()
    n = int(owner.max()) + 1
    sums = np.stack([np.bincount(owner, weights=column, minlength=n) for column in values.T], axis=1)
    if n * N_BOOTSTRAP <= _DRAWN_AT_A_TIME:
        return _counts(n, seed) @ sums
    return np.concatenate([counts @ sums for counts in _draw_counts(n, seed)])


def _draw_counts(n: int, seed: int) -> Iterator[Float[np.ndarray, "resample prompt"]]:
    """How often each of `n` prompts occurs in each resample; yields a block of resamples at a time."""
    generator = np.random.default_rng(seed)
    remaining = N_BOOTSTRAP
    while remaining:
        rows = min(remaining, max(1, _DRAWN_AT_A_TIME // n))
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, -1).astype(np.float64)
        remaining -= rows


@lru_cache(maxsize=4)
def _counts(n: int, seed: int) -> Float[np.ndarray, "resample prompt"]:
    """All resamples of a few prompts, cached because a study needs the same resamples thousands of times."""
    counts = np.concatenate(list(_draw_counts(n, seed)))
    counts.setflags(write=False)
    return counts


def percentile_interval(resamples: Float[np.ndarray, "resample"], level: float) -> tuple[float, float]:
    """The interval that holds the central `level` of the resamples; its ends are NaN if a resample is NaN."""
    check_level(level)
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Float[Tensor, "item"], pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean of one value per item, with a percentile bootstrap interval over prompts. No model pass.

    With a single prompt the ends are NaN, because nothing is known about other prompts. An interval of width 0 means
    that all prompts have the same mean, not that the value is known exactly. Raises `DataError` without pairs.

    Examples:
        >>> estimate = bootstrap_mean(scored.margin, scored.pairs)
        >>> estimate.low < estimate.value < estimate.high, estimate.n_prompts
        (True, 24)
    """
    if not len(pairs):
        raise DataError("pairs: expected at least one preference pair, got 0.")
    check_level(level)
    low, high = percentile_interval(resampled_means(values, pairs, seed=seed), level)
    n_prompts = len(pairs.prompts)
    if n_prompts == 1:
        low = high = np.nan
    return Estimate(float(values.double().mean()), low, high, len(pairs), n_prompts, level)


def resampled_means(
    values: Float[Tensor, "item"], pairs: PreferencePairs, *, seed: int = 0
) -> Float[np.ndarray, "resample"]:
    """The mean of `values` in every resample of the prompts."""
    sums = resampled_sums(torch.stack([values.double(), torch.ones(len(values)).double()], dim=1), pairs, seed=seed)
    means: Float[np.ndarray, "resample"] = sums[:, 0] / sums[:, 1]
    return means


def variance_of_mean(values: Float[Tensor, "item"], pairs: PreferencePairs) -> float:
    """The variance of the mean over random draws of the prompts; items of one prompt count together.

    This is the linearised variance of a ratio of sums over prompts (Cochran 1977), which the bootstrap approaches. NaN
    for a single prompt.
    """
    owner = _owners(pairs)
    centred = values.double().numpy() - float(values.double().mean())
    sums = np.bincount(owner, weights=centred)
    n = len(sums)
    return float((sums**2).sum()) / len(centred) ** 2 * n / (n - 1) if n > 1 else float("nan")


def bootstrap_share(
    values: Float[Tensor, "item"], pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """`bootstrap_mean` of values in [0, 1], whose interval has a positive width even if all values are 0 or all are 1.

    In that case the bootstrap has no spread, and the interval is Clopper and Pearson's with one trial per prompt.
    """
    estimate = bootstrap_mean(values, pairs, level=level, seed=seed)
    if estimate.value not in (0.0, 1.0):
        return estimate
    low, high = exact_ends(estimate.value, estimate.n_prompts, level)
    return replace(estimate, low=low, high=high)


def exact_ends(share: float, n_prompts: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's interval for a share of `n_prompts` trials, rounded up to a number of trials."""
    count = min(n_prompts, math.ceil(share * n_prompts - 1e-9))
    interval = stats.binomtest(count, n_prompts).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def prompts_with(column: Float[Tensor, "item"], pairs: PreferencePairs) -> int:
    """The number of prompts with an item that is not 0 in `column`."""
    return len({pair.prompt for pair, value in zip(pairs, column.tolist(), strict=True) if value})


def over_seeds(estimate: Estimate, per_seed: Sequence[float]) -> Estimate:
    """Widen the interval of a mean over seeds by the spread between the seeds.

    Two half widths add in quadrature: that of the items, and Student's for a mean of this number of seeds. Values of
    seeds also differ through the noise of their items, which is then counted twice, so the interval is somewhat too
    wide. With one seed the interval is unchanged and says nothing about other seeds.
    """
    n = len(per_seed)
    if n < 2:
        return estimate
    half = float(stats.t.ppf((1 + estimate.level) / 2, n - 1)) * float(np.std(per_seed, ddof=1)) / np.sqrt(n)
    return replace(
        estimate,
        low=estimate.value - float(np.hypot(estimate.value - estimate.low, half)),
        high=estimate.value + float(np.hypot(estimate.high - estimate.value, half)),
        n_seeds=n,
    )


def pooled_over_seeds(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float], level: float, bounds: tuple[float, float]
) -> Estimate:
    """One estimate from those of several seeds on the same items: `over_seeds` of their mean and mean half widths.

    The items' noise is treated as the same in all seeds. Seeds whose value is NaN are dropped. NaN ends stay NaN; other
    ends are clipped to `bounds`, because a share cannot leave them.
    """
    seeds = np.array([values, lows, highs], dtype=float)
    seeds = seeds[:, ~np.isnan(seeds[0])]
    n = seeds.shape[1]
    if not n:
        return Estimate(np.nan, np.nan, np.nan, 0, 0, level, 0)
    mean = float(seeds[0].mean())
    below, above = float((seeds[0] - seeds[1]).mean()), float((seeds[2] - seeds[0]).mean())
    pooled = over_seeds(Estimate(mean, mean - below, mean + above, n, 0, level), seeds[0].tolist())
    low, high = np.clip([pooled.low, pooled.high], *bounds).tolist()
    return replace(pooled, low=low, high=high)


def sign_flip_p_value(values: Float[Tensor, "item"], pairs: PreferencePairs, *, seed: int = 0) -> float:
    """Two-sided p-value of the hypothesis that the mean is 0, from 9,999 random sign flips of whole prompts.

    Under that hypothesis the two sides that were subtracted are exchangeable, so both signs of a prompt's sum are
    equally likely.
    """
    owner = _owners(pairs)
    sums = np.bincount(owner, weights=values.double().numpy())
    observed = abs(sums.sum())
    generator = np.random.default_rng(seed)
    at_least, remaining = 0, _N_FLIPS
    while remaining:
        rows = min(remaining, max(1, _DRAWN_AT_A_TIME // len(sums)))
        signs = 2.0 * generator.integers(2, size=(rows, len(sums))) - 1
        # The tolerance counts sums that are equal up to rounding as "at least".
        at_least += int((np.abs(signs @ sums) >= observed - 1e-9 * (1 + observed)).sum())
        remaining -= rows
    return (at_least + 1) / (_N_FLIPS + 1)


def mcnemar_p_value(n_gained: int, n_lost: int) -> float:
    """Exact two-sided p-value that gains and losses are equally likely (McNemar 1947); 1 if nothing changed.

    Examples:
        >>> round(mcnemar_p_value(n_gained=9, n_lost=1), 4)
        0.0215
    """
    total = n_gained + n_lost
    return float(stats.binomtest(n_gained, total).pvalue) if total else 1.0


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests (Benjamini and Hochberg 1995), in the given order; NaNs stay, uncounted.

    Examples:
        >>> [round(value, 3) for value in adjusted_p_values([0.01, 0.02, 0.5])]
        [0.03, 0.03, 0.5]
    """
    values = np.array(p_values, dtype=float)
    known = ~np.isnan(values)
    if known.any():
        values[known] = stats.false_discovery_control(values[known])
    return [float(value) for value in values]


def check_level(level: float) -> None:
    """Raise `OptionError` unless `level` is a confidence level in (0, 1)."""
    if not 0 < level < 1:
        raise OptionError(f"level: expected a number in (0, 1), got {level}.")


def _owners(pairs: PreferencePairs) -> np.ndarray:
    index = {prompt: number for number, prompt in enumerate(pairs.prompts)}
    return np.array([index[pair.prompt] for pair in pairs])
