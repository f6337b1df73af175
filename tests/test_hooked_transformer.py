"""A HookedTransformer of TransformerLens 3.x under the same head, scores and ablations."""

import copy
from importlib.metadata import version

import pytest
import torch
import transformer_lens

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import ModelError

if int(version("transformer-lens").split(".")[0]) >= 4:
    pytest.skip("TransformerLens 4 removed HookedTransformer", allow_module_level=True)

# 3.x says so at every construction.
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")


def hooked(vocab_size, **changes):
    torch.manual_seed(0)
    sizes = {"n_layers": 3, "d_model": 32, "n_ctx": 96, "d_head": 8, "n_heads": 4, "d_mlp": 48, "act_fn": "gelu_new"}
    config = transformer_lens.HookedTransformerConfig(
        **sizes | {"normalization_type": "LN", "d_vocab": vocab_size, "dtype": torch.float64, "device": "cpu"} | changes
    )
    model = transformer_lens.HookedTransformer(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return hooked(len(tokenizer))


@pytest.fixture(scope="module")
def head(model, tokenizer):
    """The reward is the model's own logit of token 7: its column of the unembedding, and its bias."""
    return RewardHead(model, weight=model.W_U[:, 7], bias=model.b_U[7].item(), tokenizer=tokenizer)


def test_rewards_equal_logits(model, head, ragged_texts):
    """TransformerLens' own logits, one text at a time, against batches; 1e-12 in float64."""
    with torch.no_grad():
        tokens = [head.tokenizer(text, return_tensors="pt")["input_ids"] for text in ragged_texts]
        expected = [model(ids, return_type="logits")[0, -1, 7] for ids in tokens]
    assert float((head.score(ragged_texts) - torch.stack(expected)).abs().max()) < 1e-12
    for side in ("left", "right"):
        tokens = head.tokenizer(ragged_texts, return_tensors="pt", padding=True, padding_side=side)
        rewards = head.score_tokens(tokens["input_ids"], tokens["attention_mask"])
        assert float((rewards - torch.stack(expected)).abs().max()) < 1e-12


def test_the_models_own_tokenizer_hides_no_token(model, head, monkeypatch):
    """TransformerLens guesses a mask from pad tokens where the model has a tokenizer that pads on the left."""
    text = "<pad><pad>bake a<pad> cake"
    with torch.no_grad():
        expected = model(head.tokenizer(text, return_tensors="pt")["input_ids"], return_type="logits")[0, -1, 7]
    tokenizer = copy.deepcopy(head.tokenizer)
    tokenizer.padding_side = "left"
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    assert abs(float(head.score([text])[0] - expected)) < 1e-12


@pytest.mark.parametrize("site", ["mlp", "attn_head"])
def test_ablation_and_scores_equal_hooks_of_transformer_lens(model, head, pairs, site):
    mask = torch.rand(3, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.5
    name = {"mlp": "mlp.hook_post", "attn_head": "attn.hook_z"}[site]

    def zero(activation, hook):
        chosen = mask[hook.layer()]
        return torch.where(chosen if site == "mlp" else chosen[:, None], 0.0, activation)

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.{name}", zero) for layer in range(3)]):
        expected = head.score_pairs(pairs).margin
    with AblationContext(head, NeuronSet(mask, site, head.architecture)):
        assert torch.allclose(head.score_pairs(pairs).margin, expected, atol=1e-12)
    with model.hooks(fwd_hooks=head.fwd_hooks(NeuronSet(mask, site, head.architecture))):
        assert torch.allclose(head.score_pairs(pairs).margin, expected, atol=1e-12)
    assert not torch.allclose(head.score_pairs(pairs).margin, expected, atol=1e-3)
    statistics = ActivationCollector(head, site=site).collect(pairs[:1])
    ids = [head.encode(pairs[:1]).chosen[0].ids, head.encode(pairs[:1]).rejected[0].ids]
    runs = [model.run_with_cache(torch.tensor([one]))[1][f"blocks.1.{name}"][0].flatten(1) for one in ids]
    assert torch.allclose(statistics.channel_mean[1], torch.cat(runs).mean(0), atol=1e-12)


def test_gradients_equal_finite_differences(head, pairs):
    """sum_t a dM/da is d M(alpha a) / d alpha at 1: a central difference with the `scale` ablation, good to 1e-6."""
    scores = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    for place in ((0, 3), (1, 7), (2, 40)):
        neuron = NeuronSet.from_indices([place], shape=(3, 48), site="mlp", architecture=head.architecture)
        margins = []
        for alpha in (1 + 1e-4, 1 - 1e-4):
            with AblationContext(head, neuron, mode="scale", alpha=alpha):
                margins.append(head.score_pairs(pairs).margin.mean())
        slope = float(margins[0] - margins[1]) / 2e-4
        assert float(scores.values[place]) == pytest.approx(slope, abs=1e-6)


def test_folded_final_norm(model, head, tokenizer, ragged_texts):
    """Folding by TransformerLens' own code; the head gets the norm as it was before."""
    config = copy.deepcopy(model.cfg)
    config.normalization_type = "LNPre"
    folded = transformer_lens.HookedTransformer(config)
    folded.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    options = {"weight": model.W_U[:, 7], "bias": model.b_U[7].item(), "tokenizer": tokenizer}
    with pytest.raises(ModelError, match=r"final_norm=.*from_pretrained_no_processing"):
        RewardHead(folded, **options)
    absorbed = RewardHead(folded, final_norm=model.ln_final, **options)
    # 1e-9: the norm's gain is measured from outside, to epsilon over the square of the probe.
    assert torch.allclose(absorbed.score(ragged_texts), head.score(ragged_texts), atol=1e-9)
    assert absorbed.check()["passed"].all()
