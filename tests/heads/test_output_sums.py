"""Outputs of one model: each equals a model of one row bit by bit; a weighted sum equals the sum of rewards."""

import pytest
import torch

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import ModelError, OptionError, ProvenanceError
from rmtension.heads import Head, LinearHead
from rmtension.synthetic.check_matrix import make_classifier

NAMES = ["helpfulness", "safety", "verbosity"]


@pytest.fixture(scope="module")
def several(head):
    rows = torch.randn(3, head.d_model, generator=torch.Generator().manual_seed(0))
    linear = LinearHead(rows, bias=[0.5, -1.0, 0.0], names=NAMES)
    options = {"tokenizer": head.tokenizer, "pad_token_id": head.pad_token_id}
    return RewardHead(head.model, linear, output="all", **options)


@pytest.fixture(scope="module")
def separate(head, several):
    """Three models of one row each, on the same body."""
    linear = several.require_head()
    options = {"tokenizer": head.tokenizer, "pad_token_id": head.pad_token_id}
    return [RewardHead(head.model, (linear.weight[n], float(linear.bias[n])), **options) for n in range(3)]


class Products(Head):
    """Two outputs, which are not linear."""

    outputs = ("square", "first")

    def read(self, last, prompt_last):
        """The outputs."""
        return torch.stack([last.square().sum(dim=1), last[:, 0]], dim=1)


def test_an_output_equals_a_model_of_one_row_bit_by_bit(several, separate, pairs):
    means = Mean(ActivationCollector(several).collect(pairs))
    neurons = NeuronSet.from_indices(
        [(0, 1), (1, 5)],
        shape=(several.n_layers, several.n_neurons("mlp")),
        site="mlp",
        architecture=several.architecture,
    )
    rewards = several.score_outputs(pairs)
    for name, alone in zip(NAMES, separate, strict=True):
        chosen = several.output(name)
        assert chosen.fingerprint == alone.fingerprint
        assert torch.equal(chosen.score_pairs(pairs).margin, alone.score_pairs(pairs).margin)
        assert torch.equal(rewards[name].margin, alone.score_pairs(pairs).margin)
        scores = [
            NeuronAttribution(model, "attribution_patching", replacement=means).score(pairs)
            for model in (chosen, alone)
        ]
        assert torch.equal(scores[0].values, scores[1].values)
        assert scores[0].provenance.output == name
        assert scores[1].provenance.output is None
        without = []
        for model in (chosen, alone):
            with AblationContext(model, neurons, means):
                without.append(model.score_pairs(pairs).margin)
        assert torch.equal(*without)
    assert not torch.equal(rewards[NAMES[0]].margin, rewards[NAMES[1]].margin)
    assert len({model.fingerprint for model in separate}) == 3


def test_outputs_have_one_body_and_activations_of_another_body_are_refused(several, separate, pairs):
    prints = {model.body_fingerprint for model in [several, several.output("safety"), *separate]}
    assert len(prints) == 1
    other = RewardHead.from_classifier(make_classifier("gpt2", len(several.tokenizer)), tokenizer=several.tokenizer)
    assert other.body_fingerprint not in prints
    means = Mean(ActivationCollector(other).collect(pairs[:4]))
    with pytest.raises(ProvenanceError):
        NeuronAttribution(several.output("safety"), "attribution_patching", replacement=means)


def test_the_weights_of_the_body_are_read_once_for_all_outputs(several, monkeypatch):
    read = []

    def counted(parameters, *values):
        parameters = list(parameters)
        read.append(sum(parameter.numel() for parameter in parameters))
        return f"{len(read):016}"

    monkeypatch.setattr("rmtension.models._reward_model.fingerprint", counted)
    fresh = several.output(0)
    fresh._body_fingerprint.clear()
    prints = {fresh.output(name).fingerprint for name in NAMES}
    assert len(prints) == 3
    assert sorted(read)[:3] == [several.d_model] * 3
    assert len(read) == 4


