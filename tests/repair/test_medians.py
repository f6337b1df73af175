"""Neurons that follow a surface feature, set to their medians: against SciPy and an ablation by constants."""

import pytest
import torch
from scipy.stats import spearmanr

from rmtension import AblationContext, ActivationCollector, NeuronSet
from rmtension.errors import DataError
from rmtension.repair._edit import Edit
from rmtension.repair._medians import set_to_medians, spearman


def test_rank_correlations_are_those_of_scipy():
    draw = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 30, 3, generator=draw, dtype=torch.float64).round(decimals=1)
    activations[1, :, 2] = 1.0
    feature = torch.randint(0, 6, (30,), generator=draw).double()
    found = spearman(activations, feature)
    for layer in range(2):
        for neuron in range(3):
            if (layer, neuron) == (1, 2):
                assert found[layer, neuron] == 0
            else:
                expected = spearmanr(activations[layer, :, neuron], feature).statistic
                assert float(found[layer, neuron]) == pytest.approx(expected, abs=1e-12)


def test_constants_are_an_ablation_by_those_values(head, pairs):
    """A constant replacement in an `AblationContext`, against the bias of the edited weights."""
    few = pairs.test["helpful"][:6]
    means = ActivationCollector(head).collect(few)
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[0, 3:6], mask[1, 1] = True, True
    neurons = NeuronSet(mask, "mlp", head.architecture)
    constants = torch.where(mask, means.mean.double(), 0.0)
    edit = Edit("medians", head.fingerprint, head.architecture, gains=(~mask).double(), constants=constants)
    from rmtension import Mean

    with AblationContext(head, neurons, Mean(means)):
        expected = head.score_pairs(few)
    edited = edit.apply(head).score_pairs(few)
    assert torch.allclose(edited.chosen, expected.chosen, rtol=1e-5, atol=1e-5)
    assert (edited.chosen - head.score_pairs(few).chosen).abs().max() > 1e-3
    assert edit.n_numbers == 2 * len(neurons)


def test_medians_are_tried_from_few_to_many(damaged, pairs):
    edit, table = set_to_medians(damaged, pairs, fractions=(0.02, 0.1), progress=False)
    assert table["numbers"].tolist() == [4, 12] or table["numbers"].is_monotonic_increasing
    assert edit is None or edit.constants is not None
    with pytest.raises(DataError, match="feature: all responses of the fit pairs have equally much of it"):
        set_to_medians(damaged, pairs, lambda pair, side: 1.0, progress=False)
