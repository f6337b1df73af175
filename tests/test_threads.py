"""Numbers of threads: equal bits at one number, 1e-6 of the largest across them."""

import pytest
import torch

from rmtension import ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects

ACROSS = 1e-6


def some_neurons(head):
    """Every eighth of each layer."""
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[:, ::8] = True
    return NeuronSet(mask, "mlp", head.architecture)


def computed(head, pairs, threads):
    """Rewards, statistics and scores, each with the numbers that it is measured by: its largest is the scale."""
    torch.set_num_threads(threads)
    try:
        scored, statistics = head.score_pairs(pairs), ActivationCollector(head).collect(pairs)
        gradients = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
        difference = NeuronAttribution(head, method="mean_difference").score(pairs)
        effects = single_neuron_effects(head, pairs[:4], neurons=some_neurons(head))
    finally:
        torch.set_num_threads(1)
    return {
        "chosen": (scored.chosen, scored.chosen),
        "margin": (scored.margin, scored.chosen),  # a difference of rewards, with their rounding
        "mean": (statistics.mean, statistics.rms),
        "rms": (statistics.rms, statistics.rms),
        "mean_difference": (difference.values, statistics.rms),
        "gradient_x_activation": (gradients.values, gradients.values),
        "stderr": (gradients.stderr, gradients.values),
        "effects": (effects.values.nan_to_num(), scored.chosen),
    }


def differences(first, other):
    """Name -> the largest difference, in units of the largest number."""
    return {
        name: float((values.double() - other[name][0].double()).abs().max() / scale.abs().max())
        for name, (values, scale) in first.items()
    }


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt2", torch.float32), pytest.param("llama", torch.float64, marks=pytest.mark.grid)]
)
def test_results_agree_across_numbers_of_threads(checkpoints, pairs, family, dtype):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=dtype)
    first, same, two = (computed(head, pairs, threads) for threads in (1, 1, 2))
    for name, (values, _) in first.items():
        assert torch.equal(values, same[name][0]), f"{name}: other bits at the same number of threads"
    gaps = differences(first, two)
    assert max(gaps.values()) <= ACROSS, gaps
    # Negative control: half precision is not within the bound.
    rough = computed(RewardHead.from_pretrained(checkpoints[family], dtype=torch.bfloat16), pairs, 1)
    assert min(differences(first, rough).values()) > ACROSS
