"""Heads that return something else than they say, that differ in a number, that share modules, or round rows."""

import pytest
import torch
import transformers
from native_families import make_native
from tiny_models import make_config, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead, Scale
from rmtension.errors import ModelError, OptionError, StorageError
from rmtension.heads import Head, LinearHead, LogRatioHead, ProcessHead
from rmtension.interventions import score_without


class Returns(Head):
    """Returns what a function makes of the last state."""

    def __init__(self, function, outputs=("reward",)):
        super().__init__()
        self.function, self.outputs = function, outputs

    def read_tokens(self, states, places, batch):  # without type annotations, as a user may write it
        return self.function(states)


class OfPrompt(Head):
    reads_prompt = True

    def read(self, last, prompt_last):
        return (last * torch.tanh(prompt_last)).sum(dim=1, keepdim=True)


class Divided(Head):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def read(self, last, prompt_last):
        return last.sum(dim=1, keepdim=True) / self.by


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda last: last.sum(dim=1), r"shape \(4,\)"),
        (lambda last: last[:, :3], r"shape \(4, 3\)"),
        (lambda last: (last[:, :1],), "a tuple"),
    ],
)
def test_a_head_with_another_shape_is_refused(function, got, checkpoints):
    head = RewardHead.from_pretrained(checkpoints["gpt2"], head=Returns(function))
    for score in (head.score_pairs, head.score_outputs):
        with pytest.raises(ModelError, match=f"tensor of shape .4, 1., got {got}"):
            score(make_pairs(2))


def test_names_of_outputs_fit_the_head(checkpoints):
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for arguments in ({"names": ["a"]}, {"bias": [1.0, 2.0]}):
        with pytest.raises(ModelError, match="one bias and one name for each of 3 rows"):
            LinearHead(rows, **arguments)
    with pytest.raises(ModelError, match=r"expected the outputs of Returns as names"):
        RewardHead.from_pretrained(checkpoints["gpt2"], head=Returns(lambda last: last[:, :1], "reward"))
    twice = RewardHead.from_pretrained(checkpoints["gpt2"], head=LinearHead(rows, names=["a", "b", "a"]), output=0)
    with pytest.raises(OptionError, match="expected outputs with different names"):
        twice.score_outputs(make_pairs(2))


@pytest.mark.parametrize("curved", [False, True])
def test_a_weighted_sum_is_not_taken_for_an_output_of_that_name(curved, checkpoints):
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    names = ("a", "b", "a + b")
    own = Returns(lambda last: torch.tanh(last @ rows.T), names) if curved else LinearHead(rows, names=names)
    head = RewardHead.from_pretrained(checkpoints["gpt2"], head=own, output="all")
    with pytest.raises(OptionError, match=r"another output called 'a \+ b'"):
        head.output({"a": 1.0, "b": 1.0})
    twice = head.output({"a": 1.0, "b": -0.5}).output({"a": 1.0, "b": -0.5})
    assert twice.outputs == [*names, "a - 0.5 b"]
    assert head.output({"a + b": 1.0}).outputs == [*names]


def test_a_number_of_a_head_is_a_part_of_the_models_fingerprint(checkpoints, tmp_path):
    once, half = (RewardHead.from_pretrained(checkpoints["gpt2"], head=Divided(by)) for by in (1.0, 2.0))
    assert once.fingerprint != half.fingerprint
    once.score_pairs(make_pairs(2), work=tmp_path)
    with pytest.raises(StorageError, match="other settings"):
        half.score_pairs(make_pairs(2), work=tmp_path)


def test_the_bias_of_a_step_is_a_part_of_the_models_fingerprint(checkpoints):
    row = torch.ones(32)
    first, second = (
        RewardHead.from_pretrained(checkpoints["gpt2"], head=ProcessHead(" a", (row, bias)), output="min")
        for bias in (0.0, 1.0)
    )
    assert first.fingerprint != second.fingerprint


def test_identical_responses_get_identical_rewards_by_layers(checkpoints):
    """A matrix product of several rows rounds equal rows differently, which the plain head shows."""
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    head = RewardHead.from_pretrained(checkpoints["llama"], head=Returns(layers))
    pairs = make_pairs(41, longest=30)
    same = PreferencePairs.from_records(
        [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.chosen} for pair in pairs]
    )
    for tokens in (1, 200, 3000):
        head.tokens_per_batch = tokens
        assert not head.score_pairs(same).margin.any()
    head.tokens_per_batch = None
    scores = NeuronAttribution(head, "gradient_x_activation")
    assert not scores.per_pair(same).values.any()
    assert scores.per_pair(pairs).values.any()


def test_a_reference_that_runs_the_policys_modules_is_refused(tokenizer):
    model = transformers.AutoModelForCausalLM.from_config(make_config("gpt2", len(tokenizer))).eval()
    reference = RewardHead.from_classifier(model, head=LogRatioHead(), tokenizer=tokenizer)
    with pytest.raises(ModelError, match="both run the same modules"):
        RewardHead.from_classifier(model, head=LogRatioHead(reference), tokenizer=tokenizer)


def test_gates_of_a_native_body_are_ablated_permanently(tmp_path, tokenizer):
    make_native("helium", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    head = RewardHead.from_pretrained(tmp_path)
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp_gate"), dtype=torch.bool)
    mask[1, 3:9] = True
    gates, pairs = NeuronSet(mask, "mlp_gate", head.architecture), make_pairs(3)
    with AblationContext(head, gates, Scale(0.3)):
        inside = head.score_pairs(pairs).margin
    assert torch.allclose(head.with_ablation(gates, Scale(0.3)).score_pairs(pairs).margin, inside, atol=1e-5)
    assert float((inside - head.score_pairs(pairs).margin).abs().max()) > 1e-3


def test_a_head_that_was_trained_after_opening_is_refused_by_every_reader(checkpoints, tokenizer):
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["llama"]).eval()
    head, pairs = RewardHead.from_classifier(classifier, tokenizer=tokenizer), make_pairs(3)
    head.score_pairs(pairs)
    one = NeuronSet(torch.arange(48) == torch.zeros(3, 1), "mlp", head.architecture)
    with torch.no_grad():
        classifier.score.weight.mul_(2)
    for run in (
        lambda: NeuronAttribution(head, "direct_effect").score(pairs),
        lambda: NeuronAttribution(head, "integrated_gradients", steps=2).score(pairs),
        lambda: score_without(head, pairs, [one, one]),
        lambda: head.with_ablation(one),
        lambda: head.save_pretrained("never-written"),
    ):
        with pytest.raises(ModelError, match="its score layer changed after the model was opened"):
            run()


@pytest.mark.parametrize("own", [OfPrompt(), ProcessHead(" cannot", torch.ones(32))])
def test_processed_weights_are_compared_on_a_text_that_the_head_can_read(own, checkpoints):
    pairs = PreferencePairs.from_records(
        [
            {"prompt": pair.prompt, "chosen": pair.chosen + " cannot", "rejected": "sure cannot"}
            for pair in make_pairs(3)
        ]
    )
    plain, processed = (
        RewardHead.from_pretrained(checkpoints["llama"], head=own, output=0, process_weights=processed)
        for processed in (False, True)
    )
    assert torch.allclose(processed.score_pairs(pairs).margin, plain.score_pairs(pairs).margin, atol=1e-4)
    assert plain.score_pairs(pairs).margin.any()
