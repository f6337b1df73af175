"""Overlap against brute force over every possible set, depth by hand, and what may not be compared."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from drawn_scores import random_set, scores_of

from rmtension import NeuronSet, SharedNeuronAnalyzer, SharedNeuronReport
from rmtension.errors import OptionError, ProvenanceError
from rmtension.neurons._overlap import Overlap, depth_thirds


def set_of(*neurons, size=7):
    return NeuronSet.from_indices([(0, n) for n in neurons], shape=(1, size), site="mlp", architecture="toy")


@pytest.mark.parametrize(("size_a", "size_b"), [(2, 3), (4, 5), (1, 7), (3, 3)])
def test_chance_is_the_mean_over_every_possible_set(size_a, size_b):
    a = set_of(*range(size_a))
    overlaps = [Overlap.of(a, set_of(*b)) for b in combinations(range(7), size_b)]
    assert len(overlaps) == comb(7, size_b)
    jaccards = [len(set(a) & set(set_of(*b))) / len(set(a) | set(set_of(*b))) for b in combinations(range(7), size_b)]
    assert [overlap.jaccard for overlap in overlaps] == pytest.approx(jaccards)
    intersections = np.array([overlap.intersection for overlap in overlaps])
    for overlap in overlaps:
        assert overlap.expected_jaccard == pytest.approx(np.mean(jaccards))
        assert overlap.p_value == pytest.approx(np.mean(intersections >= overlap.intersection))
        assert overlap.coefficient == overlap.intersection / min(size_a, size_b)


def test_chance_in_each_layer_is_the_mean_over_every_possible_set():
    """Layers of 4 and 3 neurons (a NeuronSet has equal layers: `exclude` removes the fourth of layer 1)."""

    def two_layers(*neurons):
        return NeuronSet.from_indices(neurons, shape=(2, 4), site="mlp", architecture="toy")

    a, missing = two_layers((0, 0), (0, 1), (1, 0)), two_layers((1, 3))
    every = [
        two_layers(*((0, n) for n in first), *((1, n) for n in second))
        for first in combinations(range(4), 3)
        for second in combinations(range(3), 2)
    ]
    overlaps = [Overlap.of(a, b, exclude=missing) for b in every]
    assert len(overlaps) == 12
    intersections = np.array([overlap.intersection for overlap in overlaps])
    for overlap in overlaps:
        assert overlap.layer_expected_jaccard == pytest.approx(np.mean([value.jaccard for value in overlaps]))
        assert overlap.layer_p_value == pytest.approx(np.mean(intersections >= overlap.intersection))
        assert overlap.layer_expected_jaccard != pytest.approx(overlap.expected_jaccard)


def test_a_layer_of_which_nothing_is_left_adds_nothing():
    """The base's own top set may fill a layer; without it, chance is that of the other layer alone."""

    def of(*layers):
        return NeuronSet(torch.tensor(layers).bool(), "mlp", "toy")

    both, first, second_layer = of([1, 1, 0, 0, 0], [1, 0, 0, 0, 0]), of([1, 0, 1, 0, 0], [1] * 5), of([0] * 5, [1] * 5)
    left = Overlap.of(both, first, exclude=second_layer)
    alone = Overlap.of(*(NeuronSet(part.mask[:1], "mlp", "toy") for part in (both, first)))
    assert left == alone
    nothing = Overlap.of(both, first, exclude=both | ~both)
    assert np.isnan([nothing.jaccard, nothing.expected_jaccard, nothing.beyond_low]).all()
    assert nothing.p_value == nothing.layer_p_value == 1.0


def test_two_independent_tenths_overlap_as_in_the_paper():
    """Two random 10% sets of a large model have a Jaccard index of .053."""
    a = NeuronSet.from_indices([(0, i) for i in range(1000)], shape=(1, 10000), site="mlp", architecture="toy")
    assert Overlap.of(a, a.matched_random(seed=0)).expected_jaccard == pytest.approx(0.0526, abs=1e-4)


def test_empty_sets_are_undefined():
    overlap = Overlap.of(set_of(), set_of())
    assert np.isnan(overlap.jaccard)
    assert np.isnan(overlap.coefficient)
    assert np.isnan(overlap.expected_jaccard)
    assert overlap.p_value == 1.0


def test_sets_that_share_only_the_base_overlap_by_nothing_beyond_it():
    """Two sets that share only what the base has: nothing is left."""
    overlap = Overlap.of(set_of(0, 1, 2), set_of(0, 1, 3), exclude=set_of(0, 1))
    assert (overlap.intersection, overlap.jaccard, overlap.n_neurons) == (0, 0.0, 5)


@pytest.mark.parametrize(("layers", "expected"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (12, [4, 4, 4])])
def test_layers_are_divided_into_thirds(layers, expected):
    everything = NeuronSet(torch.ones(layers, 5, dtype=torch.bool), "mlp", "toy")
    assert list(depth_thirds(everything).values()) == pytest.approx([n / layers for n in expected])
    assert all(np.isnan(share) for share in depth_thirds(everything - everything).values())


