"""Replication probabilities against what new prompts and new seeds do, in simulations whose truth is known."""

import numpy as np
import pytest
import torch
from drawn_scores import provenance, scores_of

from rmtension import NeuronScores
from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning
from rmtension.neurons import replication_across_seeds, replication_probability

SHAPE = (4, 500)
N_BLOCKS = 32


def draw_scores(truth, noise, seed, common=0.0, shape=SHAPE, **changes):
    """Scores of 32 blocks of prompts, whose means have the standard deviation `noise` around the truth.

    With `common`, the scores of each block are multiplied by a factor of its own, whose logarithm has that deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = truth + noise * N_BLOCKS**0.5 * torch.randn(N_BLOCKS, *shape, generator=generator, dtype=torch.float64)
    if common:
        blocks = blocks * torch.exp(common * torch.randn(N_BLOCKS, 1, 1, generator=generator, dtype=torch.float64))
    without = (blocks.sum(0) - blocks) / (N_BLOCKS - 1)
    values = blocks.mean(0)
    return NeuronScores(values, torch.ones_like(values), provenance(sign=1, **changes), without)


def draw_truth(seed):
    """Heavy tails, as scores of neurons have: most are near 0, a few are large."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_t(2, size=SHAPE)) * 0.1


@pytest.mark.parametrize(
    ("rank_by", "common"),
    [("magnitude", 0.0), ("supports", 0.0), ("opposes", 0.0), ("magnitude", 0.7), ("supports", 0.7)],
)
def test_probabilities_are_those_of_new_prompts(rank_by, common):
    """Over several draws, in every class of predicted probability the share that comes back is about as predicted.

    Also if some prompts have larger scores of all neurons than others, which changes no ranks. Negative control: being
    in the first top set, as a probability of 0 or 1, is worse by the Brier score.
    """
    predicted, came_back, naive = [], [], []
    noise = 0.02 + 0.2 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if common:
        noise = noise / 4
    for seed in range(6):
        truth = draw_truth(seed)
        first, second = (draw_scores(truth, noise, 2 * seed + half, common) for half in (0, 1))
        predicted.append(replication_probability(first, 0.1, rank_by=rank_by).flatten())
        came_back.append(second.top(0.1, rank_by=rank_by).mask.flatten())
        naive.append(first.top(0.1, rank_by=rank_by).mask.flatten())
    p, hit = torch.cat(predicted).numpy(), torch.cat(came_back).numpy().astype(float)
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.01)):
        chosen = (p >= low) & (p < high)
        # Three standard errors of a share of this many neurons, and .02 for an imperfect prior.
        room = 0.02 + 3 * (0.25 / chosen.sum()) ** 0.5
        assert chosen.sum() > 20, (low, high)
        assert abs(p[chosen].mean() - hit[chosen].mean()) < room, (low, high)
    brier = ((p - hit) ** 2).mean()
    assert brier < 0.8 * ((torch.cat(naive).numpy() - hit) ** 2).mean()


def test_the_neuron_at_the_cut_is_not_certain():
    """Of a few dozen neurons, the last one of the set is often the same in every part of the prompts."""
    predicted, came_back = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        truth = torch.from_numpy(generator.standard_t(2, size=(4, 12))) * 0.1
        first, second = (draw_scores(truth, 0.02, 2 * seed + half, shape=(4, 12)) for half in (0, 1))
        order = first.values.abs().flatten().argsort(descending=True)
        predicted.append(float(replication_probability(first, k=4).flatten()[order[3]]))
        came_back.append(bool(second.top(k=4).mask.flatten()[order[3]]))
    assert max(predicted) < 1
    # Three standard errors of a share of 200.
    assert abs(np.mean(predicted) - np.mean(came_back)) < 0.11


def test_a_cut_near_zero_is_a_cut():
    """By support, almost half of the neurons are above it: those far above come back for certain."""
    truth = draw_truth(3)
    first, second = (draw_scores(truth, 0.02, half) for half in (0, 1))
    probability = replication_probability(first, 0.48, rank_by="supports")
    known, hit = (scores.top(0.48, rank_by="supports").mask for scores in (first, second))
    assert float(probability[first.values > 0.3].min()) > 0.99
    assert float(((probability - hit.double()) ** 2).mean()) < 0.8 * float((known != hit).double().mean())
    assert torch.equal(replication_probability(first, 1.0), torch.ones(SHAPE, dtype=torch.float64))


def test_scores_without_noise_come_back_for_certain():
    scores = draw_scores(draw_truth(0), 0.0, 1)
    probability = replication_probability(scores, k=50)
    assert torch.equal(probability, scores.top(k=50).mask.double())


def test_probabilities_are_those_of_a_new_seed():
    """Seeds share a part of their scores; the fourth seed is held out. Prompts alone would promise far too much."""
    predicted, came_back, within = [], [], []
    for world in range(5):
        common = draw_truth(world)
        own = [common + draw_truth(100 + 10 * world + seed) for seed in range(4)]
        scores = [draw_scores(values, 0.005, 1000 + 10 * world + seed) for seed, values in enumerate(own)]
        predicted.append(replication_across_seeds(scores[:3], 0.1).flatten())
        within.append(replication_probability(scores[0], 0.1).flatten())
        came_back.append(scores[3].top(0.1).mask.flatten())
    p, hit, inside = (torch.cat(values).double().numpy() for values in (predicted, came_back, within))
    for low, high in ((0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.01)):
        chosen = (p >= low) & (p < high)
        assert chosen.sum() > 50
        assert abs(p[chosen].mean() - hit[chosen].mean()) < 0.05 + 3 * (0.25 / chosen.sum()) ** 0.5, (low, high)
    assert ((p - hit) ** 2).mean() < 0.8 * ((inside - hit) ** 2).mean()


def test_seeds_that_share_nothing_promise_the_base_rate():
    scores = [draw_scores(draw_truth(seed), 0.01, seed) for seed in range(3)]
    probability = replication_across_seeds(scores, 0.1)
    assert float(probability.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(probability.quantile(0.95)) < 0.3


def test_neurons_of_equal_score_have_equal_probability():
    """As many frequencies are exactly 1: the cut takes some of them, in the order of their numbers, in every seed."""
    values = torch.full(SHAPE, 0.1, dtype=torch.float64)
    values.view(-1)[:20] = 1.0
    seeds = [draw_scores(values, 0.0, seed) for seed in range(3)]
    with pytest.warns(RMTensionWarning, match="tie"):
        probability = replication_across_seeds(seeds, k=5).flatten()
    assert probability[:20].numpy() == pytest.approx(np.full(20, 5 / 20))
    assert not probability[20:].any()


def test_wrong_arguments():
    scores = draw_scores(draw_truth(0), 0.1, 1)
    with pytest.raises(OptionError, match="keep no blocks"):
        replication_probability(scores_of(torch.rand(SHAPE)), 0.1)
    with pytest.raises(OptionError, match="at least two seeds"):
        replication_across_seeds([scores], 0.1)
    with pytest.raises(ProvenanceError, match="site differs"):
        replication_across_seeds([scores, draw_scores(draw_truth(0), 0.1, 1, site="attn_head")], 0.1)
    with pytest.raises(ProvenanceError, match="graddrop differs"):
        replication_across_seeds([scores, draw_scores(draw_truth(0), 0.1, 1, graddrop=True)], 0.1)
    with pytest.raises(OptionError, match="exactly one of fraction and k"):
        replication_probability(scores)
