"""A score's sign means one thing: what the neuron does for the margin, whatever the method."""

from dataclasses import MISSING, fields, replace

import numpy as np
import pytest
import torch

from rmtension import AblationContext, NeuronAttribution, NeuronScores, SharedNeuronAnalyzer, StudyOptions
from rmtension.attribution._methods import METHODS, Method
from rmtension.attribution._neuron_attribution import score_together
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import OptionError, ProvenanceError, RMTensionWarning
from rmtension.neurons._overlap import jaccard_intervals
from rmtension.neurons._signs import RANK_BY
from rmtension.passes._activation_profile import SCORES
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.store._provenance import Provenance
from rmtension.study._options import sign_of
from rmtension.synthetic._organisms import make_organism

ASK_FOR_THE_REWARD = [name for name, method in METHODS.items() if method.needs_reward]
PER_KIND = 2


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    """With noise: every neuron writes something to the reward."""
    folder = tmp_path_factory.mktemp("organism")
    return make_organism(folder, depth=3, width=24, per_kind=PER_KIND, n_pairs=16, noise=0.03)


@pytest.fixture(scope="module")
def head(organism):
    return organism.head()


@pytest.fixture(scope="module")
def scores(organism, head):
    """Method -> objective -> scores; the true effects as "effect"."""
    asked = [NeuronAttribution(head, method=method, steps=8) for method in METHODS]
    scores_of_method = {}
    for objective, pairs in organism.pairs.items():
        for method, scores in zip(METHODS, score_together(asked, pairs), strict=True):
            scores_of_method.setdefault(method, {})[objective] = scores
        scores_of_method.setdefault("effect", {})[objective] = single_neuron_effects(head, pairs)
    return scores_of_method


def made(values, sign):
    values = torch.as_tensor(values, dtype=torch.float64)
    where = Provenance("toy", "m", "mlp", "all", "probe", "float64", "d", 4, 40, "0", sign=sign)
    return NeuronScores(values, torch.ones_like(values), where, values.expand(32, *values.shape))


# -- planted neurons ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ASK_FOR_THE_REWARD, "effect"])
def test_every_method_finds_the_neurons_that_support_and_that_oppose(scores, organism, method):
    truth = organism.truth
    helpful, harmless = scores[method]["helpful"], scores[method]["harmless"]
    assert (helpful.values != 0).float().mean() > 0.4, "noise: most neurons do something"
    carriers = truth["helpful"] | truth["shared"] | truth["conflict"]
    assert helpful.top(k=3 * PER_KIND, rank_by="supports") == carriers
    assert harmless.top(k=2 * PER_KIND, rank_by="supports") == truth["harmless"] | truth["shared"]
    assert harmless.top(k=PER_KIND, rank_by="opposes") == truth["conflict"]
    # Negative control: scores read with the wrong sign take others.
    turned = replace(harmless, provenance=replace(harmless.provenance, sign=-harmless.provenance.sign))
    assert turned.top(k=PER_KIND, rank_by="opposes") != truth["conflict"]


@pytest.mark.parametrize("method", [*ASK_FOR_THE_REWARD, "effect"])
def test_on_swapped_pairs_supporters_oppose(scores, organism, head, method):
    pairs = organism.pairs["harmless"].swapped()
    result = (
        single_neuron_effects(head, pairs)
        if method == "effect"
        else NeuronAttribution(head, method=method, steps=8).score(pairs)
    )
    for direction, other in (("supports", "opposes"), ("opposes", "supports")):
        assert result.top(k=PER_KIND, rank_by=direction) == scores[method]["harmless"].top(k=PER_KIND, rank_by=other)


def test_supporters_support(scores, organism, head):
    """Ablated together, what `supports` takes lowers the margin, and what `opposes` takes raises it."""
    pairs = organism.pairs["harmless"]
    margin = head.score_pairs(pairs).margin.mean()
    for method in ASK_FOR_THE_REWARD:
        for by, sign in (("supports", -1), ("opposes", 1)):
            with AblationContext(head, scores[method]["harmless"].top(k=PER_KIND, rank_by=by)):
                assert sign * (head.score_pairs(pairs).margin.mean() - margin) > 0.1


def test_effects_have_one_sign(scores):
    """Every method predicts a fall of the margin where taking the neuron out lowers it."""
    truth = scores["effect"]["harmless"]
    far = truth.values.abs() > 0.1
    for method in ASK_FOR_THE_REWARD:
        assert torch.equal(scores[method]["harmless"].as_effects()[far].sign(), truth.values[far].sign()), method


def test_mean_difference_takes_what_is_more_active_in_chosen_responses(scores, organism):
    """Decoys are, and do nothing: why it is no statement about the margin."""
    differences = scores["mean_difference"]["helpful"]
    top = differences.top(k=3 * PER_KIND, rank_by="supports")
    assert (differences.values[top.mask] > 0).all()
    assert organism.truth["decoy"] - top != organism.truth["decoy"]


# -- statements --------------------------------------------------------------------------------------------------------


def test_every_method_declares_all_fields():
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(Method))
    assert all(method.sign in (1, -1) for method in METHODS.values())
    with pytest.raises(TypeError, match="sign"):
        Method(**{field.name: None for field in fields(Method) if field.name != "sign"})


def test_results_carry_what_the_table_says(scores, organism, head):
    for method, of in scores.items():
        assert of["helpful"].provenance.sign == (-1 if method == "effect" else METHODS[method].sign)
    few = organism.pairs["helpful"][:3]
    for method in METHODS:
        assert NeuronAttribution(head, method=method, steps=2).per_pair(few).provenance.sign == METHODS[method].sign
        magnitudes = NeuronAttribution(head, method=method, aggregate="absolute", steps=2).score(few)
        assert magnitudes.provenance.sign is None
        assert torch.equal(magnitudes.as_effects(), magnitudes.values)
    profile = collect_profiles(head, few, base=head, positions=("response",))["mlp", "response"]
    for score in SCORES:
        assert profile.scores(score).provenance.sign == sign_of(score) == (1 if score == "mean_difference" else None)


