"""Sets obey the algebra of sets, top-k is exact, controls match, and results survive the disk."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_scores import random_set, scores_of
from scipy import stats
from tiny_models import unchecked

from rmtension import NeuronScores, NeuronSet
from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning, StorageError
from rmtension.neurons._neuron_set import check_seed


def test_algebra_equals_python_sets():
    a, b = random_set(0), random_set(1)
    for ours, theirs in (
        (a & b, set(a) & set(b)),
        (a | b, set(a) | set(b)),
        (a - b, set(a) - set(b)),
        (a ^ b, set(a) ^ set(b)),
        (~a, set(itertools.product(range(4), range(25))) - set(a)),
    ):
        assert set(ours) == theirs
        assert len(ours) == len(theirs)
    assert (0, 0) in (a | ~a)
    assert (9, 9) not in (a | ~a)
    assert a == NeuronSet.from_indices(list(a), shape=(4, 25), site="mlp", architecture="toy")
    assert a != b
    assert hash(a) == hash(a & a)


def test_a_set_shares_no_memory_with_its_mask():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    neurons = NeuronSet(mask, "mlp", "toy")
    mask[:] = True
    assert len(neurons) == 0


def test_sets_of_other_sites_or_models_do_not_combine():
    with pytest.raises(ProvenanceError, match="site differs: 'mlp' here, 'attn_head' there"):
        random_set(0) & NeuronSet(random_set(0).mask, "attn_head", "toy")
    with pytest.raises(ProvenanceError, match="architecture differs"):
        random_set(0) | NeuronSet(random_set(0).mask, "mlp", "other")
    with pytest.raises(OptionError, match="outside a model with 2 layers of 3 neurons"):
        NeuronSet.from_indices([(0, 3)], shape=(2, 3), site="mlp", architecture="toy")


class TestTop:
    @pytest.mark.parametrize("fraction", [0.001, 0.05, 0.1, 1 / 3, 0.5, 1.0])
    @pytest.mark.parametrize("shape", [(7, 10), (3, 48), (1, 1)])
    def test_top_takes_the_ceiling_of_the_fraction_from_the_highest(self, fraction, shape):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for by, ranked in (("magnitude", values.abs()), ("score", values)):
            top = scores_of(values).top(fraction, rank_by=by)
            assert len(top) == math.ceil(round(fraction * values.numel(), 6))
            if len(top) < values.numel():
                assert ranked[top.mask].min() > ranked[~top.mask].max()

    def test_ties_are_broken_by_index_with_a_warning(self):
        values = torch.tensor([[1.0, 5.0, 1.0], [1.0, 0.0, 5.0]])
        assert list(scores_of(values).top(k=2)) == [(0, 1), (1, 2)]
        with pytest.warns(RMTensionWarning, match="tie of 3 equal scores"):
            assert list(scores_of(values).top(k=3)) == [(0, 0), (0, 1), (1, 2)]

    @pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
    def test_a_fraction_outside_its_range_is_refused(self, fraction):
        with pytest.raises(OptionError, match=r"fraction: expected a number in \(0, 1\]"):
            scores_of(torch.randn(2, 3)).top(fraction)

    def test_nan_scores_are_refused(self):
        with pytest.raises(OptionError, match="1 of 6 scores are NaN"):
            scores_of(torch.tensor([[0.0, 1.0, float("nan")], [1.0, 2.0, 3.0]])).top(k=2)

    def test_exactly_one_of_fraction_and_k(self):
        for options in ({}, {"fraction": 0.1, "k": 2}):
            with pytest.raises(OptionError, match="exactly one of fraction and k"):
                scores_of(torch.randn(2, 3)).top(**options)
        with pytest.raises(OptionError, match="k: expected 1 to 6"):
            scores_of(torch.randn(2, 3)).top(k=7)


class TestMatchedRandom:
    def test_random_sets_have_the_same_size_per_layer_and_are_disjoint(self):
        neurons, exclude = random_set(0, share=0.2), random_set(1, share=0.2)
        drawn = neurons.matched_random(seed=3, exclude=exclude)
        assert drawn.n_per_layer == neurons.n_per_layer
        assert len(drawn & neurons) == len(drawn & exclude) == 0
        assert drawn == neurons.matched_random(seed=3, exclude=exclude)
        assert drawn != neurons.matched_random(seed=4, exclude=exclude)

    def test_by_model_keeps_the_size_only(self):
        neurons = NeuronSet.from_indices([(0, i) for i in range(20)], shape=(4, 25), site="mlp", architecture="toy")
        drawn = neurons.matched_random(seed=0, match="model")
        assert len(drawn) == 20
        assert drawn.n_per_layer != neurons.n_per_layer

    def test_every_neuron_is_equally_likely(self):
        neurons = NeuronSet.from_indices([(0, 0), (0, 1)], shape=(1, 12), site="mlp", architecture="toy")
        counts = sum(neurons.matched_random(seed=seed).mask[0].int() for seed in range(2000))
        assert counts[:2].sum() == 0
        assert stats.chisquare(counts[2:].numpy()).pvalue > 0.01

    def test_drawing_more_neurons_than_are_left_is_refused(self):
        neurons = NeuronSet(torch.ones(1, 3, dtype=torch.bool), "mlp", "toy")
        with pytest.raises(OptionError, match="3 neurons in layers"):
            neurons.matched_random(seed=0)
        with pytest.raises(OptionError, match="match"):
            neurons.matched_random(seed=0, match="magnitude")


def test_results_survive_the_disk(tmp_path):
    neurons, scores = random_set(0), scores_of(torch.randn(4, 25, dtype=torch.float64))
    neurons.save(tmp_path / "set.safetensors")
    scores.save(tmp_path / "scores.safetensors")
    assert NeuronSet.load(tmp_path / "set.safetensors") == neurons
    loaded = NeuronScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.values, scores.values)
    assert loaded.provenance == scores.provenance
    assert loaded.to_frame().equals(scores.to_frame())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.safetensors", "set.safetensors"]
    with pytest.raises(StorageError, match="expected a NeuronSet"):
        NeuronSet.load(tmp_path / "scores.safetensors")
    (tmp_path / "junk").write_bytes(b"\x80\x04junk")
    with pytest.raises(StorageError, match="not a saved result of rmtension"):
        NeuronSet.load(tmp_path / "junk")
    with pytest.raises(StorageError, match="there is no such file"):
        NeuronSet.load(tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "set.safetensors"
    random_set(0).save(path)
    before = path.read_bytes()

    write = Path.write_bytes

    def full(target, content):
        write(target, content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        random_set(1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class TestTopRules:
    def test_layer_rules_rank_within_each_layer(self):
        values = torch.arange(40.0).view(4, 10)
        top = scores_of(values).top(0.25, rank_within="layer")
        assert top.n_per_layer == [3, 3, 3, 3]
        assert set(top) == {(layer, neuron) for layer in range(4) for neuron in (7, 8, 9)}
        assert scores_of(values).top(0.25).n_per_layer == [0, 0, 0, 10]
        assert scores_of(values).top(k=2, rank_within="layer").n_per_layer == [2, 2, 2, 2]

    def test_percentile_rule_is_numpys_and_takes_every_tie(self):
        """The published rule: with more than 90% of the scores tied at the top of the cut it selects everything."""
        values = torch.randn(4, 25, generator=torch.Generator().manual_seed(0)).double()
        selected = scores_of(values).top(0.1, rank_by="score", cut_rule="percentile")
        assert torch.equal(selected.mask, values >= np.percentile(values.numpy(), 90))
        tied = torch.zeros(4, 25).double()
        tied[0, :5] = 1.0
        assert len(scores_of(tied).top(0.1, cut_rule="percentile")) == 100
        with pytest.warns(RMTensionWarning, match="inside a tie"):
            assert len(scores_of(tied).top(0.1)) == 10

    def test_wrong_rules_are_refused(self):
        values = torch.randn(2, 5)
        for wrong in ({"rank_within": "block"}, {"cut_rule": "top"}, {"rank_by": "size"}):
            with pytest.raises(OptionError, match=next(iter(wrong))):
                scores_of(values).top(0.5, **wrong)
        with pytest.raises(OptionError, match="needs fraction"):
            scores_of(values).top(k=2, cut_rule="percentile")


class TestMatchedInMagnitude:
    def test_controls_have_the_sets_magnitudes(self):
        rng = np.random.default_rng(0)
        magnitude = torch.from_numpy(rng.lognormal(size=(4, 400)))
        # The set holds large neurons: random ones of the same layers are much smaller.
        mask = (magnitude > 2.5) & torch.from_numpy(rng.random((4, 400)) < 0.3)
        neurons = NeuronSet(mask, "mlp", "toy")
        mean = magnitude[neurons.mask].mean()
        for seed in range(5):
            control = neurons.matched_random(seed=seed, match="magnitude", magnitude=magnitude)
            assert control.n_per_layer == neurons.n_per_layer
            assert not len(control & neurons)
            assert magnitude[control.mask].mean() == pytest.approx(float(mean), rel=0.1)
            by_layer = neurons.matched_random(seed=seed)
            assert magnitude[by_layer.mask].mean() < 0.6 * mean
        first, second = (neurons.matched_random(seed=s, match="magnitude", magnitude=magnitude) for s in (0, 1))
        assert first != second
        assert first == neurons.matched_random(seed=0, match="magnitude", magnitude=magnitude)

    def test_wrong_arguments_of_controls_are_refused(self):
        neurons = random_set(0)
        with pytest.raises(OptionError, match="magnitude: expected one number per neuron"):
            neurons.matched_random(seed=0, match="magnitude")
        with pytest.raises(OptionError, match="magnitude: expected one number per neuron"):
            neurons.matched_random(seed=0, magnitude=torch.ones(4, 25))
        with pytest.raises(OptionError, match=r"expected shape \(4, 25\)"):
            neurons.matched_random(seed=0, match="magnitude", magnitude=torch.ones(2, 25))


def test_subsamples_are_uniform():
    """Every neuron of the set is drawn equally often, none from outside."""
    neurons = random_set(0, shape=(2, 10), share=0.5)
    counts = sum(neurons.subsample(3, seed=seed).mask.int() for seed in range(600))
    assert not counts[~neurons.mask].any()
    expected = 600 * 3 / len(neurons)
    # Chi-squared over the set's neurons, at the .001 level
    statistic = float(((counts[neurons.mask] - expected) ** 2 / expected).sum())
    assert statistic < stats.chi2(len(neurons) - 1).ppf(0.999)
    assert len(neurons.subsample(len(neurons), seed=0)) == len(neurons)
    with pytest.raises(OptionError, match="k: expected 0 to"):
        neurons.subsample(len(neurons) + 1, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2,)}, "shape: expected \\(number of layers, neurons per layer\\)"),
        ({"shape": (0, 3)}, "shape: expected \\(number of layers"),
        ({"shape": (2, 0)}, "shape: expected \\(number of layers"),
        ({"shape": (2.0, 3)}, "shape: expected \\(number of layers"),
        ({"shape": (True, 3)}, "shape: expected \\(number of layers"),
        ({"shape": (2**15, 2**14)}, "shape: expected \\(number of layers"),
        ({"site": None}, "site: expected a text, got None"),
        ({"architecture": 3}, "architecture: expected a text, got 3"),
        ({"indices": 3}, r"indices: expected \(layer, neuron\) pairs of whole numbers, got 3"),
        ({"indices": [(0, 1.0)]}, "indices: expected"),
        ({"indices": [(0,)]}, "indices: expected"),
        ({"indices": [(0, 1, 2)]}, "indices: expected"),
        ({"indices": ["01"]}, "indices: expected"),
    ],
)
def test_invalid_arguments_of_a_set_are_refused(changes, message):
    make = unchecked(NeuronSet.from_indices.__func__)
    given = {"indices": [(0, 1)], "shape": (2, 3), "site": "mlp", "architecture": "toy"} | changes
    with pytest.raises(OptionError, match=message):
        make(NeuronSet, given.pop("indices"), **given)


def test_indices_stop_at_the_shape():
    for index in ((2, 0), (0, 3), (-1, 0), (0, -1)):
        with pytest.raises(OptionError, match=r"indices: \(.*\) is outside a model with 2 layers of 3 neurons"):
            NeuronSet.from_indices([index], shape=(2, 3), site="mlp", architecture="toy")
    corners = NeuronSet.from_indices([(1, 2), (0, 0), (1, 2)], shape=(2, 3), site="mlp", architecture="toy")
    assert list(corners) == [(0, 0), (1, 2)]
    assert corners.to_frame().to_dict("list") == {"layer": [0, 1], "neuron": [0, 2]}
    assert (1, 2) in corners
    for other in ((0, 1), (2, 0), (0, 3), (1, 2, 0), (1,), [1, 2], 1, "12", None):
        assert other not in corners


def test_equal_sets_have_equal_hashes():
    first, other = (NeuronSet(torch.tensor([[True, False]]), "mlp", "toy") for _ in range(2))
    assert len({first, other, ~first}) == 2
    assert hash(first) == hash(other) != hash(~first)


def test_drawing_takes_the_last_neurons_that_are_free():
    half = NeuronSet(torch.tensor([[True, False, True, False]]), "mlp", "toy")
    assert half.matched_random(seed=0) == ~half
    assert half.subsample(0, seed=0).n_per_layer == [0]
    assert half.subsample(2, seed=0) == half
    many = NeuronSet(torch.ones(2, 50, dtype=torch.bool), "mlp", "toy")
    assert many.subsample(50, seed=3) == many.subsample(50, seed=3) != many.subsample(50, seed=4)
    assert many.subsample(99, seed=0).mask.sum() == 99
    with pytest.raises(OptionError, match=r"4 neurons in layers \[0\], but only 0 are outside the set"):
        (half | ~half).matched_random(seed=0)
    with pytest.raises(OptionError, match=r"got NoneType with match='magnitude'"):
        half.matched_random(seed=0, match="magnitude")
    with pytest.raises(OptionError, match="match: expected 'layer', 'model' or 'magnitude', got 'other'"):
        half.matched_random(seed=0, match="other")


def test_shapes_up_to_the_largest_are_taken():
    at_most = NeuronSet.from_indices([(0, 1)], shape=(1, 2**28), site="mlp", architecture="toy")
    assert at_most.mask.shape == (1, 2**28)


@pytest.mark.parametrize("seed", [-1, 1.5, True, None, "0"])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises(OptionError, match="seed: expected a whole number from 0 on"):
        unchecked(check_seed)(seed)
    check_seed(0)
    check_seed(np.int64(3))
