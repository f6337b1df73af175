"""Accuracy, intervals, balance and controls against closed forms, brute force and known coverage."""

import numpy as np
import pytest
import torch
from scipy import stats
from test_neurons import provenance

from rmtension import PreferencePairs, ScoredPairs, evaluation
from rmtension.errors import DataError, OptionError


def scored_of(margins, *, prompts=None, subsets=None):
    """Pairs with the given margins."""
    rows = [
        {
            "prompt": f"Q{number if prompts is None else prompts[number]}",
            "chosen": f"a{number}",
            "rejected": f"bb{number}",
            "subset": None if subsets is None else subsets[number],
        }
        for number in range(len(margins))
    ]
    chosen = torch.as_tensor(margins, dtype=torch.float64)
    return ScoredPairs(chosen, torch.zeros_like(chosen), PreferencePairs.from_records(rows), provenance())


def test_ties_count_half_and_can_count_nothing():
    scored = scored_of([1.0, 0.0, -1.0, 2.0])
    assert scored.accuracy() == evaluation.accuracy(scored).value == 0.625
    assert scored.accuracy(tie=0.0) == evaluation.accuracy(scored, tie=0.0).value == 0.5


def test_bootstrap_equals_scipy_where_every_prompt_is_its_own():
    """The percentile interval of SciPy's bootstrap, within the noise of 2,000 resamples (4 sd of a 2.5% quantile)."""
    values = np.random.default_rng(0).normal(size=300)
    scored = scored_of(values)
    ours = evaluation.mean_margin(scored)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # sd of an estimated 2.5% quantile = sqrt(p (1 - p) / B) / density = 0.0035 / 0.0584 standard errors
    slack = 4 * 0.06 * values.std() / np.sqrt(300)
    assert abs(ours.low - theirs.low) < slack
    assert abs(ours.high - theirs.high) < slack


def test_pairs_of_one_prompt_are_not_independent():
    """Ten copies of every pair carry no more information: the interval must not shrink by sqrt(10)."""
    margins = np.random.default_rng(0).normal(size=100)
    single = evaluation.mean_margin(scored_of(margins))
    copied = evaluation.mean_margin(scored_of(np.repeat(margins, 10), prompts=np.repeat(np.arange(100), 10)))
    as_if_independent = evaluation.mean_margin(scored_of(np.repeat(margins, 10)))
    assert copied.n == 1000
    assert copied.n_prompts == 100
    assert (copied.high - copied.low) / (single.high - single.low) == pytest.approx(1, abs=0.1)
    assert (as_if_independent.high - as_if_independent.low) < 0.4 * (single.high - single.low)


def test_intervals_cover_a_coin_at_their_level():
    """400 data sets of 60 coin flips in 40 prompts: between 91% and 98% of 95% intervals hold 1/2.

    The percentile bootstrap is a little narrow at 40 prompts; the bounds are 0.945 +- 3 binomial standard errors.
    """
    generator = np.random.default_rng(0)
    prompts = np.concatenate([np.arange(40), np.arange(20)])
    hits = 0
    for seed in range(400):
        estimate = evaluation.accuracy(scored_of(generator.choice([-1.0, 1.0], size=60), prompts=prompts), seed=seed)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.91 <= hits / 400 <= 0.98


def test_all_correct_is_not_certainty():
    estimate = evaluation.accuracy(scored_of([1.0] * 50))
    expected = stats.binomtest(50, 50).proportion_ci(method="exact")
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(expected.low)
    wrong = evaluation.accuracy(scored_of([-1.0] * 50))
    assert wrong.high == pytest.approx(1 - expected.low)


