"""How much of a top set comes back with other prompts: halves and new prompts of drawn scores.

The whole table of a study is in `test_study.py`.
"""

import numpy as np
import pytest
import torch
from drawn_scores import provenance

from rmtension import NeuronScores, StudyOptions
from rmtension.neurons import replication_probability
from rmtension.neurons._neuron_scores import N_BLOCKS
from rmtension.study._stability import _other_prompts


def drawn(noise, seed=0):
    """Means over 64 prompts, two in each block: a signal in every third neuron, and noise."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.zeros(200).double()
    signal[::3] = 1 + torch.rand(67, generator=generator).double()
    by_block = signal + noise * torch.randn(N_BLOCKS, 200, generator=generator).double()
    without = (by_block.sum(0) - by_block) / (N_BLOCKS - 1)
    scores = NeuronScores(by_block.mean(0)[None], torch.ones(1, 200), provenance(), without_block=without[:, None, :])
    return by_block, scores


def rows_of(scores, **changes):
    options = StudyOptions(fraction=0.2, **changes)
    return list(_other_prompts(scores, scores.top(0.2, rank_within=options.rank_within), options))


class TestPrompts:
    def test_halves_are_means_over_half_of_the_blocks(self):
        by_block, scores = drawn(noise=3.0)
        halves, expected = rows_of(scores)
        generator = np.random.default_rng(0)
        shares = []
        for _ in range(20):
            order = generator.permutation(N_BLOCKS)
            tops = [
                set(by_block[order[part]].mean(0).abs().argsort(descending=True, stable=True)[:40].tolist())
                for part in (slice(None, N_BLOCKS // 2), slice(N_BLOCKS // 2, None))
            ]
            shares.append(len(tops[0] & tops[1]) / 40)
        assert halves["share"] == pytest.approx(np.mean(shares))
        assert (halves["low"], halves["high"]) == (pytest.approx(min(shares)), pytest.approx(max(shares)))
        top = scores.top(0.2)
        assert expected["share"] == pytest.approx(float(replication_probability(scores, 0.2)[top.mask].mean()))
        assert halves["chance"] == expected["chance"] == pytest.approx(0.2)

    def test_noise_lowers_the_share(self):
        shares = [rows_of(drawn(noise)[1])[0]["share"] for noise in (0.01, 3.0, 300.0)]
        assert shares[0] > 0.95 > shares[1] > 0.3 > shares[2]

    def test_expected_share_is_that_of_new_prompts(self):
        """Mean over 20 draws of the noise, of what comes back and what was expected."""
        found = []
        for seed in range(20):
            _, scores = drawn(noise=1.0, seed=seed)
            # The signal is the same if the noise is drawn by another seed after it.
            generator = torch.Generator().manual_seed(seed)
            signal = torch.zeros(200).double()
            signal[::3] = 1 + torch.rand(67, generator=generator).double()
            again = (
                signal + torch.randn(200, generator=torch.Generator().manual_seed(1000 + seed)) / N_BLOCKS**0.5
            ).abs()
            top = scores.top(0.2).mask.flatten()
            came_back = float(top[again.argsort(descending=True)[:40]].sum()) / 40
            found.append((came_back, rows_of(scores)[1]["share"]))
        came_back, expected = np.mean(found, axis=0)
        assert came_back == pytest.approx(expected, abs=0.05)
        assert 0.4 < came_back < 0.95

    def test_layers_by_themselves_have_no_expected_share(self):
        _, scores = drawn(noise=1.0)
        assert [row["changed"] for row in rows_of(scores, rank_within="layer")] == ["half of the prompts"]

    def test_prompts_of_one_block_say_nothing_about_others(self):
        _, scores = drawn(noise=1.0)
        alone = NeuronScores(scores.values, scores.stderr, scores.provenance, torch.full((N_BLOCKS, 1, 200), torch.nan))
        assert list(_other_prompts(alone, scores.top(0.2), StudyOptions())) == []
