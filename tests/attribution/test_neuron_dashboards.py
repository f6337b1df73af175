"""Dashboards of single neurons: every number against transformers with hooks, ablations one by one, and NumPy."""

import json

import numpy as np
import pytest
import torch
from reference import Reference
from scipy import stats
from tiny_models import FAMILIES, close_to, grid, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution import NeuronDashboards, neuron_dashboards
from rmtension.errors import OptionError, ProvenanceError, StorageError
from rmtension.neurons._neuron_scores import N_BLOCKS, block_of
from rmtension.passes import _pair_pass

NEURONS = {"mlp": [(0, 3), (0, 5), (2, 1)], "attn_head": [(0, 1), (2, 3)]}


@pytest.fixture(scope="module")
def pairs():
    return {name: make_pairs(24, seed=seed) for seed, name in enumerate(("helpful", "harmless"))}


def chosen(head, site):
    shape = (head.n_layers, head.n_neurons(site))
    return NeuronSet.from_indices(NEURONS[site], shape=shape, site=site, architecture=head.architecture)


@pytest.fixture(scope="module", params=grid([("gpt2", "mlp"), ("llama", "mlp"), ("gpt_neox", "attn_head")]))
def both(request, checkpoints, pairs):
    family, site = request.param
    assert family in FAMILIES
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    dashboards = neuron_dashboards(head, chosen(head, site), pairs, n_examples=3, positions="response")
    return dashboards, head, Reference(checkpoints[family])


def rows_of(dashboards, name):
    return dashboards.table[dashboards.table["set"] == name].set_index(["layer", "neuron"])


def test_scores_and_effects_are_those_of_attribution_and_ablation(both, pairs):
    dashboards, head, _ = both
    site = dashboards.about["site"]
    asked = rows_of(dashboards, "asked for")
    assert list(asked.index) == dashboards.neurons == NEURONS[site]
    for name, some in pairs.items():
        scores = NeuronAttribution(head, method="gradient_x_activation", site=site, positions="response").score(some)
        base = head.score_pairs(some).margin
        blocks = block_of(torch.tensor([text.key for text in head.encode(some).chosen])).numpy()
        shape = (head.n_layers, head.n_neurons(site))
        for index in dashboards.neurons:
            row = asked.loc[index]
            assert row[f"{name}_score"] == pytest.approx(float(scores.values[index]), abs=1e-9)
            assert row[f"{name}_score_stderr"] == pytest.approx(float(scores.stderr[index]), abs=1e-9)
            alone = NeuronSet.from_indices([index], shape=shape, site=site, architecture=head.architecture)
            with AblationContext(head, alone):
                changes = (head.score_pairs(some).margin - base).numpy()
            tolerance = close_to(head)["atol"]
            assert row[f"{name}_effect"] == pytest.approx(changes.mean(), abs=tolerance)
            # A jackknife by hand: the mean without each block; blocks without pairs leave it as it is.
            without = np.array([changes[blocks != block].mean() for block in range(N_BLOCKS)])
            variance = (N_BLOCKS - 1) / N_BLOCKS * ((without - without.mean()) ** 2).sum()
            half = stats.t.ppf(0.975, len(set(blocks)) - 1) * np.sqrt(variance)
            assert row[f"{name}_effect_high"] - row[f"{name}_effect"] == pytest.approx(half, abs=10 * tolerance)
            assert row[f"{name}_effect"] - row[f"{name}_effect_low"] == pytest.approx(half, abs=10 * tolerance)
            assert row[f"{name}_n"] == len(some)
            assert abs(changes.mean()) > 100 * tolerance, "an effect of 0 would show nothing"


def test_the_control_is_random_neurons_of_the_same_layers(both):
    dashboards, head, _ = both
    random = rows_of(dashboards, "random").index
    asked = rows_of(dashboards, "asked for").index
    assert not set(random) & set(asked)
    count = {layer: sum(own == layer for own, _ in asked) for layer in range(head.n_layers)}
    assert {layer: sum(own == layer for own, _ in random) for layer in range(head.n_layers)} == count
    known = rows_of(dashboards, "random").drop(columns="direct_weight" if dashboards.about["no_weights"] else [])
    assert known.notna().all().all()


def of_response(reference, site, pair, index):
    """The activation of one neuron at every token of both texts; and where the responses begin."""
    activations, starts = [], []
    for side in ("chosen", "rejected"):
        ids, n_prompt = reference.tokens(pair, side)
        layer, neuron = index
        activations.append(
            reference.per_neuron(reference.activations(site, ids), site, "norm")[layer, :, neuron].numpy()
        )
        starts.append(n_prompt)
    return activations, starts


