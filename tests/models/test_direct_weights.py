"""Direct weights: against direct contributions, against a product of the checkpoint's tensors, and autograd."""

import pytest
import torch
from reference import Reference
from tiny_models import grid, make_pairs, make_tokenizer, save_classifier

from rmtension import RewardHead
from rmtension.data._tokens import TokenBatch
from rmtension.models import direct_contributions
from rmtension.models._direct_weights import direct_weights, token_weights, unembedding

WANTED = [(0, 3), (0, 5), (1, 0), (2, 1), (2, 40)]
# Norms of Llama compute in float32, whatever the model's dtype.
CLOSE = {"gpt2": 1e-9, "llama": 2e-6, "gpt_neox": 1e-9}


def batch_of(head, pairs):
    encoded = head.encode(pairs)
    texts = [*encoded.chosen, *encoded.rejected]
    return TokenBatch.from_texts(texts, range(len(texts)), read_at=head.read_at, device=head.device)


@pytest.fixture(scope="module", params=["gpt2", "llama", *grid(["gpt_neox"], keep=[])])
def family(request):
    return request.param


def test_weights_are_contributions_times_sigma_over_activations(family, checkpoints):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    pairs = make_pairs(4)
    batch = batch_of(head, pairs)
    found = direct_weights(head, batch, "mlp", WANTED)
    assert found.reason == ""
    parts = direct_contributions(head, batch).neurons["mlp"]
    # Activations and sigma of transformers itself, by plain hooks.
    reference = Reference(checkpoints[family])
    seen = {}
    base = reference.model.base_model
    norm = next(getattr(base, name) for name in ("ln_f", "norm", "final_layer_norm") if hasattr(base, name))
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.update(x=inputs[0].detach().cpu()[0, -1]))
    for number, (pair, side) in enumerate([(pair, side) for side in ("chosen", "rejected") for pair in pairs]):
        ids, _ = reference.tokens(pair, side)
        activation = reference.activations("mlp", ids)[:, -1]
        reference.reward(ids)
        x = seen["x"]
        centred = x - x.mean() if family != "llama" else x
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        sigma = (centred.square().mean() + eps).sqrt()
        for weight, index in zip(found.on_reward, WANTED, strict=True):
            expected = parts[number][index] * sigma / activation[index]
            assert float(weight) == pytest.approx(float(expected), rel=CLOSE[family], abs=1e-9)
    handle.remove()
    # Negative control: another neuron's weight, and no division by sigma, differ.
    assert not torch.allclose(found.on_reward[1:], found.on_reward[:-1], rtol=1e-3)
    assert abs(float(sigma) - 1) > 0.01


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_are_a_product_of_the_checkpoints_tensors(family, checkpoints):
    head = RewardHead.from_pretrained(checkpoints[family], dtype=torch.float64)
    model = Reference(checkpoints[family]).model
    found = direct_weights(head, batch_of(head, make_pairs(1)), "mlp", WANTED)
    for number, (layer, neuron) in enumerate(WANTED):
        if family == "gpt2":
            column = model.transformer.h[layer].mlp.c_proj.weight[neuron]
            gain, column = model.transformer.ln_f.weight, column - column.mean()
        else:
            column, gain = model.model.layers[layer].mlp.down_proj.weight[:, neuron], model.model.norm.weight
        expected = float((model.score.weight[0] * gain * column).sum().detach())
        assert float(found.on_reward[number]) == pytest.approx(expected, rel=1e-6)
        assert torch.allclose(found.read[number], (gain * column).detach().cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_promoted_tokens_are_the_slopes_of_a_language_models_logits(family, tmp_path):
    """Along the output column, with the scale of the final norm frozen, the logits of transformers' own model."""
    import transformers
    from tiny_models import make_config

    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family, len(tokenizer))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = model.double()
    weight = torch.randn(32)
    head = RewardHead.from_pretrained(tmp_path / "model", head=(weight, 0.0), dtype=torch.float64)
    found = direct_weights(head, batch_of(head, make_pairs(1)), "mlp", WANTED)
    rows = unembedding(head)
    assert torch.equal(rows.double(), model.lm_head.weight)
    weights = token_weights(found.read, rows)
    for number, (layer, neuron) in enumerate(WANTED):
        if family == "gpt2":
            column, norm = model.transformer.h[layer].mlp.c_proj.weight[neuron], model.transformer.ln_f
        else:
            column, norm = model.model.layers[layer].mlp.down_proj.weight[:, neuron], model.model.norm
        # The logits' derivative along the column, by autograd through transformers' norm, at a stream that the column
        # does not lengthen: there, the scale of the norm does not change to first order.
        x = torch.randn(32, dtype=torch.float64)
        u, c = (v - v.mean() if family == "gpt2" else v for v in (x, column.detach()))
        u = u - c * (u @ c) / (c @ c)
        _, slope = torch.autograd.functional.jvp(
            lambda x, norm=norm: model.lm_head(norm(x[None]))[0], u, column.detach()
        )
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        exact = slope * (u.square().mean() + eps).sqrt()
        exact = exact - exact.mean()
        assert torch.allclose(weights[number], exact, rtol=1e-5, atol=1e-6)
        assert float(weights[number].mean()) == pytest.approx(0, abs=1e-12)


