"""Length, transferability and confidence: by hand, by brute force, and with models that know nothing."""

import numpy as np
import pytest
import torch
from drawn_scores import provenance, scored_of

from rmtension import PairRewards, PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation import _metrics as evaluation
from rmtension.evaluation._centred_margins import centred_rewards, confidence
from rmtension.evaluation._length import length_baseline, length_matched
from rmtension.evaluation._transfer import transferability


def pairs_of(lengths):
    return PreferencePairs.from_records(
        {"prompt": str(number), "chosen": "a" * chosen, "rejected": "b" * rejected}
        for number, (chosen, rejected) in enumerate(lengths)
    )


class TestLength:
    def test_the_length_baseline_prefers_the_longer_response(self):
        assert length_baseline(pairs_of([(1, 3), (3, 1), (3, 1), (2, 2)])).value == pytest.approx((0 + 1 + 1 + 0.5) / 4)

    def test_baseline_of_items_is_judged_like_rewards(self):
        rows = [{"prompt": "Q", "chosen": "aaa", "rejected": bad, "item": "one"} for bad in ("b", "bb", "bbbb")] + [
            {"prompt": "Q", "chosen": "aaa", "rejected": bad, "item": "two"} for bad in ("b", "bb")
        ]
        assert length_baseline(PreferencePairs.from_records(rows)).value == 0.5

    def test_length_says_nothing_in_matched_pairs(self):
        rng = np.random.default_rng(0)
        pairs = pairs_of(rng.integers(5, 80, size=(400, 2)) + np.array([30, 0]))
        assert length_baseline(pairs).value > 0.7, "in all pairs the longer one is preferred"
        matched = length_matched(pairs)
        assert length_baseline(matched).value == 0.5
        ratios = np.array([np.log(len(pair.chosen) / len(pair.rejected)) for pair in matched])
        # At every size of the ratio as many either way, within the caliper: compare the sorted sizes.
        assert np.abs(np.sort(ratios[ratios > 0]) + np.sort(ratios[ratios < 0])[::-1]).max() <= 0.2
        assert [pair.id for pair in matched] == [pair.id for pair in pairs if pair in set(matched)]

    def test_the_matching_is_maximal(self):
        """Brute force over all matchings of small sets (networkx would do; recursion is enough)."""
        rng = np.random.default_rng(1)
        for _ in range(20):
            pairs = pairs_of(rng.integers(3, 12, size=(9, 2)))
            ratios = [np.log(len(pair.chosen) / len(pair.rejected)) for pair in pairs]
            longer, shorter = [r for r in ratios if r > 0], [-r for r in ratios if r < 0]

            def most(left, right):
                if not left:
                    return 0
                best = most(left[1:], right)
                for index, ratio in enumerate(right):
                    if abs(ratio - left[0]) <= 0.2:
                        best = max(best, 1 + most(left[1:], right[:index] + right[index + 1 :]))
                return best

            expected = 2 * most(longer, shorter) + sum(r == 0 for r in ratios)
            if expected:
                assert len(length_matched(pairs)) == expected

    def test_an_empty_matching_and_wrong_arguments_are_refused(self):
        with pytest.raises(DataError, match="no two of 2 pairs match"):
            length_matched(pairs_of([(9, 1), (8, 1)]))
        with pytest.raises(OptionError, match="caliper"):
            length_matched(pairs_of([(1, 1)]), caliper=-1.0)
        item = PreferencePairs.from_records(
            {"prompt": "Q", "chosen": "a", "rejected": bad, "item": "one"} for bad in ("b", "bb")
        )
        with pytest.raises(DataError, match="items of several"):
            length_matched(item)


