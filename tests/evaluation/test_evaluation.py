"""Accuracy, intervals, balance and controls against closed forms, brute force and known coverage."""

import numpy as np
import pytest
import torch
from drawn_scores import provenance, scored_of
from scipy import stats

from rmtension import PairRewards, PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation import _metrics as evaluation
from rmtension.evaluation._intervals import Estimate


def test_ties_count_half_and_can_count_nothing():
    scored = scored_of([1.0, 0.0, -1.0, 2.0])
    assert scored.accuracy() == evaluation.accuracy(scored).value == 0.625
    assert scored.accuracy(tie_value=0.0) == evaluation.accuracy(scored, tie_value=0.0).value == 0.5


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


@pytest.mark.grid
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


def test_a_model_that_always_refuses_has_balanced_accuracy_half():
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
    after = PairRewards(before.chosen + 1.0, before.rejected, before.pairs, provenance())
    estimate = evaluation.change(after, before, quantity="margin")
    assert estimate.value == pytest.approx(1.0)
    assert estimate.high - estimate.low < 1e-9, "a constant shift has no spread between pairs"
    accuracy = evaluation.change(after, before)
    assert accuracy.value == pytest.approx(after.accuracy() - before.accuracy())
    with pytest.raises(DataError, match="same pairs in the same order"):
        evaluation.change(scored_of([1.0, 2.0]), scored_of([1.0]))
    with pytest.raises(OptionError, match="quantity"):
        evaluation.item_change(after, before, "reward")


def test_one_prompt_has_no_interval():
    estimate = evaluation.mean_margin(scored_of([1.0, 2.0], prompts=[0, 0]))
    assert estimate.value == 1.5
    assert np.isnan([estimate.low, estimate.high]).all()


def test_no_pairs_and_wrong_levels_are_refused():
    with pytest.raises(DataError, match="at least one preference pair"):
        evaluation.accuracy(scored_of([]))
    with pytest.raises(OptionError, match="level"):
        evaluation.accuracy(scored_of([1.0]), level=1.0)


class TestItems:
    """Best-of-n: an item of m chosen and n rejected responses is right when its worst comparison is."""

    @pytest.fixture
    def scored(self):
        rng = np.random.default_rng(0)
        rows, chosen, rejected = [], [], []
        for item in range(60):
            m, n = (1, 3) if item % 2 else (2, 2)
            # Few levels, so that ties are common.
            good, bad = rng.integers(0, 6, m) + 1.0, rng.integers(0, 6, n).astype(float)
            for i in range(m):
                for j in range(n):
                    names = {"chosen": f"good {i}", "rejected": f"bad {j}", "item": f"item {item}"}
                    rows.append({"prompt": f"Q{item // 2}", "subset": "ab"[item % 2], **names})
                    chosen.append(good[i])
                    rejected.append(bad[j])
        pairs = PreferencePairs.from_records(rows)
        return PairRewards(torch.tensor(chosen), torch.tensor(rejected), pairs, provenance())

    def test_correct_is_lowest_chosen_above_highest_rejected(self, scored):
        frame = scored.to_frame().assign(item=[pair.item for pair in scored.pairs])
        grouped = frame.groupby("item", sort=False)
        gap = grouped["chosen"].min() - grouped["rejected"].max()
        assert (gap == 0).sum() > 3, "ties occur"
        for tie in (0.0, 0.5):
            expected = ((gap > 0) + tie * (gap == 0)).mean()
            assert evaluation.accuracy(scored, tie_value=tie).value == pytest.approx(expected)
            assert scored.accuracy(tie_value=tie) == pytest.approx(expected)
        # Negative control: judging single comparisons gives more.
        single = (frame["margin"] > 0).mean() + 0.5 * (frame["margin"] == 0).mean()
        assert single > evaluation.accuracy(scored).value + 0.1
        estimate = evaluation.accuracy(scored)
        assert (estimate.n, estimate.n_prompts) == (60, 30)

    def test_chance_is_the_share_of_random_rewards(self, scored):
        """Brute force over all orders: of 2 + 2 rewards 1/6 rank right, of 1 + 3 1/4."""
        from itertools import permutations

        for m, n in ((2, 2), (1, 3)):
            right = [min(order[:m]) > max(order[m:]) for order in permutations(range(m + n))]
            index = 0 if m == 2 else 1
            assert evaluation.chance(scored.pairs)[index] == pytest.approx(np.mean(right))
        table = evaluation.by_subset(scored).set_index("subset")
        assert table["chance"].to_dict() == pytest.approx({"a": 1 / 6, "b": 1 / 4})
        assert table["n"].to_dict() == {"a": 30, "b": 30}
        assert evaluation.chance(scored_of([1.0, 2.0]).pairs).tolist() == [0.5, 0.5]


