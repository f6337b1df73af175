"""Bootstrap, sign flips, McNemar, Benjamini-Hochberg, seeds, controls: against brute force, SciPy, known coverage."""

from itertools import product

import numpy as np
import pytest
import torch
from drawn_scores import scored_of
from scipy import stats

from rmtension import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._controls import against_random
from rmtension.evaluation._intervals import (
    Estimate,
    adjusted_p_values,
    bootstrap_mean,
    mcnemar_p_value,
    over_seeds,
    percentile_interval,
    resampled_sums,
    sign_flip_p_value,
    variance_of_mean,
)


def prompts(*owners):
    """Pairs whose prompts are `owners`."""
    return PreferencePairs.from_records(
        {"prompt": f"Q{owner}", "chosen": f"a{number}", "rejected": "b"} for number, owner in enumerate(owners)
    )


def test_resamples_of_two_prompts_are_the_three_possible_ones():
    """Prompts {0, 0, 1}: a resample is (0, 0), (0, 1) or (1, 1), with probabilities 1/4, 1/2, 1/4."""
    columns = torch.tensor([[1.0, 1.0], [2.0, 1.0], [10.0, 1.0]])
    sums = resampled_sums(columns, prompts(0, 0, 1))
    possible, counts = np.unique(sums, axis=0, return_counts=True)
    assert possible.tolist() == [[6.0, 4.0], [13.0, 3.0], [20.0, 2.0]]
    # 4 binomial standard errors of 2,000 draws
    assert counts / len(sums) == pytest.approx([0.25, 0.5, 0.25], abs=4 * 0.5 / np.sqrt(2000))
    assert np.array_equal(sums, resampled_sums(columns, prompts(0, 0, 1))), "the seed decides"
    assert not np.array_equal(sums, resampled_sums(columns, prompts(0, 0, 1), seed=1))


def test_columns_see_the_same_resamples():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    sums = resampled_sums(torch.stack([values, -values, torch.ones(30).double()], dim=1), prompts(*range(30)))
    assert np.allclose(sums[:, 0], -sums[:, 1])
    assert (sums[:, 2] == 30).all()


def test_sign_flip_is_the_exact_test_over_all_signs():
    values = torch.tensor([0.5, -0.2, 1.0, 0.7, 0.1, -0.4, 0.9, 0.3], dtype=torch.float64)
    every = np.array(list(product([-1, 1], repeat=len(values)))) @ values.numpy()
    exact = float((np.abs(every) >= abs(float(values.sum())) - 1e-12).mean())
    # 4 binomial standard errors of 9,999 draws
    assert sign_flip_p_value(values, prompts(*range(8))) == pytest.approx(exact, abs=4 * np.sqrt(exact / 9999))


def test_sign_flips_apply_to_whole_prompts():
    """Ten copies of every item are no more evidence; as ten prompts each they would be."""
    values = torch.tensor([1.0, -0.5, 0.8, 0.2, 0.6]).repeat_interleave(10)
    together = sign_flip_p_value(values, prompts(*np.repeat(np.arange(5), 10)))
    exact = np.array(list(product([-1, 1], repeat=5))) @ np.array([1.0, -0.5, 0.8, 0.2, 0.6])
    assert together == pytest.approx(float((np.abs(exact) >= 2.1 - 1e-12).mean()), abs=0.02)
    assert sign_flip_p_value(values, prompts(*range(50))) < 0.01


def test_sign_flip_holds_its_level():
    """Under a symmetric null 5% of the p-values are below .05, within 3 binomial standard errors of 400 tests."""
    rng = np.random.default_rng(0)
    pairs = prompts(*range(20))
    rejected = [sign_flip_p_value(torch.from_numpy(rng.normal(size=20)), pairs, seed=n) <= 0.05 for n in range(400)]
    assert np.mean(rejected) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 400))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 9), (20, 22)])
def test_mcnemar_is_the_binomial_tail(gained, lost):
    n = gained + lost
    outcomes = np.arange(n + 1)
    probabilities = stats.binom(n, 0.5).pmf(outcomes)
    expected = probabilities[probabilities <= stats.binom(n, 0.5).pmf(gained) * (1 + 1e-9)].sum()
    assert mcnemar_p_value(gained, lost) == pytest.approx(expected)
    assert mcnemar_p_value(gained, lost) == mcnemar_p_value(lost, gained)


def test_adjusted_p_values_by_their_definition():
    p_values = [0.01, 0.04, np.nan, 0.03, 0.5, 0.002]
    known = np.sort([p for p in p_values if p == p])
    m = len(known)
    for p, q in zip(p_values, adjusted_p_values(p_values), strict=True):
        if p != p:
            assert np.isnan(q)
        else:
            assert q == pytest.approx(min(m * known[i] / (i + 1) for i in range(m) if known[i] >= p))


