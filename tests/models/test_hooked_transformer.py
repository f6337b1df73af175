"""A HookedTransformer of TransformerLens 3.x under the same head, scores and ablations."""

import copy
from importlib.metadata import version

import pytest
import torch
import transformer_lens
from own_models import alone, make_own, ragged_ids

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead, Scale
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, OptionError
from rmtension.models._direct_path import direct_contributions

if int(version("transformer-lens").split(".")[0]) >= 4:
    pytest.skip("TransformerLens 4 removed HookedTransformer", allow_module_level=True)

# 3.x says so at every construction.
pytestmark = [pytest.mark.lens, pytest.mark.filterwarnings("ignore:Hooked.* is deprecated:DeprecationWarning")]


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
    return RewardHead(model, (model.W_U[:, 7], model.b_U[7].item()), tokenizer=tokenizer)


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


def test_left_padding_of_the_model_tokenizer_hides_no_token(model, head, monkeypatch):
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
    runs = [model.run_with_cache(torch.tensor([row]))[1][f"blocks.1.{name}"][0].flatten(1) for row in ids]
    assert torch.allclose(statistics.channel_mean[1], torch.cat(runs).mean(0), atol=1e-12)


def test_gradients_equal_finite_differences(head, pairs):
    """sum_t a dM/da is d M(alpha a) / d alpha at 1: a central difference with the `scale` ablation, good to 1e-6."""
    scores = NeuronAttribution(head, method="gradient_x_activation").score(pairs)
    for index in ((0, 3), (1, 7), (2, 40)):
        neuron = NeuronSet.from_indices([index], shape=(3, 48), site="mlp", architecture=head.architecture)
        margins = []
        for alpha in (1 + 1e-4, 1 - 1e-4):
            with AblationContext(head, neuron, Scale(alpha)):
                margins.append(head.score_pairs(pairs).margin.mean())
        slope = float(margins[0] - margins[1]) / 2e-4
        assert float(scores.values[index]) == pytest.approx(slope, abs=1e-6)


def test_folded_final_norm(model, head, tokenizer, ragged_texts):
    """Folding by TransformerLens' own code; the head gets the norm as it was before."""
    config = copy.deepcopy(model.cfg)
    config.normalization_type = "LNPre"
    folded = transformer_lens.HookedTransformer(config)
    folded.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    options = {"weight": (model.W_U[:, 7], model.b_U[7].item()), "tokenizer": tokenizer}
    with pytest.raises(ModelError, match=r"final_norm=.*from_pretrained_no_processing"):
        RewardHead(folded, **options)
    absorbed = RewardHead(folded, final_norm=model.ln_final, **options)
    # 1e-9: the norm's gain is measured from outside, to epsilon over the square of the probe.
    assert torch.allclose(absorbed.score(ragged_texts), head.score(ragged_texts), atol=1e-9)
    assert absorbed.check()["passed"].all()