def test_histograms_and_examples_show_the_largest_activations(both, pairs):
    """The counts of texts, the pairs that are shown, and their tokens and activations."""
    dashboards, _, reference = both
    site = dashboards.about["site"]
    for name, some in pairs.items():
        for index in dashboards.neurons:
            seen = [of_response(reference, site, pair, index) for pair in some]
            largest = np.array(
                [[run[n:][np.abs(run[n:]).argmax()] for run, n in zip(*texts, strict=True)] for texts in seen]
            )
            counts = dashboards.distribution
            layer, neuron = index
            counts = counts[(counts["layer"] == layer) & (counts["neuron"] == neuron) & (counts["group"] == name)]
            edges = np.histogram_bin_edges(largest, bins=len(counts) // 2)
            for column, side in enumerate(("chosen", "rejected")):
                part = counts[counts["side"] == side]
                np.testing.assert_allclose(part["low"], edges[:-1], atol=1e-9)
                # At an edge, the last digit decides.
                near = np.abs(largest[:, column, None] - edges[None, 1:-1]).min() < 1e-9
                assert near or part["texts"].tolist() == np.histogram(largest[:, column], bins=edges)[0].tolist()
                assert part["texts"].sum() == len(some)
            examples = [
                example
                for example in dashboards.examples
                if (example.layer, example.neuron) == index and example.group == name
            ]
            order = np.abs(largest).max(axis=1).argsort(kind="stable")[::-1][:3]
            assert [example.pair for example in examples] == [some[int(number)].id for number in order]
            for example, number in zip(examples, order, strict=True):
                runs, starts = seen[number]
                pair = some[int(number)]
                for side, run, n in zip(("chosen", "rejected"), runs, starts, strict=True):
                    text = getattr(example, side)
                    np.testing.assert_allclose(text.activations, run, rtol=1e-3, atol=1e-9)
                    assert (text.first, text.response_start, text.n_tokens) == (0, n, len(run))
                    assert "".join(text.tokens) == pair.text(side)
            # Negative control: the activations of another text differ.
            assert not np.allclose(examples[0].chosen.activations, seen[order[-1]][0][0][:1].repeat(1), rtol=1e-3)


def test_long_texts_are_shown_around_their_peak(checkpoints):
    from rmtension.attribution._top_texts import _active_text
    from rmtension.data._encoding import EncodedText

    values = torch.zeros(500)
    values[300] = -2.0
    text, everywhere = EncodedText(tuple(range(500)), 10, 0), torch.ones(500, dtype=torch.bool)
    shown = _active_text(text, [str(number) for number in range(500)], values, everywhere, {299})
    assert (shown.first, len(shown.tokens), shown.tokens[120], shown.activations[120]) == (180, 160, "300", -2.0)
    assert (shown.peak, shown.special) == (120, (119,))
    values[499] = 3.0
    shown = _active_text(text, [""] * 500, values, everywhere, set())
    assert (shown.first, shown.peak) == (340, 159)
    # Only tokens that scores are computed at can be the most active one.
    everywhere[400:] = False
    assert _active_text(text, [""] * 500, values, everywhere, set()).peak == 120


def test_pieces_of_tokens_join_to_the_text(tokenizer):
    from rmtension.attribution._top_texts import token_pieces

    text = " bake a cake 🎂 日本 and é"
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_saved_pages_load_equal(both, tmp_path):
    dashboards = both[0]
    dashboards.save(tmp_path / "neurons.json")
    read = NeuronDashboards.load(tmp_path / "neurons.json")
    assert read.examples == dashboards.examples
    assert read.about == dashboards.about
    for name in ("table", "scatter", "distribution", "correlated", "tokens", "descriptions"):
        loaded, saved = getattr(read, name), getattr(dashboards, name)
        assert list(loaded) == list(saved)
        for column in loaded:
            assert loaded[column].map(repr).tolist() == saved[column].map(repr).tolist()
    assert repr(read) == repr(dashboards)


def without(values, *keys):
    for key in keys[:-1]:
        values = values[key]
    del values[keys[-1]]


DAMAGES = {
    "no group's column": lambda v: v["table"]["columns"].__setitem__(3, "x"),
    "no scatter": lambda v: without(v, "scatter"),
    "a newer format": lambda v: v.update(format=2),
    "another kind": lambda v: v.update(kind="NeuronSet"),
    "a token that is a number": lambda v: v["examples"][0]["chosen"]["tokens"].__setitem__(0, 5),
    "one activation less": lambda v: v["examples"][0]["chosen"]["activations"].pop(),
    "an activation that is a text": lambda v: v["examples"][0]["rejected"]["activations"].__setitem__(0, "1"),
    "an infinite activation": lambda v: v["examples"][0]["rejected"]["activations"].__setitem__(0, float("inf")),
    "no pair": lambda v: without(v, "examples", 0, "pair"),
    "a layer that is a text": lambda v: v["scatter"]["data"][0].__setitem__(0, "zero"),
    "no digests": lambda v: v["about"].update(digests={}),
    "a peak outside": lambda v: v["examples"][0]["chosen"].update(peak=999),
    "no direct weight": lambda v: v["table"]["columns"].__setitem__(v["table"]["columns"].index("direct_weight"), "x"),
    "a token without text": lambda v: v["tokens"]["data"].append([0, 1, "promoted", None, 0.5]),
    "a description without its score": lambda v: v["descriptions"]["columns"].__setitem__(4, "x"),
    "a list": lambda v: v.update(examples={}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(both, damage, tmp_path):
    both[0].save(tmp_path / "neurons.json")
    values = json.loads((tmp_path / "neurons.json").read_text())
    DAMAGES[damage](values)
    (tmp_path / "neurons.json").write_text(json.dumps(values))
    with pytest.raises(StorageError, match=r"neurons\.json"):
        NeuronDashboards.load(tmp_path / "neurons.json")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"kind": "NeuronDashboards"}', "\ud83d"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StorageError, match=r"x\.json"):
        NeuronDashboards.load(tmp_path / "x.json")
    with pytest.raises(StorageError, match="cannot read neuron dashboards from this file"):
        NeuronDashboards.load(tmp_path / "missing.json")


def test_wrong_arguments_are_refused(head, pairs):
    neurons = chosen(head, "mlp")
    with pytest.raises(OptionError, match="at least one neuron"):
        neuron_dashboards(head, neurons - neurons, pairs)
    with pytest.raises(OptionError, match="at least one pair each"):
        neuron_dashboards(head, neurons, {})
    with pytest.raises(OptionError, match="n_examples: expected 0 or more"):
        neuron_dashboards(head, neurons, pairs, n_examples=-1)
    with pytest.raises(ProvenanceError, match="indexes neurons of 'toy'"):
        neuron_dashboards(head, NeuronSet(neurons.mask, "mlp", "toy"), pairs)


def test_random_neurons_are_limited_to_those_left(head, pairs):
    everything = NeuronSet(torch.ones(3, 4, dtype=torch.bool), "attn_head", head.architecture)
    dashboards = neuron_dashboards(head, everything, {"helpful": pairs["helpful"][:4]}, n_examples=0)
    assert rows_of(dashboards, "random").empty
    assert dashboards.examples == ()
    assert len(dashboards.scatter) == 12


def test_interrupted_in_every_pass_dashboards_resume(checkpoints, pairs, tmp_path, monkeypatch):
    """Each attempt runs two batches, the second of which is not kept; in the end no batch runs at all."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64, tokens_per_batch=512)
    neurons, options = chosen(head, "mlp"), {"n_examples": 1, "progress": False}
    expected = neuron_dashboards(head, neurons, pairs, **options)
    monkeypatch.setattr("rmtension.store._work_folder.EVERY", 0.0)
    monkeypatch.setattr("rmtension.store._work_folder._SHARE", float("inf"))
    add, added = _pair_pass._Pass._update, []

    def dying(run, *arguments):
        add(run, *arguments)
        if run._work is not None:
            added.append(run._statistic.name)
            if len(added) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(_pair_pass._Pass, "_update", dying)
    died_in = []
    for _ in range(200):
        added.clear()
        try:
            resumed = neuron_dashboards(head, neurons, pairs, work=tmp_path, **options)
            break
        except KeyboardInterrupt:
            died_in.append(added[-1])
    assert len(set(died_in)) == 4, "in the passes of scores, effects, activations and correlations"
    assert resumed.table.equals(expected.table)
    assert resumed.correlated.equals(expected.correlated)
    assert resumed.distribution.equals(expected.distribution)
    added.clear()
    neuron_dashboards(head, neurons, pairs, work=tmp_path, **options)
    assert not added, "what has ended is not run again"
    with pytest.raises(StorageError, match="belongs to a run with other settings"):
        neuron_dashboards(head, neurons, pairs, work=tmp_path, positions="response", **options)