def test_the_sign_is_kept_in_files(tmp_path):
    for sign in (1, -1, None):
        made([[1.0, -2.0]], sign).save(tmp_path / "scores")
        assert NeuronScores.load(tmp_path / "scores").provenance.sign == sign
    for wrong in ({"sign": 2}, {"sign": True}, {"sign": "1"}):
        with pytest.raises(ProvenanceError, match="field 'sign'"):
            Provenance.from_dict(made([[1.0]], 1).provenance.to_dict() | wrong)
    old = made([[1.0]], 1).provenance.to_dict()
    del old["sign"]
    with pytest.raises(ProvenanceError, match=r"field 'sign' is missing or not of type int \| None\. Compute"):
        Provenance.from_dict(old)


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_top_takes_the_neurons_of_the_asked_direction(sign):
    contributions = torch.tensor([[3.0, -4.0, 0.5], [-1.0, 2.0, 0.0]])
    result = made(sign * contributions, sign)
    assert list(result.top(k=2, rank_by="supports")) == [(0, 0), (1, 1)]
    assert list(result.top(k=2, rank_by="opposes")) == [(0, 1), (1, 0)]
    assert list(result.top(k=2, rank_by="magnitude")) == list(result.top(k=2)) == [(0, 0), (0, 1)]
    assert list(result.top(k=1, rank_by="opposes", rank_within="layer")) == [(0, 1), (1, 0)]
    assert list(result.top(0.3, rank_by="supports", cut_rule="percentile")) == [(0, 0), (1, 1)]
    # A set that has to take neurons of the other direction says so; all neurons are no choice.
    with pytest.warns(RMTensionWarning, match="only 2 of 6 neurons have a score that opposes"):
        result.top(k=3, rank_by="opposes")
    result.top(1.0, rank_by="opposes")
    if sign > 0:
        assert result.top(k=2, rank_by="score") == result.top(k=2, rank_by="supports")
    else:
        with pytest.raises(OptionError, match="a positive score of 'probe' opposes the margin"):
            result.top(k=1, rank_by="score")


def test_scores_without_a_direction_refuse_one():
    """And the advice works."""
    result = made([[3.0, -4.0, 0.5]], None)
    for by in ("supports", "opposes"):
        with pytest.raises(OptionError, match=f"by: '{by}' needs scores whose sign .* Use rank_by='magnitude'"):
            result.top(k=1, rank_by=by)
    assert list(result.top(k=1, rank_by="magnitude")) == [(0, 1)]
    assert list(result.top(k=1, rank_by="score")) == [(0, 0)]
    for old in ("absolute", "value"):
        with pytest.raises(OptionError, match=r"by: expected one of \['magnitude', 'supports', 'opposes', 'score'\]"):
            result.top(k=1, rank_by=old)


@pytest.mark.parametrize("by", ["supports", "opposes"])
def test_overlap_reads_each_score_by_its_own_sign(by):
    """Contributions, and the same as changes: the same neurons, in the analyzer and on resamples."""
    values = torch.tensor([[3.0, -4.0, 0.5, -0.1]])
    first, other = made(values, 1), made(-values, -1)
    report = SharedNeuronAnalyzer({"a": first, "b": other}).analyze(fraction=0.25, rank_by=by)
    assert report.jaccard == 1.0
    assert jaccard_intervals({"a": first, "b": other}, fraction=0.25, rank_by=by)["a", "b"] == (1.0, 1.0)
    misread = made(-values, 1)
    assert jaccard_intervals({"a": first, "b": misread}, fraction=0.25, rank_by=by)["a", "b"] == (0.0, 0.0)


def test_studies_use_only_directions_that_scores_have():
    for by in RANK_BY:
        scores = ("frequency", "change") if by == "score" else ("gradient_x_activation", "attribution_patching")
        assert StudyOptions(rank_by=by, scores=scores).rank_by == by
    for by, scores in (("supports", ("mean_difference", "magnitude")), ("score", ("change", "attribution_patching"))):
        with pytest.raises(OptionError, match=rf"by: '{by}' .*'{scores[1]}'"):
            StudyOptions(rank_by=by, scores=scores)


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_frames_say_the_direction(sign):
    result = made(sign * torch.tensor([[3.0, -4.0], [0.0, float("nan")]]), sign)
    assert result.to_frame()["direction"].tolist() == ["supports", "opposes", "neither", "neither"]
    assert "direction" in result._repr_html_()
    assert "direction" not in made([[3.0, -4.0]], None).to_frame()


def test_frames_of_pairs_and_tokens_say_the_direction(organism, head):
    few = organism.pairs["harmless"][:3]
    for method in ("gradient_x_activation", "attribution_patching"):
        attribution = NeuronAttribution(head, method=method)
        by_pair = attribution.per_pair(few)
        contribution = by_pair.values.numpy().ravel() * METHODS[method].sign
        assert (np.sign(contribution) == by_pair.to_frame()["direction"].map(_NUMBERS).astype(int)).all()
        tokens = next(attribution.per_token(few))
        ((layer, neuron), *_) = organism.truth["conflict"]
        frame = tokens.to_frame(layer, neuron)
        # The neuron raises the reward of the rejected text, so that it opposes the margin there.
        assert set(frame[frame["score"] != 0].groupby("side", observed=True)["direction"].unique()["rejected"]) == {
            "opposes"
        }


_NUMBERS = {"supports": 1, "opposes": -1, "neither": 0}