# Whatever a config may say about attention, positions, norms and MLPs.
ODD = {
    "shortformer": {"positional_embedding_type": "shortformer"},
    "rotary": {"positional_embedding_type": "rotary"},
    "yarn": {"positional_embedding_type": "rotary", "use_yarn_rope": True},
    "alibi": {"positional_embedding_type": "alibi", "n_heads": 3},
    "alibi, bidirectional": {"positional_embedding_type": "alibi", "attention_dir": "bidirectional"},
    "windows": {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"]},
    "no BOS, results of heads": {"default_prepend_bos": False, "use_attn_result": True},
    "split inputs": {"use_split_qkv_input": True, "use_hook_mlp_in": True, "use_hook_tokens": True},
    "norm of the embedding": {"post_embedding_ln": True},
    "parallel, LNPre": {"parallel_attn_mlp": True, "normalization_type": "LNPre"},
    "gated": {"gated_mlp": True},
    "norms after": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
    "norms after, of the output alone": {"original_architecture": "Olmo2ForCausalLM", "normalization_type": "RMS"},
    "solu": {"act_fn": "solu_ln"},
    "experts": {"num_experts": 3, "experts_per_token": 2},
    "sinks, caps, log-n": {
        "use_attention_sinks": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 3.0,
        "use_logn_attn": True,
        "train_seq_length": 6,
        "use_qk_norm": True,
    },
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_unusual_configs_give_the_same_reward_alone_and_in_a_batch(changes):
    """The stream that `model(ids)` unembeds, of a model that has run nothing before; layers sum to 1e-9."""
    ids, mask = ragged_ids(pad=3)
    model = make_own("hooked", **changes)
    norm = model.ln_final if str(model.cfg.normalization_type).endswith("Pre") else None
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head = RewardHead(model, weight=weight, final_norm=norm)
    rewards = head.score_tokens(ids, mask)
    # Again, without the longest text, whose biases ALiBi keeps. Another batch may be multiplied in another order.
    assert torch.allclose(head.score_tokens(ids[1:], mask[1:]), rewards[1:], rtol=0, atol=1e-12)

    def stream(row):
        seen = []
        fresh = make_own("hooked", **changes)
        fresh.ln_final.register_forward_hook(lambda module, inputs, output: seen.append(output))
        fresh(row)
        return seen[0][0, -1] @ head.weight

    with torch.no_grad():
        expected = torch.stack([stream(row[None, kept.bool()]) for row, kept in zip(ids, mask, strict=True)])
    assert torch.allclose(rewards, expected, atol=1e-9)
    parts = direct_contributions(head, TokenBatch.from_rows(ids, mask.bool()))
    assert torch.allclose(parts.reward, rewards, atol=1e-6)
    if changes.get("num_experts") is None:
        inside = sum(part.sum(dim=2) for part in parts.neurons.values()) + parts.biases
        assert torch.allclose(inside, parts.blocks, atol=1e-7)


def test_direct_effects_are_the_written_vectors_behind_a_frozen_norm():
    """W_out's row times the activation, through the norm behind the MLP and the final one, with both scales frozen."""
    ids, _ = ragged_ids()
    for changes in (ODD["norms after"], {}):
        model = make_own("hooked", **changes)
        weight = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        head = RewardHead(model, weight=weight)
        with torch.no_grad():
            _, cache = model.run_with_cache(ids[:1])
        batch = TokenBatch.from_rows(ids[:1], torch.ones_like(ids[:1], dtype=torch.bool))
        neurons_of = direct_contributions(head, batch).neurons
        gain = model.ln_final.w / cache["ln_final.hook_scale"][0, -1]
        for layer, block in enumerate(model.blocks):
            written = {
                "mlp": cache[f"blocks.{layer}.mlp.hook_post"][0, -1][:, None] * block.mlp.W_out,
                "attn_head": torch.einsum("hd,hdm->hm", cache[f"blocks.{layer}.attn.hook_z"][0, -1], block.attn.W_O),
            }
            for site, after in (("mlp", "ln2_post"), ("attn_head", "ln1_post")):
                vectors = written[site]
                if changes:
                    scale = cache[f"blocks.{layer}.{after}.hook_scale"][0, -1]
                    vectors = vectors / scale * getattr(block, after).w
                else:
                    vectors = vectors - vectors.mean(dim=-1, keepdim=True)
                assert torch.allclose(neurons_of[site][0, layer], (vectors * gain) @ weight, atol=1e-7)


def test_positions_that_depend_on_the_longest_text_need_a_limit():
    """Dynamic NTK: the advice of the error is followed, and then a text is what it is alone."""
    changes = {"use_dynamic_ntk_rope": True, "train_seq_length": 6, "positional_embedding_type": "rotary"}
    model = make_own("hooked", **changes)
    with pytest.raises(OptionError, match=r"max_length: expected at most 6, got 24.*Pass max_length=6"):
        RewardHead(model, weight=[1.0] * 16)
    ids, mask = ragged_ids()
    head = RewardHead(model, weight=model.W_U[:, 7], max_length=6)
    rewards = head.score_tokens(ids[:, :6], mask[:, :6])
    with torch.no_grad():
        # Layer norm's output times the unembedding without its bias.
        expected = torch.stack(
            [model(row[None, kept.bool()])[0, -1, 7] for row, kept in zip(ids[:, :6], mask[:, :6], strict=True)]
        )
    assert torch.allclose(rewards + model.b_U[7], expected, atol=1e-9)
    assert head.check()["passed"].all()


def test_a_bidirectional_model_ignores_padding():
    """Without hidden padding the same batch gives other rewards: the check below can fail."""
    ids, mask = ragged_ids(pad=3)
    model = make_own("hooked", attention_dir="bidirectional")
    head = RewardHead(model, (model.W_U[:, 7], model.b_U[7].item()))
    expected = alone(model, ids)[:, 7]
    assert torch.allclose(head.score_tokens(ids, mask), expected, atol=1e-9)
    with torch.no_grad():
        seen = model(ids)[torch.arange(len(ids)), mask.sum(1) - 1, 7]
    assert (seen - expected).abs().max() > 0.1


def test_a_dtype_that_the_config_does_not_know_is_refused():
    """`model.double()` leaves norms in float32; what the error says is done, and works."""
    model = make_own("hooked").to(torch.float32, print_details=False).double()
    with pytest.raises(ModelError, match=r"weights of torch.float64 and a config of torch.float32.*model.to"):
        RewardHead(model, weight=[1.0] * 16)
    assert RewardHead(model.to(torch.float64, print_details=False), weight=[1.0] * 16).dtype == torch.float64
    experts = hooked(13, n_layers=2, num_experts=2, experts_per_token=1)
    with pytest.raises(ModelError, match=r"weights of torch.float32 and torch.float64"):
        RewardHead(experts, weight=[1.0] * 32)
    assert RewardHead(experts.to(torch.float64, print_details=False), weight=[1.0] * 32).sites == ["attn_head"]


def test_encoders_and_folded_norms_are_refused_with_a_remedy():
    encoder = transformer_lens.HookedEncoder(
        transformer_lens.HookedTransformerConfig(
            n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_mlp=8, act_fn="gelu", d_vocab=9, device="cpu"
        )
    )
    with pytest.raises(
        ModelError, match=r"expected a decoder.*got a HookedEncoder, which has no final residual stream"
    ):
        RewardHead(encoder, weight=[1.0] * 8)
    toy = make_own("hooked", normalization_type="RMSPre")
    with pytest.raises(ModelError, match=r"never had a gain.*final_norm=model.ln_final"):
        RewardHead(toy, weight=toy.W_U[:, 7])
    ids, mask = ragged_ids()
    head = RewardHead(toy, (toy.W_U[:, 7], toy.b_U[7].item()), final_norm=toy.ln_final)
    # 1e-6: the gain is measured, in float32 because the norm has no parameter.
    assert torch.allclose(head.score_tokens(ids, mask), alone(toy, ids)[:, 7], atol=1e-6)


def test_alibi_biases_are_restored():
    """Those that attention keeps are the user's, after a run, an error in a hook, or an interrupt."""
    model = make_own("hooked", **ODD["alibi"])
    head = RewardHead(model, weight=[1.0] * 16)
    ids, mask = ragged_ids()
    assert [block.attn.alibi for block in model.blocks] == [None, None]
    model(ids)
    kept = [block.attn.alibi for block in model.blocks]
    head.score_tokens(ids[:, :3], mask[:, :3])

    def fail(layer, activation):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), head.hooks("mlp", fail):
        head.score_tokens(ids, mask)
    assert all(block.attn.alibi is biases for block, biases in zip(model.blocks, kept, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