def test_compare_is_mcnemar_where_it_applies():
    rng = np.random.default_rng(0)
    first, other = scored_of(rng.normal(size=80) + 0.5), scored_of(rng.normal(size=80))
    comparison = evaluation.compare(first, other)
    gained = int((first.correct & ~other.correct).sum())
    lost = int((~first.correct & other.correct).sum())
    assert (comparison.n_gained, comparison.n_lost, comparison.test) == (gained, lost, "McNemar")
    assert comparison.p_value == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert comparison.difference.value == pytest.approx((gained - lost) / 80)
    turned = evaluation.compare(other, first)
    assert turned.p_value == comparison.p_value
    assert turned.difference.value == -comparison.difference.value
    assert evaluation.compare(first, first).p_value == 1.0


def test_compare_flips_prompts_where_items_are_not_independent():
    owners = np.arange(80) // 4
    rng = np.random.default_rng(0)
    first, other = (scored_of(rng.normal(size=80), prompts=owners) for _ in range(2))
    assert evaluation.compare(first, other).test == "sign flip"
    with_ties = scored_of(np.where(np.arange(80) % 3 == 0, 0.0, 1.0))
    assert evaluation.compare(with_ties, scored_of(np.ones(80))).test == "sign flip"


def test_comparisons_by_subset_are_adjusted():
    rng = np.random.default_rng(0)
    subsets = [f"s{number % 4}" for number in range(200)]
    better = scored_of(np.where(np.array(subsets) == "s1", 2.0, rng.normal(size=200)), subsets=subsets)
    other = PairRewards(torch.from_numpy(rng.normal(size=200)), better.rejected, better.pairs, provenance())
    table = evaluation.compare_by_subset(better, other).set_index("subset")
    assert table["n"].tolist() == [50] * 4
    assert table["q_value"].tolist() == pytest.approx(stats.false_discovery_control(table["p_value"]).tolist())
    assert table["p_value"].idxmin() == "s1"
    with pytest.raises(DataError, match="same pairs"):
        evaluation.compare_by_subset(better, scored_of([1.0]))


def test_macro_accuracy_is_the_mean_over_subsets():
    """Unlike the pooled one, which a large subset decides."""
    subsets = ["large"] * 90 + ["small"] * 10
    scored = scored_of([1.0] * 90 + [-1.0] * 8 + [1.0] * 2, subsets=subsets)
    macro = evaluation.macro_accuracy(scored)
    assert macro.value == pytest.approx((1 + 0.2) / 2)
    assert evaluation.accuracy(scored).value == pytest.approx(0.92)
    # The large subset is certain, so the interval is half that of ten coin flips at .2: a binomial's 95%.
    low, high = stats.binom(10, 0.2).ppf([0.025, 0.975]) / 10
    assert macro.low == pytest.approx((1 + low) / 2, abs=0.06)
    assert macro.high == pytest.approx((1 + high) / 2, abs=0.06)


def test_benchmarks_subsets_count_as_refusing_and_responding():
    subsets = ["reward-bench/xstest-should-refuse"] * 3 + ["rm-bench/safety-response"] * 2
    balances = evaluation.balance(scored_of([1.0, 1.0, -1.0, 1.0, 1.0], subsets=subsets))
    assert balances["refusing"].value == pytest.approx(2 / 3)
    assert balances["responding"].value == 1.0


def test_items_of_one_name_and_two_prompts_are_two():
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b", "item": "1"} for prompt in ("Q", "Q", "other")]
    assert PreferencePairs.from_records(rows).items == [[0, 1], [2]]