def test_over_seeds_adds_the_spread_between_seeds():
    items = Estimate(1.0, 0.9, 1.2, 100, 50)
    pooled = over_seeds(items, [0.8, 1.0, 1.2])
    half = stats.t.ppf(0.975, 2) * 0.2 / np.sqrt(3)
    assert pooled.low == pytest.approx(1 - np.hypot(0.1, half))
    assert pooled.high == pytest.approx(1 + np.hypot(0.2, half))
    assert pooled.n_seeds == 3
    assert over_seeds(items, [1.0]) == items


def test_percentile_interval_of_nan_is_nan():
    assert np.isnan(percentile_interval(np.array([1.0, np.nan]), 0.95)).all()
    with pytest.raises(OptionError, match="level"):
        percentile_interval(np.ones(3), 2.0)


class TestAgainstRandom:
    def test_the_interval_equals_students_prediction_interval(self):
        """Without noise over prompts the interval is Student's prediction interval for one more draw."""
        pairs = scored_of(np.zeros(4)).pairs
        result = against_random(torch.full((4,), 3.0), [torch.zeros(4), torch.ones(4)], pairs)
        assert (result.random_mean, result.n_draws, result.difference) == (0.5, 2, 2.5)
        assert result.random_sd == result.set_sd == pytest.approx(np.std([0, 1], ddof=1))
        half = stats.t.ppf(0.975, 1) * result.random_sd * np.sqrt(1.5)
        assert result.low == pytest.approx(2.5 - half)

    def test_without_spread_between_sets_the_noise_of_prompts_is_left(self):
        """Draws that differ by noise alone: a paired t interval of the gap, and about no spread between sets."""
        rng = np.random.default_rng(3)
        pairs = scored_of(np.zeros(400)).pairs
        draws = [torch.from_numpy(rng.normal(size=400)) for _ in range(40)]
        result = against_random(draws[0], draws[1:], pairs)
        gap = (draws[0] - torch.stack(draws[1:]).mean(0)).numpy()
        half = stats.t.ppf(0.975, 399) * gap.std(ddof=1) / np.sqrt(400)
        assert result.set_sd < 0.4 * gap.std() / np.sqrt(400)
        # 2,000 resamples know a standard error within 3 * 1.6%; the rest is the degrees of freedom
        assert result.high - result.difference == pytest.approx(half, rel=0.1)

    @pytest.mark.grid
    @pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
    def test_a_random_set_is_excluded_in_one_case_of_twenty(self, spread):
        """The set is one more draw: 2 to 8% of 1,000 intervals exclude 0, whatever the share of noise; a shift is seen.

        The simpler rule, spread plus bootstrap error, excludes 0 in only 0.2% of the cases at `spread` 0.
        """
        rng = np.random.default_rng(0)
        pairs = scored_of(np.zeros(60)).pairs
        null = real = 0
        for _ in range(1000):
            draws = [torch.tensor(spread * rng.normal() + rng.normal(size=60)) for _ in range(9)]
            result = against_random(draws[0], draws[1:], pairs)
            null += not result.low <= 0 <= result.high
            shifted = against_random(draws[0] + 8, draws[1:], pairs)
            real += not shifted.low <= 0 <= shifted.high
        assert 0.02 <= null / 1000 <= 0.08
        assert real / 1000 >= 0.95

    def test_a_single_random_set_is_refused(self):
        with pytest.raises(OptionError, match="at least two random sets"):
            against_random(torch.ones(1), [torch.ones(1)], scored_of([0.0]).pairs)


def test_variance_of_mean_is_what_the_bootstrap_approaches():
    values = torch.randn(120, generator=torch.Generator().manual_seed(0)).double()
    owners = np.random.default_rng(0).integers(0, 40, 120)
    pairs = prompts(*owners)
    sums = resampled_sums(torch.stack([values, torch.ones(120).double()], dim=1), pairs)
    # 2,000 resamples know a variance within 3 * 3.2%; the ratio is linear to about 1/40
    assert variance_of_mean(values, pairs) == pytest.approx((sums[:, 0] / sums[:, 1]).var(), rel=0.15)
    single = prompts(*range(120))
    assert variance_of_mean(values, single) == pytest.approx(float(values.var()) / 120)
    assert np.isnan(variance_of_mean(values[:2], prompts(0, 0)))


def test_bootstrap_mean_of_few_prompts_covers():
    """Student's case: 30 normal items; 91 to 98% of 300 intervals hold the mean (see docs/concepts.md)."""
    rng = np.random.default_rng(1)
    pairs = prompts(*range(30))
    hits = 0
    for seed in range(300):
        estimate = bootstrap_mean(torch.from_numpy(rng.normal(size=30)), pairs, seed=seed)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.91 <= hits / 300 <= 0.98