def test_a_classifier_has_an_unembedding_only_if_it_is_tied(checkpoints, tokenizer, tmp_path):
    tied = RewardHead.from_pretrained(checkpoints["gpt2"])
    assert torch.equal(unembedding(tied), Reference(checkpoints["gpt2"], torch.float32).model.transformer.wte.weight)
    assert unembedding(RewardHead.from_pretrained(checkpoints["llama"])) is None
    loose = save_classifier(tmp_path, "gpt2", tokenizer, tie_word_embeddings=False)
    assert unembedding(RewardHead.from_pretrained(loose)) is None


def test_a_neuron_without_a_direct_weight_says_why(head, tokenizer, tmp_path):
    batch = batch_of(head, make_pairs(1))
    for site, reason in (("attn_head", "one direction for each of its channels"), ("mlp_gate", "one factor")):
        found = direct_weights(head, batch, site, [(0, 1)])
        assert found.on_reward.isnan().all()
        assert found.read is None
        assert reason in found.reason
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gemma = RewardHead.from_pretrained(tmp_path)
    found = direct_weights(gemma, batch_of(gemma, make_pairs(1)), "mlp", WANTED)
    assert found.on_reward.isnan().all()
    assert "normalises or scales" in found.reason


def test_a_wrong_weight_would_be_seen(head, monkeypatch):
    """The comparison with direct contributions rejects weights through another norm."""
    from rmtension.models import _direct_weights

    right = _direct_weights.read_norm

    def wrong(norm, width):
        layer = right(norm, width)
        return type(layer)(layer.gain.roll(1), layer.bias, layer.centred)

    batch = batch_of(head, make_pairs(1))
    assert direct_weights(head, batch, "mlp", WANTED).reason == ""
    monkeypatch.setattr(_direct_weights, "read_norm", wrong)
    assert direct_weights(head, batch, "mlp", WANTED).on_reward.isnan().all()


def test_silent_layers_do_not_hide_the_weights(tmp_path):
    """On a text without any planted word, the neurons of an organism contribute nothing but rounding."""
    from rmtension.synthetic import make_organism

    organism = make_organism(tmp_path, depth=2, width=24, per_kind=2, n_pairs=8)
    planted = organism.head()
    tokens = planted.tokenizer(["Human: a"], return_tensors="pt")
    batch = TokenBatch.from_rows(tokens["input_ids"], tokens["attention_mask"].bool())
    wanted = list(organism.truth["helpful"])
    found = direct_weights(planted, batch, "mlp", wanted)
    assert (found.on_reward > 0).all()
    assert (direct_weights(planted, batch, "mlp", list(organism.truth["decoy"])).on_reward == 0).all()