# -- what options reach ------------------------------------------------------------------------------------------------


def mixed_bag(seed=0):
    """120 pairs of 60 prompts in two subsets, a fifth of them ties."""
    draw = np.random.default_rng(seed)
    margins = draw.normal(0.3, 1.0, size=120) * (draw.random(120) > 0.2)
    subsets = np.where(np.arange(120) % 3 == 0, "should_refuse", "should_respond").tolist()
    return scored_of(margins, prompts=np.arange(120) % 60, subsets=subsets)


def first(frame):
    """The first row of a table of accuracies, as an estimate."""
    row = frame.to_dict("records")[0]
    return Estimate(row["accuracy"], row["low"], row["high"], row["n"], row["n_prompts"])


def difference(frame):
    row = frame.to_dict("records")[0]
    return Estimate(row["difference"], row["low"], row["high"], row["n"], 0)


ESTIMATES = {
    "accuracy": evaluation.accuracy,
    "macro accuracy": evaluation.macro_accuracy,
    "margin": evaluation.mean_margin,
    "subset": lambda scored, **options: first(evaluation.by_subset(scored, **options)),
    "balanced": lambda scored, **options: evaluation.balance(scored, **options)["balanced"],
    "refusing": lambda scored, **options: evaluation.balance(scored, **options)["refusing"],
    "change": lambda scored, **options: evaluation.change(scored, mixed_bag(1), **options),
    "compare": lambda scored, **options: evaluation.compare(scored, mixed_bag(1), **options).difference,
    "compare subsets": lambda scored, **options: difference(
        evaluation.compare_by_subset(scored, mixed_bag(1), **options)
    ),
}
WITHOUT_TIE = ("margin", "change")


@pytest.mark.parametrize("name", ESTIMATES)
def test_level_and_seed_reach_the_interval(name):
    estimate, scored = ESTIMATES[name], mixed_bag()
    default = estimate(scored)
    assert estimate(scored) == default == estimate(scored, seed=0, level=0.95)
    others, narrow = [estimate(scored, seed=seed) for seed in range(1, 5)], estimate(scored, level=0.5)
    assert {other.value for other in others} == {narrow.value} == {default.value}
    # Ends are multiples of half an item: two seeds may meet in them.
    assert {(other.low, other.high) for other in others} - {(default.low, default.high)}
    assert default.low < narrow.low < narrow.value < narrow.high < default.high
    if "subset" not in name:
        assert (default.level, narrow.level) == (0.95, 0.5)


@pytest.mark.parametrize("name", [name for name in ESTIMATES if name not in WITHOUT_TIE])
def test_a_tie_counts_tie_value(name):
    """Half by default; linear in what it counts."""
    estimate, scored = ESTIMATES[name], mixed_bag()
    none, half, whole = (estimate(scored, tie_value=tie).value for tie in (0.0, 0.5, 1.0))
    assert half == estimate(scored).value == pytest.approx((none + whole) / 2)
    assert none != whole