def test_balance_of_a_model_that_always_refuses():
    subsets = ["should_refuse"] * 30 + ["should_respond"] * 10 + ["other"] * 5
    scored = scored_of([1.0] * 30 + [-1.0] * 10 + [1.0] * 5, subsets=subsets)
    balance = evaluation.balance(scored)
    assert [balance[name].value for name in ("refusing", "responding", "balanced")] == [1.0, 0.0, 0.5]
    assert balance["balanced"].high - balance["balanced"].low > 0.1, "two extremes do not make a certainty"
    assert evaluation.accuracy(scored).value > 0.7, "which is what the balance corrects"
    assert (balance["refusing"].n, balance["balanced"].n) == (30, 40)
    assert evaluation.balance(scored_of([1.0])) == {}
    other = evaluation.balance(scored, refuse=["other"], respond=["should_respond"])
    assert other["refusing"].n == 5


def test_change_is_paired():
    before = scored_of(np.random.default_rng(0).normal(size=200))
    after = ScoredPairs(before.chosen + 1.0, before.rejected, before.pairs, provenance())
    estimate = evaluation.change(after, before, quantity="margin")
    assert estimate.value == pytest.approx(1.0)
    assert estimate.high - estimate.low < 1e-9, "a constant shift has no spread between pairs"
    accuracy = evaluation.change(after, before)
    assert accuracy.value == pytest.approx(after.accuracy() - before.accuracy())
    with pytest.raises(DataError, match="same pairs in the same order"):
        evaluation.change(scored_of([1.0, 2.0]), scored_of([1.0]))
    with pytest.raises(OptionError, match="quantity"):
        evaluation.pair_change(after, before, "reward")


class TestAgainstRandom:
    def test_values(self):
        pairs = scored_of(np.zeros(4)).pairs
        result = evaluation.against_random(torch.full((4,), 3.0), [torch.zeros(4), torch.ones(4)], pairs)
        assert (result.random_mean, result.n_draws, result.difference) == (0.5, 2, 2.5)
        assert result.random_sd == pytest.approx(np.std([0, 1], ddof=1))
        # No spread over prompts, so the interval is Student's prediction interval alone.
        half = stats.t.ppf(0.975, 1) * result.random_sd * np.sqrt(1.5)
        assert result.low == pytest.approx(2.5 - half)

    def test_covers_nothing_when_the_set_is_one_more_draw(self):
        """Effects of sets ~ N(0, 1), noise over pairs: 93% or more of the intervals hold 0, few a shift of 8."""
        generator = np.random.default_rng(0)
        pairs = scored_of(np.zeros(50)).pairs
        null = real = 0
        for _ in range(300):
            draws = [torch.tensor(generator.normal() + generator.normal(size=50)) for _ in range(9)]
            result = evaluation.against_random(draws[0], draws[1:], pairs)
            null += result.low <= 0 <= result.high
            shifted = evaluation.against_random(draws[0] + 8, draws[1:], pairs)
            real += shifted.low <= 0 <= shifted.high
        assert null / 300 >= 0.93
        assert real / 300 <= 0.05

    def test_needs_two_draws(self):
        with pytest.raises(OptionError, match="at least two draws"):
            evaluation.against_random(torch.ones(1), [torch.ones(1)], scored_of([0.0]).pairs)


def test_length_baseline():
    rows = [("a", "bbb"), ("bbb", "a"), ("bbb", "a"), ("aa", "bb")]
    pairs = PreferencePairs.from_records(
        {"prompt": str(i), "chosen": chosen, "rejected": rejected} for i, (chosen, rejected) in enumerate(rows)
    )
    assert evaluation.length_baseline(pairs).value == pytest.approx((0 + 1 + 1 + 0.5) / 4)


def test_one_prompt_has_no_interval():
    estimate = evaluation.mean_margin(scored_of([1.0, 2.0], prompts=[0, 0]))
    assert estimate.value == 1.5
    assert np.isnan([estimate.low, estimate.high]).all()


def test_no_pairs_and_a_bad_level():
    with pytest.raises(DataError, match="at least one preference pair"):
        evaluation.accuracy(scored_of([]))
    with pytest.raises(OptionError, match="level"):
        evaluation.accuracy(scored_of([1.0]), level=1.0)
