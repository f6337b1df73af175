"""Gains of neurons: their slopes against differences, the fit against what the edited model does, and controls."""

import pytest
import torch

from rmtension import AblationContext, NeuronSet, Scale
from rmtension.repair._choice import correct
from rmtension.repair._gains import GainFitter, GainOptions, fit_gains


@pytest.fixture(scope="module")
def fitter(damaged, pairs):
    return GainFitter(damaged, pairs, progress=False)


def test_slopes_of_gains_are_differences_of_margins(exact, pairs):
    """Around gains other than 1, where the contribution of a scaled neuron has to be divided by its gain."""
    few = {name: part[:5] for name, part in pairs.fit.items()}
    gains = torch.ones(exact.n_layers, exact.n_neurons("mlp"), dtype=torch.float64)
    places = [(0, 1), (1, 7), (2, 3)]
    for place, gain in zip(places, (0.5, 1.5, 0.8), strict=True):
        gains[place] = gain
    neurons = NeuronSet(gains != 1, "mlp", exact.architecture)
    fitter = GainFitter(exact, pairs, progress=False)
    with AblationContext(exact, neurons, Scale(gains)):
        slopes = {name: fitter._contributions(part) for name, part in few.items()}
    for name, part in few.items():
        for place in places:
            moved = []
            for sign in (1, -1):
                other = gains.clone()
                other[place] += sign * 1e-4
                with AblationContext(exact, neurons, Scale(other)):
                    moved.append(exact.score_pairs(part).margin.double())
            expected = (moved[0] - moved[1]) / 2e-4
            found = slopes[name][:, place[0], place[1]].double() / gains[place]
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_the_planted_neurons_are_changed_first(fitter, organism):
    first = fitter.ranking(0.7).abs().flatten().argsort(descending=True)[:12].tolist()
    planted = organism.truth["harmless"].mask.flatten()
    assert planted.sum() == 4
    assert planted[first].sum() == 4, "of 256 neurons"


def test_gains_mend_the_model_that_is_written(damaged, pairs):
    """On test pairs; random neurons, fitted by the same procedure, mend less."""
    edit, path = fit_gains(damaged, pairs, counts=(1, 4, 12), shares=(0.5,), progress=False)
    gains = path["harmless_change"].tolist()
    assert gains == sorted(gains), "more neurons buy more"
    assert edit.n_numbers == 12
    edited = edit.apply(damaged)
    before, after = (model.score_pairs(pairs.test["harmless"]).accuracy() for model in (damaged, edited))
    assert before < 0.3
    assert after > 0.9
    assert edited.score_pairs(pairs.test["helpful"]).accuracy() > 0.97
    # The development margins that the fit reports are those of the written model.
    real = edited.score_pairs(pairs.development["harmless"]).margin.double()
    assert float(correct(real).mean()) == pytest.approx(path["harmless_accuracy"].iloc[-1], abs=1e-12)


@pytest.mark.grid
def test_random_neurons_mend_less(fitter, damaged, pairs):
    top = torch.zeros(damaged.n_layers * damaged.n_neurons("mlp"), dtype=torch.bool)
    top[fitter.ranking(0.5).abs().flatten().argsort(descending=True)[:8]] = True
    attributed = NeuronSet(top.view(damaged.n_layers, -1), "mlp", damaged.architecture)
    mended = float(correct(fitter.fit(attributed).margins["harmless"]).mean())
    for seed in range(3):
        random = attributed.matched_random(seed=seed, match="layer")
        assert float(correct(fitter.fit(random).margins["harmless"]).mean()) < mended - 0.2


def test_gains_stay_within_the_bound_and_lower_the_loss(fitter, damaged):
    everything = ~NeuronSet.from_indices(
        [], shape=(damaged.n_layers, damaged.n_neurons("mlp")), site="mlp", architecture=damaged.architecture
    )
    options = GainOptions(bound=0.2)
    fitted = fitter.fit(everything, options)
    assert (fitted.gains - 1).abs().max() <= 0.2 + 1e-12
    assert fitter._loss(fitted.margins, options) < fitter._loss(fitter.before, options)
    # A first step alone is what SciPy finds for the linear margins; test_solvers.py proves that solver.
    assert fitted.n_steps >= 1