def test_a_weighted_sum_is_the_sum_of_rewards(several, pairs):
    summed = several.output({"helpfulness": 1.0, "safety": -0.5, 2: 2})
    rewards = several.score_outputs(pairs)
    expected = rewards["helpfulness"].chosen - 0.5 * rewards["safety"].chosen + 2 * rewards["verbosity"].chosen
    assert torch.allclose(summed.score_pairs(pairs).chosen, expected, atol=1e-5)
    assert summed.outputs == [*NAMES, "helpfulness - 0.5 safety + 2 verbosity"]
    assert summed.score_pairs(pairs).provenance.output == summed.outputs[-1]
    assert several.outputs == NAMES
    assert summed.check()["passed"].all()
    difference = several.output({"helpfulness": 1, "safety": -1}).score_pairs(pairs).margin
    assert torch.allclose(difference, several.output(("helpfulness", "safety")).score_pairs(pairs).margin, atol=1e-5)
    assert summed.output("safety").fingerprint == several.output("safety").fingerprint
    assert summed.output({"helpfulness": 1.0, "safety": -0.5, "verbosity": 2}).outputs == summed.outputs


def test_a_weighted_sum_of_a_head_that_is_not_linear(head, pairs):
    options = {"tokenizer": head.tokenizer, "pad_token_id": head.pad_token_id}
    model = RewardHead(head.model, Products(), output="all", **options)
    summed = model.output({"square": 0.25, "first": 1.0})
    rewards = model.score_outputs(pairs)
    expected = 0.25 * rewards["square"].margin + rewards["first"].margin
    assert torch.allclose(summed.score_pairs(pairs).margin, expected, atol=1e-4)
    parts = [NeuronAttribution(model.output(name), "gradient_x_activation").score(pairs).values for name in (0, 1)]
    whole = NeuronAttribution(summed, "gradient_x_activation").score(pairs).values
    assert torch.allclose(whole, 0.25 * parts[0] + parts[1], atol=1e-4)
    assert not torch.allclose(whole, parts[0] + parts[1], atol=1e-3)
    assert summed.fingerprint != model.output({"square": 0.5, "first": 1.0}).fingerprint
    assert summed.check()["passed"].all()


def test_a_weighted_sum_of_a_checkpoint_is_checked_against_transformers_hidden_states(tmp_path, tokenizer, pairs):
    classifier = make_classifier("gpt2", len(tokenizer), num_labels=2)
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    summed = RewardHead.from_pretrained(tmp_path, output="all").output({0: 1.0, 1: 3.0})
    table = summed.check()
    assert "equal to transformers" in set(table["check"])
    assert table["passed"].all()
    summed.save_pretrained(tmp_path / "one")
    again = RewardHead.from_pretrained(tmp_path / "one")
    assert torch.allclose(again.score_pairs(pairs).margin, summed.score_pairs(pairs).margin, atol=1e-5)


def test_a_weighted_sum_of_a_model_in_memory_notices_that_its_score_layer_was_trained(tokenizer, pairs):
    classifier = make_classifier("gpt2", len(tokenizer), num_labels=2)
    summed = RewardHead.from_classifier(classifier, tokenizer=tokenizer, output="all").output({0: 1.0, 1: 3.0})
    assert summed.check()["passed"].all()
    with torch.no_grad():
        classifier.score.weight.mul_(2)
    with pytest.raises(ModelError, match="score layer changed"):
        summed.score_pairs(pairs[:2])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "not all 0"),
        ({"safety": 0.0}, "not all 0"),
        ({"safety": float("nan")}, "expected a number"),
        ({"safety": "1"}, "expected a number"),
        ({"savety": 1.0}, "Did you mean 'safety'"),
        ({"safety": 1.0, 1: 2.0}, "two weights"),
        ({("safety", "verbosity"): 1.0}, "the pair"),
    ],
)
def test_wrong_weights_are_refused(several, weights, message):
    with pytest.raises(OptionError, match=message):
        several.output(weights)
