"""Correlations of activations: numpy.corrcoef on hooked activations of transformers, packed and unpacked batches."""

import numpy as np
import pytest
import torch
from reference import Reference
from tiny_models import grid, make_pairs

from rmtension import NeuronSet, PreferencePairs, RewardHead
from rmtension.attribution import neuron_dashboards
from rmtension.attribution._correlated import CorrelationSums, correlations, most_correlated
from rmtension.passes import run_pass

CASES = grid([("gpt2", "mlp", "prompt"), ("llama", "mlp", "none"), ("gpt2", "attn_head", "prompt")], unpack=True)


def expected(reference, site, pairs, wanted):
    """[wanted, layer, neuron], over all tokens of both texts of every pair."""
    columns = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ids, _ = reference.tokens(pair, side)
            columns.append(reference.per_neuron(reference.activations(site, ids), site, "norm"))
    values = torch.cat(columns, dim=1).numpy()
    layers, n_tokens, neurons = values.shape
    flat = values.transpose(0, 2, 1).reshape(layers * neurons, n_tokens)
    matrix = np.corrcoef(flat)
    rows = [layer * neurons + neuron for layer, neuron in wanted]
    return matrix[rows].reshape(len(rows), layers, neurons), n_tokens


@pytest.mark.parametrize(("family", "site", "sharing"), CASES)
def test_correlations_are_numpys(family, site, sharing, checkpoints):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    # Two responses to one prompt: a packed batch has its tokens once, and they belong to both texts.
    pairs = make_pairs(6)
    wanted = [(0, 1), (1, 3), (2, 2)]
    shape = (head.n_layers, head.n_neurons(site))
    neurons = NeuronSet.from_indices(wanted, shape=shape, site=site, architecture=head.architecture)
    statistic = CorrelationSums(head, neurons)
    statistic.sharing = sharing
    found = correlations(neurons, *run_pass(head, pairs, statistic, progress=False))
    reference = Reference(checkpoints[family])
    truth, n_tokens = expected(reference, site, pairs, wanted)
    assert int(statistic.state["n_tokens"]) == n_tokens
    np.testing.assert_allclose(found.numpy(), truth, atol=1e-6 if family == "llama" else 1e-10)
    # Negative control: without the rejected responses, the numbers differ.
    other, _ = expected(reference, site, [pair.swapped() for pair in pairs[:3]], wanted)
    assert np.abs(found.numpy() - other).max() > 0.01


@pytest.mark.parametrize("family", ["gpt2"])
def test_packed_and_unpacked_batches_agree(family, checkpoints):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    pairs = make_pairs(12)
    neurons = NeuronSet.from_indices([(1, 3)], shape=(3, 64), site="mlp", architecture=head.architecture)
    sums = []
    for sharing in ("prompt", "none"):
        statistic = CorrelationSums(head, neurons)
        statistic.sharing = sharing
        sums.append(run_pass(head, pairs, statistic, progress=False))
    assert torch.equal(sums[0][1], sums[1][1])
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-9, atol=1e-9)


def test_a_constant_neuron_has_no_correlation_and_no_neuron_is_its_own():
    neurons = NeuronSet.from_indices([(0, 0), (0, 1)], shape=(1, 4), site="mlp", architecture="toy")
    # Activations of neuron 1 are 100 at every token.
    values = np.array([[1.0, 2.0, 4.0], [100.0, 100.0, 100.0], [-1.0, -2.0, -4.0], [1.0, 1.0, 0.0]])
    sums = np.stack([values.sum(1), (values**2).sum(1), values @ values[0], values @ values[1]])[:, None]
    found = correlations(neurons, torch.tensor(sums), torch.tensor(3))
    assert found[1].isnan().all()
    assert found[0, 0].tolist()[:3:2] == pytest.approx([1.0, -1.0])
    table = most_correlated(neurons, found, 5)
    assert table[["layer", "neuron", "other_layer", "other_neuron"]].to_numpy().tolist() == [[0, 0, 0, 2], [0, 0, 0, 3]]
    assert table["correlation"].tolist() == pytest.approx([-1, np.corrcoef(values[0], values[3])[0, 1]])


def test_dashboards_pool_the_tokens_of_all_groups(checkpoints):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    pairs = make_pairs(6)
    neurons = NeuronSet.from_indices([(1, 3)], shape=(3, 64), site="mlp", architecture=head.architecture)
    dashboards = neuron_dashboards(head, neurons, pairs, by="objective", n_examples=0, progress=False)
    truth, n_tokens = expected(Reference(checkpoints["gpt2"]), "mlp", pairs, [(1, 3)])
    assert dashboards.about["n_tokens"] == n_tokens
    rows = dashboards.of("correlated", 1, 3)
    assert len(rows) == 5
    sizes = np.abs(truth[0])
    sizes[1, 3] = -1
    order = [divmod(int(index), 64) for index in np.argsort(-sizes, axis=None)[:5]]
    assert list(zip(rows["other_layer"], rows["other_neuron"], strict=True)) == order
    assert rows["correlation"].tolist() == pytest.approx([truth[0][index] for index in order], abs=1e-9)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("objective", ["harmless", "helpful"]),
        (None, ["harmless", "helpful"]),
        (lambda pair: pair.chosen[0] + "layer" if len(pair.chosen) > 2 else "layer", None),
        (["layer", "neuron", "layer", "set", None, "neuron"], ["layer", "neuron", "set"]),
    ],
)
@pytest.mark.filterwarnings("ignore:by. 1 of 6 pairs have no label")
def test_groups_have_any_names_and_any_number(head, by, names):
    pairs = make_pairs(6)
    neurons = NeuronSet.from_indices([(1, 3)], shape=(3, 64), site="mlp", architecture=head.architecture)
    dashboards = neuron_dashboards(head, neurons, pairs, by=by, n_examples=1, progress=False)
    if names is not None:
        assert list(dashboards.groups) == names
    for name in dashboards.groups:
        assert f"{name}_effect" in dashboards.table
        assert name in dashboards._repr_html_()
    alone = PreferencePairs(
        [type(pair)(pair.prompt, pair.chosen, pair.rejected, objective="one", id=pair.id) for pair in pairs]
    )
    assert neuron_dashboards(head, neurons, alone, n_examples=0, progress=False).groups == ("all pairs",)
