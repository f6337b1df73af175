"""Statistics, scores and ablations against plain PyTorch hooks and autograd on transformers' model, in float64.

Tolerance 1e-9: float64 leaves 1e-15 relative; sums over some hundred tokens and three layers of curvature cost a few
digits, and RMS norms of the Llama family compute in float32 whatever the model's dtype (deterministic, so equal in both
runs as long as its inputs round alike).
"""

import pytest
import torch
from replaced import ALPHA, replacement_of, targets_of
from tiny_models import close_to, grid

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet

CLOSE = {"atol": 1e-9, "rtol": 0.0}
SITES = ("mlp", "attn_head")
POSITIONS = ("all", "response", "last")


def texts_of(reference, pairs):
    return [reference.tokens(pair, side) for pair in pairs for side in ("chosen", "rejected")]


def some_neurons(head, site, seed=0):
    """A third of all neurons, with one layer left out."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=generator) < 1 / 3
    mask[1] = False
    mask[0, 0] = True
    return NeuronSet(mask, site, head.architecture)


@pytest.mark.parametrize("site", grid(SITES))
@pytest.mark.parametrize("positions", grid(POSITIONS))
def test_statistics_equal_the_reference(both, pairs, site, positions):
    head, reference = both
    tokens = []
    for ids, n_prompt in texts_of(reference, pairs):
        chosen = reference.selected(ids.shape[1], n_prompt, positions)
        tokens.append(reference.activations(site, ids)[:, chosen])
    channels = torch.cat(tokens, dim=1)
    neurons = reference.per_neuron(channels, site, "norm")
    statistics = ActivationCollector(head, site=site, positions=positions).collect(pairs)
    assert statistics.n_tokens == channels.shape[1]
    assert torch.allclose(statistics.channel_mean, channels.mean(1), **CLOSE)
    assert torch.allclose(statistics.mean, neurons.mean(1), **CLOSE)
    assert torch.allclose(statistics.abs_mean, neurons.abs().mean(1), **CLOSE)
    assert torch.allclose(statistics.rms, neurons.square().mean(1).sqrt(), **CLOSE)
    assert torch.allclose(statistics.frequency, (neurons > 0).double().mean(1), **CLOSE)
    # Negative control: one token less is seen by the same check.
    assert not torch.allclose(statistics.channel_mean, channels[:, 1:].mean(1), **CLOSE)


@pytest.mark.parametrize("site", grid(SITES))
@pytest.mark.parametrize("positions", grid(POSITIONS))
@pytest.mark.parametrize("aggregate", ["signed", "absolute"])
def test_mean_differences_equal_the_reference(both, pairs, site, positions, aggregate):
    head, reference = both
    means = []
    for ids, n_prompt in texts_of(reference, pairs):
        chosen = reference.selected(ids.shape[1], n_prompt, positions)
        means.append(reference.per_neuron(reference.activations(site, ids), site, "norm")[:, chosen].mean(1))
    check(head, pairs, means, "mean_difference", site, positions, aggregate)


@pytest.mark.parametrize("site", grid(SITES))
@pytest.mark.parametrize("positions", grid(POSITIONS))
@pytest.mark.parametrize("aggregate", ["signed", "absolute"])
def test_gradient_x_activation_equals_autograd(both, pairs, site, positions, aggregate):
    head, reference = both
    sums = []
    for ids, n_prompt in texts_of(reference, pairs):
        values, slopes = reference.activations(site, ids, gradients=True)
        chosen = reference.selected(ids.shape[1], n_prompt, positions)
        sums.append(reference.per_neuron((values * slopes)[:, chosen].sum(1), site, "sum"))
    check(head, pairs, sums, "gradient_x_activation", site, positions, aggregate)


def check(head, pairs, per_text, method, site, positions, aggregate):
    """Mean over pairs and its standard error; and swapping every pair flips the signed scores exactly."""
    per_pair = torch.stack(per_text[::2]) - torch.stack(per_text[1::2])
    per_pair = per_pair.abs() if aggregate == "absolute" else per_pair
    attribution = NeuronAttribution(head, method=method, site=site, positions=positions, aggregate=aggregate)
    scores = attribution.score(pairs)
    assert scores.n == len(pairs)
    assert float(per_pair.abs().max()) > 1e-4, "the scores must not vanish for this test to mean anything"
    assert torch.allclose(scores.values, per_pair.mean(0), **close_to(head))
    assert torch.allclose(scores.stderr, per_pair.std(0) / len(pairs) ** 0.5, **close_to(head))
    swapped = attribution.score(pairs.swapped()).values
    assert torch.allclose(swapped, scores.values if aggregate == "absolute" else -scores.values, **close_to(head))


@pytest.mark.parametrize("site", grid(SITES))
@pytest.mark.parametrize("positions", grid(POSITIONS))
@pytest.mark.parametrize("kind", ["zero", "scale", "mean", "resample"])
def test_ablated_rewards_equal_the_reference(both, pairs, site, positions, kind):
    head, reference = both
    neurons = some_neurons(head, site)
    per_neuron = head.n_channels(site) // head.n_neurons(site)
    columns = neurons.mask.repeat_interleave(per_neuron, dim=1)
    replacement = replacement_of(head, site, pairs, kind)
    targets = targets_of(head, reference, site, pairs, positions, replacement)
    with AblationContext(head, neurons, replacement, positions=positions):
        scored = head.score_pairs(pairs)
    expected = []
    for row, pair in enumerate(pairs):
        for number, side in enumerate(("chosen", "rejected")):
            ids, n_prompt = reference.tokens(pair, side)
            selected = reference.selected(ids.shape[1], n_prompt, positions)

            def replace(layer, activation, selected=selected, target=targets[row][number]):
                if not columns[layer].any():
                    return None
                wanted = torch.zeros(activation.shape, dtype=torch.bool)
                wanted[0, selected] = columns[layer]
                # What is scaled is the activation that the ablation of the layers below has left.
                return torch.where(wanted, ALPHA * activation if kind == "scale" else target[layer], activation)

            with reference.hooked(site, replace), torch.no_grad():
                expected.append(reference.reward(ids))
    expected = torch.stack(expected)
    assert torch.allclose(scored.chosen, expected[::2], **CLOSE)
    assert torch.allclose(scored.rejected, expected[1::2], **CLOSE)
    # Negative control: the ablation changes rewards by far more than the tolerance.
    untouched = head.score_pairs(pairs)
    assert float((untouched.chosen - scored.chosen).abs().max()) > 1e-4
