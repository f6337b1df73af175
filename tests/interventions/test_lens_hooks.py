"""Ablations as TransformerLens' hooks, against `AblationContext`, in float64; and sets of neurons as plain dicts."""

import json

import pytest
import torch
from tiny_models import FAMILIES, grid, make_pairs, save_classifier, unchecked

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronSet,
    OtherResponse,
    Resample,
    RewardHead,
    Scale,
    Zero,
)
from rmtension.errors import ModelError, OptionError, ProvenanceError

pytestmark = pytest.mark.lens


def some_neurons(head, site, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=generator) < 0.3
    mask[1], mask[0, 0], mask[2, 1] = False, True, True
    return NeuronSet(mask, site, head.architecture)


def rewards_with(head, ids, hooks, **options):
    """The rewards that TransformerLens computes by itself, read from what it says is the stream after the norm."""
    kept = []
    names = [*hooks, ("ln_final.hook_out", lambda value, hook: kept.append(value))]
    with torch.no_grad():
        head.model.run_with_hooks(ids, fwd_hooks=names, return_type=None, **options)
    return head.read(kept[0][:, -1])


@pytest.mark.parametrize("site", grid(["mlp", "attn_head", "mlp_gate"]))
@pytest.mark.parametrize("kind", ["zero", "mean", "scale"])
def test_hooks_equal_the_context(exact_head, site, kind):
    """1e-9 of rewards of size 1: a bridge computes attention in steps, and norms of Llama stay float32 (1e-6)."""
    head, neurons = exact_head, some_neurons(exact_head, site)
    statistics = ActivationCollector(head, site=site).collect(make_pairs(4))
    replacement = {"zero": Zero(), "mean": Mean(statistics), "scale": Scale(-0.5)}[kind]
    ids = torch.randint(2, 300, (4, 9), generator=torch.Generator().manual_seed(1))
    if (kind, site) == ("mean", "mlp_gate") and "llama" in head.architecture:
        with pytest.raises(OptionError, match="has no hook point"):
            head.fwd_hooks(neurons, replacement)
        return
    hooks = head.fwd_hooks(neurons, replacement)
    assert [name.split(".")[1] for name, _ in hooks] == ["0", "2"], "layers without neurons have no hook"
    rewards = rewards_with(head, ids, hooks)
    with AblationContext(head, neurons, replacement):
        expected = head.score_tokens(ids)
    tolerance = 1e-6 if "llama" in head.architecture else 1e-9
    assert float((rewards - expected).abs().max()) < tolerance
    # Controls: without the hooks, and with those of other neurons, the rewards are others.
    assert float((head.score_tokens(ids) - expected).abs().min()) > 1e-4
    other = some_neurons(head, site, seed=1)
    wrong = rewards_with(head, ids, head.fwd_hooks(other, replacement))
    assert float((wrong - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("family", grid(FAMILIES))
def test_left_padding_changes_no_reward(family, checkpoints):
    """TransformerLens masks it, and nothing of it reaches a real token.

    In float32: in float64 a Llama bridge gives NaN for a text padded on the left, without any hook of ours too.
    """
    head = RewardHead.from_pretrained(checkpoints[family])
    neurons = some_neurons(head, "mlp")
    ids = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 1, 0
    rewards = rewards_with(head, ids, head.fwd_hooks(neurons), attention_mask=mask)
    with AblationContext(head, neurons):
        expected = head.score_tokens(ids, mask)
    assert float((rewards - expected).abs().max()) < 1e-5


def test_hooks_work_inside_calls_of_the_head(head, pairs):
    neurons = some_neurons(head, "mlp")
    with head.model.hooks(fwd_hooks=head.fwd_hooks(neurons)):
        scored = head.score_pairs(pairs)
    with AblationContext(head, neurons):
        expected = head.score_pairs(pairs)
    assert torch.allclose(scored.margin, expected.margin, atol=1e-5)


def test_replacements_that_depend_on_the_text_are_refused(head, pairs):
    neurons = some_neurons(head, "mlp")
    with pytest.raises(OptionError, match=r"got Resample, which depends on the text.*AblationContext"):
        head.fwd_hooks(neurons, Resample(ActivationCollector(head).sample(pairs, n=4)))
    with pytest.raises(OptionError, match=r"replacement: OtherResponse\(\) needs both texts"):
        head.fwd_hooks(neurons, OtherResponse())
    with pytest.raises(ProvenanceError, match="the model is"):
        head.fwd_hooks(NeuronSet(neurons.mask, "mlp", "another"))


def test_an_inexact_bridge_is_refused(checkpoints, monkeypatch):
    head = RewardHead.from_pretrained(checkpoints["gpt2"])
    monkeypatch.setattr(head.body, "_bridge_error", 0.5)
    with pytest.raises(ModelError, match="the TransformerBridge of GPT2Model is off"):
        head.fwd_hooks(some_neurons(head, "mlp"))


class TestDict:
    def test_sets_load_from_json_as_saved(self, head):
        for site in ("mlp", "attn_head"):
            neurons = some_neurons(head, site)
            text = json.dumps(neurons.to_dict())
            assert NeuronSet.from_dict(json.loads(text)) == neurons
            assert json.loads(text) == neurons.to_dict()
            by_hand = {}
            for layer, neuron in neurons.mask.nonzero().tolist():
                by_hand.setdefault(str(layer), []).append(neuron)
            assert neurons.to_dict()["neurons"] == by_hand
        empty = neurons - neurons
        assert NeuronSet.from_dict(empty.to_dict()) == empty

    def test_layers_may_be_numbers(self):
        values = {"site": "mlp", "architecture": "toy", "shape": (2, 3), "neurons": {1: (0, 2)}}
        assert list(NeuronSet.from_dict(values)) == [(1, 0), (1, 2)]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"more": 1}, "exactly the keys"),
            ({"site": 3}, "site: expected a text"),
            ({"shape": 3}, "shape: expected .number of layers"),
            ({"shape": [2, 2.5]}, "shape: expected .number of layers"),
            ({"neurons": [1]}, "neurons: expected a dict from layers"),
            ({"neurons": {"1": 3}}, "neurons: expected a dict from layers"),
            ({"neurons": {"one": [3]}}, "indices: expected"),
            ({"neurons": {"-1": [0]}}, "indices: expected"),
            ({"neurons": {"9" * 5000: [0]}}, "indices: expected"),
            ({"neurons": {"1": [True]}}, "indices: expected"),
            ({"neurons": {"1": [3]}}, "outside a model with 2 layers of 3 neurons"),
        ],
    )
    def test_wrong_dicts_are_refused(self, change, message, monkeypatch):
        monkeypatch.setattr(NeuronSet, "from_indices", classmethod(unchecked(NeuronSet.from_indices.__func__)))
        values = {"site": "mlp", "architecture": "toy", "shape": [2, 3], "neurons": {"1": [0, 2]}} | change
        with pytest.raises(OptionError, match=message):
            unchecked(NeuronSet.from_dict.__func__)(NeuronSet, values)


def test_processed_weights_give_the_same_rewards(tmp_path, tokenizer):
    """Weights that TransformerLens folded and centred: the same hook names, the same rewards."""
    folder = save_classifier(tmp_path / "model", "gpt2", tokenizer)
    head = RewardHead.from_pretrained(folder, process_weights=True, dtype=torch.float64)
    neurons = some_neurons(head, "mlp")
    ids = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    with AblationContext(head, neurons):
        expected = head.score_tokens(ids)
    with head.model.hooks(fwd_hooks=head.fwd_hooks(neurons)):
        assert torch.allclose(head.score_tokens(ids), expected, atol=1e-9)