def test_estimates_hold_their_numbers_of_items_and_prompts():
    scored = mixed_bag()
    parts = {name: scored.filter(subset=name) for name in ("should_refuse", "should_respond")}
    sizes = {name: (len(part), len(part.pairs.prompts)) for name, part in parts.items()}
    assert sizes == {"should_refuse": (40, 20), "should_respond": (80, 40)}
    accuracies = {name: evaluation.accuracy(part) for name, part in parts.items()}
    balance = evaluation.balance(scored)
    assert balance["refusing"] == accuracies["should_refuse"]
    assert balance["responding"] == accuracies["should_respond"]
    refusing, other, balanced = (balance[name] for name in ("refusing", "responding", "balanced"))
    assert balanced.value == (refusing.value + other.value) / 2
    # Zou and Donner's interval of a mean of two independent estimates.
    assert balanced.low == balanced.value - np.hypot(refusing.value - refusing.low, other.value - other.low) / 2
    assert balanced.high == balanced.value + np.hypot(refusing.high - refusing.value, other.high - other.value) / 2
    assert (balanced.n, balanced.n_prompts) == (120, 60)
    macro = evaluation.macro_accuracy(scored)
    assert macro.value == pytest.approx(balanced.value)
    assert (macro.n, macro.n_prompts, macro.level) == (120, 60, 0.95)
    frame = evaluation.by_subset(scored)
    assert sorted(frame["subset"]) == ["should_refuse", "should_respond"]
    for row in frame.to_dict("records"):
        right, margin = accuracies[row["subset"]], evaluation.mean_margin(parts[row["subset"]])
        assert (row["accuracy"], row["low"], row["high"]) == (right.value, right.low, right.high)
        assert (row["margin"], row["margin_low"], row["margin_high"]) == (margin.value, margin.low, margin.high)
        assert (row["n"], row["n_prompts"], row["chance"]) == (right.n, right.n_prompts, 0.5)
    comparison = evaluation.compare(scored, mixed_bag(1))
    assert evaluation.comparison_row(comparison) == {
        "difference": comparison.difference.value,
        "low": comparison.difference.low,
        "high": comparison.difference.high,
        "p_value": comparison.p_value,
        "test": "sign flip",
        "n_gained": comparison.n_gained,
        "n_lost": comparison.n_lost,
        "n": 120,
    }
    gap = evaluation.item_change(scored, mixed_bag(1), "accuracy")
    assert (comparison.n_gained, comparison.n_lost) == (int((gap > 0).sum()), int((gap < 0).sum()))
    assert comparison.p_value == evaluation.compare(scored, mixed_bag(1), seed=0).p_value
    assert len({evaluation.compare(scored, mixed_bag(1), seed=seed).p_value for seed in range(4)}) > 1


def test_each_of_three_subsets_counts_once():
    scored = scored_of([1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0], subsets=list("aaabbcc"))
    assert evaluation.macro_accuracy(scored).value == pytest.approx((1 + 0.5 + 0) / 3)


def test_margins_of_a_subset_have_the_given_level():
    wide, narrow = (evaluation.by_subset(mixed_bag(), level=level).to_dict("records")[0] for level in (0.95, 0.5))
    assert wide["margin_low"] < narrow["margin_low"] < narrow["margin_high"] < wide["margin_high"]


def test_a_tie_that_is_broken_gains_what_a_tie_lacks():
    tied, right = scored_of([0.0, 0.0]), scored_of([1.0, -1.0])
    for tie in (0.0, 0.5, 0.25):
        assert evaluation.item_change(right, tied, "accuracy", tie_value=tie).tolist() == [1 - tie, -tie]
        assert evaluation.item_change(tied, right, "accuracy", tie_value=tie).tolist() == [tie - 1, tie]


def test_two_prompts_have_an_interval_of_subsets():
    both = evaluation.macro_accuracy(scored_of([1.0, -1.0], subsets=["a", "b"]))
    assert (both.low, both.high) == (0.0, 1.0)
    macro = evaluation.macro_accuracy(scored_of([1.0, -1.0], prompts=[0, 0], subsets=["a", "b"]))
    assert np.isnan(macro.low)
    assert np.isnan(macro.high)


def test_half_ties_are_flipped_even_if_every_prompt_has_one_item():
    """McNemar counts what one model gains and loses; half a point is neither."""
    comparison = evaluation.compare(scored_of([1.0, 0.0, 1.0]), scored_of([-1.0, 1.0, 1.0]))
    assert comparison.test == "sign flip"
    comparison = evaluation.compare(scored_of([1.0, 1.0, -1.0]), scored_of([-1.0, 1.0, 1.0]))
    assert (comparison.test, comparison.n_gained, comparison.n_lost) == ("McNemar", 1, 1)


@pytest.mark.parametrize("call", [evaluation.change, evaluation.compare, evaluation.compare_by_subset])
def test_other_pairs_are_refused(call):
    with pytest.raises(DataError, match=r"expected rewards of the same pairs in the same order. Score both "):
        call(mixed_bag(), mixed_bag().take(list(range(1, 120))))
    with pytest.raises(OptionError, match="quantity: expected 'accuracy' or 'margin', got 'x'"):
        evaluation.change(mixed_bag(), mixed_bag(1), quantity="x")