class TestAnalyzer:
    scores = {
        name: scores_of(torch.randn(4, 25, generator=torch.Generator().manual_seed(i))) for i, name in enumerate("abc")
    }

    def test_a_neuron_of_all_models_is_shared(self):
        report = SharedNeuronAnalyzer(self.scores).analyze(fraction=0.3)
        sets = {name: set(neurons) for name, neurons in report.sets.items()}
        assert all(len(neurons) == 30 for neurons in sets.values())
        assert set(report.shared) == sets["a"] & sets["b"] & sets["c"]
        assert set(report.specific["b"]) == sets["b"] - sets["a"] - sets["c"]
        assert report.overlap["a", "c"] == Overlap.of(report.sets["a"], report.sets["c"])
        with pytest.raises(OptionError, match="Choose one of overlap"):
            _ = report.jaccard

    def test_two_models_have_one_comparison(self, tmp_path):
        two = {name: self.scores[name] for name in "ab"}
        report = SharedNeuronAnalyzer(two, base=self.scores["c"]).analyze(fraction=0.2)
        overlap = report.overlap["a", "b"]
        assert (report.jaccard, report.expected_jaccard, report.p_value, report.coefficient) == (
            overlap.jaccard,
            overlap.expected_jaccard,
            overlap.p_value,
            overlap.coefficient,
        )
        assert report.beyond_base["a", "b"].n_neurons == 80
        assert report.to_frame()["without_base"].tolist() == [False, True]
        assert report.depth().set_index("set").loc["all neurons", "size"] == 100
        report.save(tmp_path / "report.safetensors")
        loaded = SharedNeuronReport.load(tmp_path / "report.safetensors")
        assert loaded.to_frame().equals(report.to_frame())
        assert loaded.sets == report.sets
        assert loaded.base == report.base
        assert loaded.provenance == report.provenance

    def test_scores_computed_differently_are_refused(self):
        with pytest.raises(OptionError, match="at least two"):
            SharedNeuronAnalyzer({"a": self.scores["a"]})
        for field, value in (("architecture", "other"), ("site", "attn_head"), ("method", "x"), ("positions", "last")):
            other = scores_of(torch.randn(4, 25), **{field: value})
            with pytest.raises(ProvenanceError, match=f"{field} differs"):
                SharedNeuronAnalyzer({"a": self.scores["a"], "b": other})
            with pytest.raises(ProvenanceError, match=f"{field} differs"):
                SharedNeuronAnalyzer({name: self.scores[name] for name in "ab"}, base=other)


@pytest.mark.grid
def test_p_values_of_random_sets_are_calibrated():
    """400 pairs of random sets: at most 5% + 3 binomial standard errors have p <= 0.05 (discrete, so conservative)."""
    small = [
        Overlap.of(random_set(2 * i, (4, 100)), random_set(2 * i + 1, (4, 100))).p_value <= 0.05 for i in range(400)
    ]
    assert 0.01 <= np.mean(small) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_a_report_without_a_base(tmp_path):
    draw = torch.Generator().manual_seed(0)
    scores = {name: scores_of(torch.randn(3, 10, generator=draw)) for name in ("a", "b")}
    report = SharedNeuronAnalyzer(scores).analyze(fraction=0.2)
    assert report.beyond_base == {}
    assert report.base is None
    assert list(report.to_frame()[["a", "b", "without_base"]].itertuples(index=False, name=None)) == [("a", "b", False)]
    assert report.depth()["set"].tolist() == ["a", "b", "a only", "b only", "shared", "all neurons"]
    report.save(tmp_path / "report")
    again = SharedNeuronReport.load(tmp_path / "report")
    assert again.base is None
    assert again.to_frame().equals(report.to_frame())
    with_base = SharedNeuronAnalyzer(scores, base=scores["a"]).analyze(fraction=0.2)
    assert with_base.depth()["set"].tolist() == ["a", "b", "a only", "b only", "shared", "base", "all neurons"]
    assert with_base.to_frame()["without_base"].tolist() == [False, True]


def test_sets_follow_rank_by():
    """By the score with its sign, for the base too."""
    scores = scores_of(torch.tensor([[-3.0, 1.0, 2.0, 0.5]]))
    for by, neuron in (("magnitude", 0), ("score", 2)):
        report = SharedNeuronAnalyzer({"a": scores, "b": scores}, base=scores).analyze(fraction=0.25, rank_by=by)
        assert list(report.shared) == list(report.base) == [(0, neuron)]
    other = replace(scores, provenance=replace(scores.provenance, positions="last"))
    with pytest.raises(ProvenanceError, match=r"^SharedNeuronAnalyzer: positions differs"):
        SharedNeuronAnalyzer({"a": scores, "b": other})


def test_printing_shows_the_index_and_chance():
    """For every two sets, and beyond the base's."""
    scores = scores_of(torch.tensor([[-3.0, 1.0, 2.0, 0.5]] * 3))
    other = scores_of(torch.tensor([[3.0, 1.0, -2.0, 0.5]] * 3))
    report = SharedNeuronAnalyzer({"a": scores, "b": other}).analyze(fraction=0.25)
    title, line = repr(report).split("\n")
    assert title == "SharedNeuronReport(top 0.25 by magnitude of a, b; 3 neurons in all of them)"
    assert line.startswith(
        f"  a / b: Jaccard 1.000, by chance {report.expected_jaccard:.3f} (p = {report.p_value:.2g}), "
    )
    beyond = SharedNeuronAnalyzer({"a": scores, "b": other, "c": scores}, base=scores).analyze(fraction=0.25)
    lines = repr(beyond).split("\n")
    assert [text[:9] for text in lines[1::2]] == ["  a / b: ", "  a / c: ", "  b / c: "]
    assert lines[2] == "    without the base's top set: both sets are empty"
    assert repr(report).split("\n")[0] in report._repr_html_()
