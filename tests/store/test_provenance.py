"""Provenance keeps how a result was computed in fields; its label is for reading only."""

from dataclasses import replace

import pytest
import torch
from tiny_models import make_pairs

from rmtension import Mean, NeuronAttribution, NeuronScores, Scale, SharedNeuronAnalyzer, Zero
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import ProvenanceError
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._selectivity import selectivity
from rmtension.store._provenance import METHOD_FIELDS, Provenance

PLAIN = Provenance("toy", "m", "mlp", "all", "probe", "float64", "d", 4, 40, "0")
CHANGES = {
    "method": "other",
    "aggregate": "absolute",
    "replacement": "mean",
    "steps": 32,
    "graddrop": True,
    "pool_tokens": True,
    "base": "0123456789abcdef",
}


@pytest.fixture(scope="module")
def few():
    return make_pairs(4)


def how(result):
    """The fields of a result that say how it was computed, without those that it has no such option for."""
    fields = {name: getattr(result.provenance, name) for name in METHOD_FIELDS}
    return {name: value for name, value in fields.items() if value not in (None, False)}


def test_results_say_how_they_were_computed(head, few):
    means = Mean(ActivationCollector(head).collect(few))
    patching = NeuronAttribution(head, "attribution_patching", replacement=means, aggregate="absolute", graddrop=True)
    integrated = NeuronAttribution(head, "integrated_gradients", replacement=Scale(0.5), steps=3)
    profile = collect_profiles(head, few, base=head, pool_tokens=True, positions=("response",))["mlp", "response"]
    computed = [
        NeuronAttribution(head, "mean_difference").score(few),
        patching.score(few),
        integrated.per_pair(few),
        single_neuron_effects(head, few[:1], replacement=Zero()),
        profile,
        profile.scores("change"),
        selectivity({"one": profile, "other": profile}),
    ]
    assert [how(result) for result in computed] == [
        {"method": "mean_difference", "aggregate": "signed"},
        {"method": "attribution_patching", "aggregate": "absolute", "replacement": "mean", "graddrop": True},
        {"method": "integrated_gradients", "aggregate": "signed", "replacement": "scale 0.5", "steps": 3},
        {"method": "effect of ablation", "aggregate": "signed", "replacement": "zero"},
        {"method": "profile", "pool_tokens": True},
        {"method": "change", "pool_tokens": True, "base": head.fingerprint},
        {"method": "selectivity", "pool_tokens": True},
    ]
    assert [result.provenance.label for result in computed] == [
        "mean_difference",
        "attribution_patching to mean, graddrop, absolute",
        "integrated_gradients to scale 0.5 in 3 steps",
        "effect of ablation to zero",
        "profile, tokens pooled",
        f"change from base {head.fingerprint}, tokens pooled",
        "selectivity, tokens pooled",
    ]
    for result in computed:
        assert isinstance(result, NeuronScores) == repr(result).startswith(f"NeuronScores({result.provenance.label}: ")
    assert isinstance(computed[2], PairAttributions)
    assert repr(computed[2]).startswith("PairAttributions(integrated_gradients to scale 0.5 in 3 steps: ")


def test_all_of_it_is_kept_in_files(tmp_path):
    where = replace(PLAIN, **CHANGES, skipped=("a", "b"), sign=-1)
    values = torch.ones(2, 3)
    NeuronScores(values, values, where).save(tmp_path / "scores")
    assert NeuronScores.load(tmp_path / "scores").provenance == where
    assert Provenance.from_dict(where.to_dict()) == where
    assert Provenance.from_dict(PLAIN.to_dict()) == PLAIN


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("aggregate", 1), ("replacement", True), ("steps", "3"), ("steps", True), ("steps", 1.0),
        ("graddrop", None), ("graddrop", 1), ("pool_tokens", "no"), ("base", 3), ("method", None),
    ],
)  # fmt: skip
def test_another_type_is_refused(field, wrong):
    with pytest.raises(ProvenanceError, match=f"field '{field}' is missing or not "):
        Provenance.from_dict(PLAIN.to_dict() | {field: wrong})


def test_a_missing_field_is_refused():
    for field in METHOD_FIELDS:
        there = PLAIN.to_dict()
        del there[field]
        with pytest.raises(ProvenanceError, match=f"field '{field}' is missing"):
            Provenance.from_dict(there)


@pytest.mark.parametrize("field", METHOD_FIELDS)
def test_results_that_were_computed_otherwise_are_not_compared(field):
    values = torch.tensor([[1.0, 2.0]])
    other = replace(PLAIN, **{field: CHANGES[field]})
    assert other.label != PLAIN.label
    with pytest.raises(ProvenanceError, match=f"SharedNeuronAnalyzer: {field} differs"):
        SharedNeuronAnalyzer({"a": NeuronScores(values, values, PLAIN), "b": NeuronScores(values, values, other)})