class TestTransferability:
    def test_transferability_equals_python_sets(self):
        rng = np.random.default_rng(0)
        mixed, helpful, harmless = (scored_of(rng.normal(size=120)) for _ in range(3))
        right = [set(scored.correct.nonzero()[:, 0].tolist()) for scored in (mixed, helpful, harmless)]
        transfer = transferability(mixed, helpful, harmless)
        union = right[1] | right[2]
        assert transfer.value.value == pytest.approx(len(right[0] & union) / len(union))
        assert transfer.accuracy.value == pytest.approx(len(right[0]) / 120)
        assert transfer.beyond_accuracy.value == pytest.approx(transfer.value.value - transfer.accuracy.value)
        assert transfer.jaccard_helpful.value == pytest.approx(len(right[0] & right[1]) / len(right[0] | right[1]))
        assert transfer.jaccard_harmless.value == pytest.approx(len(right[0] & right[2]) / len(right[0] | right[2]))
        assert transfer.n_union == len(union)

    @pytest.mark.grid
    def test_independent_models_transfer_nothing_beyond_accuracy(self):
        """T is about the accuracy of the mixed model, and 90% or more of the intervals of the difference hold 0."""
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(60):
            transfer = transferability(*(scored_of(rng.normal(size=100) + 0.3) for _ in range(3)))
            assert transfer.value.value > 0.4, "which looks like transfer"
            covered += transfer.beyond_accuracy.low <= 0 <= transfer.beyond_accuracy.high
        assert covered / 60 >= 0.9
        same = scored_of(rng.normal(size=100))
        assert transferability(same, same, scored_of(-np.ones(100))).beyond_accuracy.low > 0

    def test_all_correct_is_not_certainty(self):
        right = scored_of([1.0] * 20)
        transfer = transferability(right, right, right)
        expected = evaluation.accuracy(right)
        assert (transfer.value.low, transfer.value.high) == (expected.low, expected.high)
        alone = scored_of([1.0, 1.0], prompts=[0, 0])
        assert np.isnan(transferability(alone, alone, alone).value.low)

    def test_an_empty_union_is_undefined(self):
        wrong = scored_of([-1.0, -1.0])
        transfer = transferability(scored_of([1.0, 1.0]), wrong, wrong)
        assert np.isnan(transfer.value.value)
        assert transfer.accuracy.value == 1.0
        with pytest.raises(DataError, match="same pairs"):
            transferability(scored_of([1.0]), wrong, wrong)


class TestConfidence:
    @pytest.fixture
    def scored(self):
        rng = np.random.default_rng(0)
        first = scored_of(rng.normal(size=50) + 1)
        other = PairRewards(3 * first.chosen + 100, 3 * first.rejected + 100, first.pairs, provenance())
        return {"one": first, "other": other, "third": scored_of(rng.normal(size=50))}

    def test_a_constant_and_a_scale_change_nothing_that_is_compared(self, scored):
        frame = centred_rewards(scored)
        for _, part in frame.groupby("model"):
            assert np.concatenate([part["chosen"], part["rejected"]]).mean() == pytest.approx(0, abs=1e-12)
            assert np.allclose(part["chosen"] - part["rejected"], part["margin"])
        table = confidence(scored).set_index(["model", "pairs", "quantity"])["value"]
        for pairs in ("all", "all models correct"):
            ours, theirs = (table[name, pairs, "margin_in_spreads"] for name in ("one", "other"))
            assert ours == pytest.approx(theirs)
            assert table["one", pairs, "margin"] != pytest.approx(table["other", pairs, "margin"])

    def test_common_pairs_are_those_that_all_models_rank_correctly(self, scored):
        everyone = scored["one"].correct & scored["third"].correct
        frame = confidence(scored).set_index(["model", "pairs", "quantity"])
        row = frame.loc[("third", "all models correct", "margin")]
        assert row["n"] == int(everyone.sum())
        assert row["value"] == pytest.approx(float(scored["third"].margin[everyone].mean()))
        probability = frame.loc[("third", "all", "probability"), "value"]
        assert probability == pytest.approx(float(torch.sigmoid(scored["third"].margin).mean()))

    def test_without_a_common_pair_confidence_is_nan(self):
        frame = confidence({"a": scored_of([1.0, -1.0]), "b": scored_of([-1.0, 1.0])})
        none = frame[frame["pairs"] == "all models correct"]
        assert (none["n"] == 0).all()
        assert none["value"].isna().all()
        with pytest.raises(DataError, match="at least one model"):
            confidence({})
        with pytest.raises(DataError, match="same pairs"):
            centred_rewards({"a": scored_of([1.0]), "b": scored_of([1.0, 2.0])})


def test_balance_counts_a_tie_as_tie_value():
    scored = scored_of([0.0, 1.0], subsets=["should_refuse", "should_respond"])
    assert evaluation.balance(scored)["refusing"].value == 0.5
    assert evaluation.balance(scored, tie_value=0.0)["refusing"].value == 0.0
