"""Rotary embeddings that depend on the longest text of a batch: a text is computed as if it ran alone."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import transformers
from tiny_models import grid, make_config

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.bodies._rope import RopeByText

PRETRAINED = 30  # tokens up to which the short frequencies hold


def longrope(factors):
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * factors,
        "long_factor": [4.0] * factors,
        "original_max_position_embeddings": PRETRAINED,
    }


def classifier(family, tokenizer):
    """Llama with longrope, Gemma-3 with longrope in its full-attention layers alone, Qwen-2 with dynamic NTK."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8}
    if family == "llama":
        config = make_config("llama", len(tokenizer), rope_parameters=longrope(4))
    elif family == "gemma3":
        rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": longrope(4)}
        kinds = ["sliding_attention", "full_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **make_config("llama", len(tokenizer)).to_dict()
            | sizes
            | {"rope_parameters": rope, "layer_types": kinds, "sliding_window": 64, "model_type": "gemma3_text"}
        )
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        shape = {
            key: getattr(make_config("llama", len(tokenizer)), key) for key in ("hidden_size", "intermediate_size")
        }
        config = transformers.Qwen2Config(
            **shape,
            vocab_size=len(tokenizer),
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            pad_token_id=1,
            num_labels=1,
            rope_parameters=rope,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module", params=grid(["llama", "gemma3", "qwen2"]))
def opened(request, tokenizer):
    """A head in float64, the classifier inside it, and texts of 2 to 60 tokens with their rewards alone."""
    model = classifier(request.param, tokenizer).double()
    texts = [" ".join(["how do i bake"] * n) for n in (1, 3, 8, 12, 2)]
    assert [len(tokenizer(text)["input_ids"]) > PRETRAINED for text in texts] == [False, False, True, True, False]
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[:, 0] for text in texts])
    return head, texts, alone


def test_rewards_in_a_batch_are_those_of_each_text_alone(opened):
    head, texts, alone = opened
    assert torch.allclose(head.score(texts), alone, atol=1e-6)  # norms of these families are float32
    assert torch.allclose(head.score(texts[::-1]), alone.flip(0), atol=1e-6)


def test_the_bridge_computes_what_transformers_computes(opened):
    """A hook of the user's makes the bridge run in place of transformers' modules."""
    head, texts, alone = opened
    with head.model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value)]):
        assert torch.allclose(head.score(texts), alone, atol=1e-5)


def test_without_rows_of_their_own_a_long_text_changes_the_short_ones(tokenizer, monkeypatch):
    model = classifier("llama", tokenizer)
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    right = head.score(["how do i", "how do i bake " * 8])
    monkeypatch.setattr(RopeByText, "for_texts", lambda self, batch: nullcontext())
    wrong = head.score(["how do i", "how do i bake " * 8])
    assert abs(float(wrong[0] - right[0])) > 1e-3
    assert wrong[1] == pytest.approx(float(right[1]), abs=1e-5)


def pairs_of(texts):
    return PreferencePairs.from_records(
        [{"prompt": "how", "chosen": a, "rejected": f"do {b}"} for a, b in pairwise(texts)]
    )


def test_statistics_scores_and_ablations_of_a_batch_are_those_of_each_pair_alone(opened):
    head, texts, _ = opened
    pairs = pairs_of(texts)
    singles = [pairs[n : n + 1] for n in range(len(pairs))]
    collected = ActivationCollector(head).collect(pairs)
    merged = ActivationCollector(head)
    for single in singles:
        merged.update(single)
    assert torch.allclose(collected.mean, merged.compute().mean, atol=1e-6)
    scorer = NeuronAttribution(head, method="gradient_x_activation")
    together = scorer.per_pair(pairs).values
    assert torch.allclose(together, torch.cat([scorer.per_pair(single).values for single in singles]), atol=1e-6)
    neurons = scorer.score(pairs).top(k=10)
    with AblationContext(head, NeuronSet(neurons.mask, "mlp", head.architecture)):
        inside = head.score_pairs(pairs).margin
        assert torch.allclose(inside, torch.cat([head.score_pairs(single).margin for single in singles]), atol=1e-6)


def test_texts_share_a_row_only_where_frequencies_are_the_same(tokenizer):
    head = RewardHead.from_classifier(classifier("llama", tokenizer), tokenizer=tokenizer)
    assert head.body.pack_up_to == PRETRAINED
    plain = RewardHead.from_classifier(classifier("qwen2", tokenizer), tokenizer=tokenizer)
    assert plain.body.pack_up_to == 96


def test_the_check_passes(opened):
    head, _, _ = opened
    assert head.check(pairs_of(["how do i", "how do i bake " * 8]))["passed"].all()
