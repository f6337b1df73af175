"""Medians against NumPy and plain hooks; optimal constants against a grid search with transformers and plain hooks."""

import numpy as np
import pytest
import torch
from model_states import snapshot
from reference import Reference
from tiny_models import grid, make_pairs

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, RewardHead
from rmtension.errors import DataError, OptionError, ProvenanceError, StorageError
from rmtension.interventions import Median, Optimal
from rmtension.neurons import NeuronSet


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(12)


@pytest.fixture(scope="module")
def head(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(checkpoints):
    return Reference(checkpoints["gpt2"])


@pytest.fixture(scope="module")
def means(head, pairs):
    return ActivationCollector(head).collect(pairs)


@pytest.fixture(scope="module")
def strong(head, pairs):
    """The neuron with the largest first-order effect."""
    return NeuronAttribution(head, "attribution_patching", aggregate="absolute").score(pairs).top(k=1)


@pytest.mark.parametrize("site", grid(["mlp", "attn_head"]))
def test_medians_are_those_of_the_sample(head, pairs, site):
    sample = ActivationCollector(head, site=site).sample(pairs, n=33)
    median = Median(sample)
    for layer in range(head.n_layers):
        ordered = np.sort(sample.values[:, layer].numpy(), axis=0)
        assert np.array_equal(median.constant(layer).numpy(), ordered[16]), "33 tokens have one in the middle"


def test_ablation_to_medians_equals_plain_hooks(head, reference, pairs):
    sample = ActivationCollector(head).sample(pairs, n=50)
    neurons = NeuronAttribution(head, "mean_difference").score(pairs).top(0.2)
    values = torch.stack([Median(sample).constant(layer) for layer in range(head.n_layers)])
    with AblationContext(head, neurons, Median(sample)):
        inside = head.score_pairs(pairs).margin
    assert torch.allclose(inside, reference.margins(pairs, neurons.mask, values), atol=1e-9, rtol=0)
    permanent = head.with_ablation(neurons, Median(sample)).score_pairs(pairs).margin
    assert torch.allclose(permanent, inside, atol=1e-9, rtol=0)
    assert Median(sample).key != Median(ActivationCollector(head).sample(pairs, n=50, seed=1)).key


def losses(reference, pairs, neurons, means, constants):
    """The mean squared change of the margins for several constants of the only neuron of a set, by plain hooks."""
    nothing = torch.zeros_like(neurons.mask)
    wanted = reference.margins(pairs, nothing, means.mean)
    return [
        float((reference.margins(pairs, neurons.mask, torch.full_like(means.mean, value)) - wanted).square().mean())
        for value in constants
    ]


def test_the_constant_of_one_neuron_is_the_best_of_a_grid(head, reference, pairs, means):
    scores = NeuronAttribution(head, "attribution_patching", aggregate="absolute").score(pairs)
    gains = []
    for rank in range(3):
        one = scores.top(k=rank + 1) - scores.top(k=rank) if rank else scores.top(k=1)
        ((layer, neuron),) = one
        optimal = Optimal.fit(head, pairs, one, Mean(means), steps=60)
        mean, spread = float(means.mean[layer, neuron]), float(means.rms[layer, neuron])
        of_grid = losses(reference, pairs, one, means, mean + spread * np.linspace(-2, 2, 11))
        of_mean, of_found = losses(reference, pairs, one, means, [mean, float(optimal.constants[layer, neuron])])
        assert (optimal.loss_of_mean, optimal.loss) == pytest.approx((of_mean, of_found), rel=1e-6)
        assert of_found <= 1.02 * min(of_grid)
        gains.append(of_found / of_mean)
    assert min(gains) < 0.95, "for some of these neurons the mean is not the best constant"


def test_many_neurons_lose_less_together(head, pairs, means):
    neurons = NeuronAttribution(head, "attribution_patching").score(pairs).top(0.3)
    optimal = Optimal.fit(head, pairs, neurons, Mean(means), steps=60)
    assert optimal.loss < 0.8 * optimal.loss_of_mean
    before = head.score_pairs(pairs).margin
    changes = {}
    for replacement in (optimal, Mean(means)):
        with AblationContext(head, neurons, replacement):
            changes[replacement.name] = float((head.score_pairs(pairs).margin - before).square().mean())
    assert changes == pytest.approx({"optimal": optimal.loss, "mean": optimal.loss_of_mean}, rel=1e-6)
    outside = ~neurons.mask
    assert torch.equal(optimal.constants[outside], means.channel_mean.double()[outside]), "only the set's move"


def test_the_model_is_unchanged_and_results_repeat(head, pairs, means, strong, tmp_path):
    before = snapshot(head)
    first, second = (Optimal.fit(head, pairs, strong, Mean(means), steps=5, seed=1) for _ in range(2))
    assert snapshot(head) == before
    assert torch.equal(first.constants, second.constants)
    first.save(tmp_path / "optimal.safetensors")
    loaded = Optimal.load(tmp_path / "optimal.safetensors")
    assert torch.equal(loaded.constants, first.constants)
    assert (loaded.neurons, loaded.loss, loaded.key) == (first.neurons, first.loss, first.key)
    means.save(tmp_path / "means.safetensors")
    with pytest.raises(StorageError, match="Optimal"):
        Optimal.load(tmp_path / "means.safetensors")


def test_wrong_arguments(head, pairs, means, strong, checkpoints):
    with pytest.raises(OptionError, match="steps: expected a whole number"):
        Optimal.fit(head, pairs, strong, Mean(means), steps=0)
    with pytest.raises(OptionError, match="got an empty set"):
        Optimal.fit(head, pairs, strong - strong, Mean(means))
    with pytest.raises(DataError, match="at least one preference pair"):
        Optimal.fit(head, pairs[:0], strong, Mean(means))
    other = RewardHead.from_pretrained(checkpoints["llama"], dtype=torch.float64)
    with pytest.raises(ProvenanceError):
        Optimal.fit(other, pairs, strong, Mean(means))
    elsewhere = NeuronSet(torch.ones(3, 4, dtype=torch.bool), "attn_head", head.architecture)
    with pytest.raises(ProvenanceError, match="site"):
        Optimal.fit(head, pairs, elsewhere, Mean(means))
