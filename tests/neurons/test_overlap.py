"""Chance by permutations, intervals by brute force and by their coverage, the seed of every resample."""

import numpy as np
import pytest
import torch
from drawn_scores import provenance
from scipy import stats

from rmtension import NeuronScores, NeuronSet
from rmtension.neurons._neuron_scores import N_BLOCKS
from rmtension.neurons._overlap import Overlap, jaccard_intervals

SHAPE = (3, 60)


def crowded(seed):
    """A set that crowds in the later layers, as top sets do."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random(SHAPE) < np.array([[0.05], [0.2], [0.5]]))
    return NeuronSet(mask, "mlp", "toy")


def permuted(neurons, rng):
    """Random within each layer, with as many neurons there."""
    rows = [row[torch.from_numpy(rng.permutation(len(row)))] for row in neurons.mask]
    return NeuronSet(torch.stack(rows), "mlp", "toy")


def scores_of_blocks(blocks, **changes):
    """Scores that are means over equal blocks of prompts."""
    without = (blocks.sum(0) - blocks) / (len(blocks) - 1)
    return NeuronScores(blocks.mean(0), blocks.std(0), provenance(**changes), without)


def test_chance_in_each_layer_is_what_permutations_give():
    rng = np.random.default_rng(0)
    a, b = crowded(0), crowded(1)
    overlap = Overlap.of(a, b)
    others = [permuted(b, rng) for _ in range(1000)]
    drawn = np.array([len(a & other) / len(a | other) for other in others])
    # 4 standard errors of 1,000 permutations
    slack = 4 * drawn.std() / np.sqrt(1000)
    assert overlap.layer_expected_jaccard == pytest.approx(drawn.mean(), abs=slack)
    assert overlap.layer_expected_jaccard > overlap.expected_jaccard + slack, "crowding overlaps by itself"
    assert overlap.layer_p_value == pytest.approx(
        (drawn >= overlap.jaccard - 1e-12).mean(), abs=4 * 0.5 / np.sqrt(1000)
    )
    # The interval beyond chance is the observed index minus the central 95% of the permutations, to a count or so.
    low, high = np.quantile(drawn, [0.025, 0.975])
    step = 1.5 / len(a | b)
    assert overlap.beyond_low == pytest.approx(overlap.jaccard - high, abs=step)
    assert overlap.beyond_high == pytest.approx(overlap.jaccard - low, abs=step)


@pytest.mark.grid
def test_interval_beyond_chance_excludes_0_in_one_case_of_twenty():
    """Sets random within their layers: 2 to 8% of 600 intervals exclude 0. Sets that share a part: nearly all do."""
    rng = np.random.default_rng(0)
    a = crowded(0)
    null = real = 0
    for number in range(600):
        b = permuted(crowded(number + 1), rng)
        overlap = Overlap.of(a, b)
        null += not overlap.beyond_low <= 0 <= overlap.beyond_high
        shared = Overlap.of(a, b | NeuronSet(a.mask & (torch.rand(SHAPE) < 0.6), "mlp", "toy"))
        real += shared.beyond_low > 0
    assert 0.02 <= null / 600 <= 0.08
    assert real / 600 >= 0.95


class TestIntervalsOverPrompts:
    def test_without_noise_the_interval_has_no_width(self):
        """Blocks that agree: every resample ranks the same neurons."""
        values = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
        scores = {name: scores_of_blocks(row.expand(N_BLOCKS, *SHAPE)) for name, row in zip("ab", values, strict=True)}
        (low, high) = jaccard_intervals(scores, fraction=0.1)["a", "b"]
        observed = Overlap.of(*(value.top(0.1) for value in scores.values())).jaccard
        assert low == pytest.approx(observed)
        assert high == pytest.approx(observed)

    def test_width_is_the_spread_over_samples_of_prompts(self):
        """Ground truth: the Jaccard index of 200 independent samples of 32 prompts; the interval has its width.

        Two models with one signal each, partly shared, and noise over prompts. The bootstrap has the width of the
        true sampling distribution within a factor of 1.5, and holds the mean of the true distribution.
        """
        rng = np.random.default_rng(0)
        signal = rng.normal(size=(2, *SHAPE))
        signal[1] = 0.7 * signal[0] + 0.7 * signal[1]

        def sample():
            noise = 2.0 * rng.normal(size=(2, N_BLOCKS, *SHAPE))
            return {n: scores_of_blocks(torch.from_numpy(s + e)) for n, s, e in zip("ab", signal, noise, strict=True)}

        observed = []
        for _ in range(200):
            drawn = sample()
            observed.append(Overlap.of(drawn["a"].top(0.1), drawn["b"].top(0.1)).jaccard)
        truth = np.quantile(observed, 0.975) - np.quantile(observed, 0.025)
        intervals = [jaccard_intervals(sample(), fraction=0.1, seed=n)["a", "b"] for n in range(20)]
        widths = np.array([high - low for low, high in intervals])
        assert truth / 1.5 < widths.mean() < 1.5 * truth
        held = np.mean([low <= np.mean(observed) <= high for low, high in intervals])
        assert held >= 0.8

    def test_the_base_is_removed_in_every_resample(self):
        """Two models that share exactly the base's neurons: nothing is left to overlap."""
        common = torch.zeros(SHAPE).double()
        common[0, :9] = 10
        rng = np.random.default_rng(0)
        own = torch.from_numpy(rng.random((2, *SHAPE)))
        own[0, 1], own[1, 2] = own[0, 1] + 5, own[1, 2] + 5
        scores = {
            n: scores_of_blocks((common + row).expand(N_BLOCKS, *SHAPE)) for n, row in zip("ab", own, strict=True)
        }
        base = scores_of_blocks(common.expand(N_BLOCKS, *SHAPE))
        assert jaccard_intervals(scores, fraction=0.1)["a", "b"][0] > 0.3
        # 18 neurons each: 9 the base's; the base's other 9 are the first by place, where neither model has its own.
        assert jaccard_intervals(scores, fraction=0.1, base=base)["a", "b"] == pytest.approx((0, 0))

    def test_the_index_follows_the_ranking_within_layers(self):
        """Signal in one layer only, shared: jointly the sets coincide, layer by layer a third of them does."""
        rng = np.random.default_rng(0)
        common = torch.zeros(SHAPE).double()
        common[2] = 100 + torch.rand(60).double() * 10
        noise = torch.from_numpy(rng.random((2, *SHAPE)))
        noise[:, 2] = 0
        scores = {
            n: scores_of_blocks((common + row).expand(N_BLOCKS, *SHAPE)) for n, row in zip("ab", noise, strict=True)
        }
        assert jaccard_intervals(scores, fraction=0.1)["a", "b"] == pytest.approx((1, 1))
        tops = [value.top(0.1, rank_within="layer") for value in scores.values()]
        expected = Overlap.of(*tops).jaccard
        assert expected < 0.6
        assert jaccard_intervals(scores, fraction=0.1, rank_within="layer")["a", "b"] == pytest.approx(
            (expected, expected)
        )

    def test_the_published_rule_takes_ties_and_one_block_has_no_interval(self):
        """Ties: the percentile takes them all, in every resample. All prompts in one block: nothing is known."""
        tied = torch.zeros(SHAPE).double()
        tied[0, :5] = 1.0
        scores = {name: scores_of_blocks(tied.expand(N_BLOCKS, *SHAPE)) for name in "ab"}
        assert jaccard_intervals(scores, fraction=0.1, cut_rule="percentile")["a", "b"] == pytest.approx((1, 1))
        only = scores_of_blocks(torch.rand(N_BLOCKS, *SHAPE).double())
        without = only.without_block.clone()
        without[3] = torch.nan
        alone = NeuronScores(only.values, only.stderr, only.provenance, without)
        assert np.isnan(jaccard_intervals({"a": only, "b": alone}, fraction=0.1)["a", "b"]).all()

    def test_the_seed_decides(self):
        rng = np.random.default_rng(0)
        scores = {name: scores_of_blocks(torch.from_numpy(rng.normal(size=(N_BLOCKS, *SHAPE)))) for name in "abc"}
        first = jaccard_intervals(scores, fraction=0.1)
        assert first == jaccard_intervals(scores, fraction=0.1)
        assert first != jaccard_intervals(scores, fraction=0.1, seed=1)
        assert list(first) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_expected_overlap_is_scipys_hypergeometric():
    a, b = crowded(0), crowded(1)
    total, hits = a.mask.numel(), np.arange(min(len(a), len(b)) + 1)
    law = stats.hypergeom(total, len(a), len(b))
    expected = (law.pmf(hits) * hits / (len(a) + len(b) - hits)).sum()
    assert Overlap.of(a, b).expected_jaccard == pytest.approx(expected)
