"""Models of TransformerLens classes, on both major versions: opened, ablated permanently, saved, and opened again."""

import json

import pytest
import torch
from own_models import HAS_HOOKED_TRANSFORMER, KINDS, alone, make_own, ragged_ids, unembedding
from safetensors.torch import save_file
from tiny_models import grid, make_pairs
from transformer_lens.model_bridge import TransformerBridge

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead, Scale
from rmtension.data._tokens import TokenBatch
from rmtension.errors import CheckError, ModelError, OptionError
from rmtension.models._direct_path import direct_contributions

pytestmark = [
    pytest.mark.lens,
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning"),
]
CONFIGS = {
    "LN": {},
    "no norm, ReLU": {"normalization_type": None, "act_fn": "relu"},
    "RMS, gated, rotary": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 2,
    },
    "final RMS": {"final_rms": True},
    "only attention": {"attn_only": True},
    "bidirectional, no norm": {"attention_dir": "bidirectional", "normalization_type": None},
}


def open_own(kind, model, **options):
    columns, biases = unembedding(kind, model)
    return RewardHead(model, (columns[:, 7].tolist(), float(biases[7])), **options)


@pytest.mark.parametrize("changes", grid(CONFIGS.values(), keep=[CONFIGS["LN"], CONFIGS["no norm, ReLU"]]), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_equal_the_models_own_logits_alone(kind, changes):
    """In a batch whose padding is a token of the vocabulary; 1e-6 where native RMS norms are float32."""
    ids, mask = ragged_ids(pad=3)
    model = make_own(kind, **changes)
    head = open_own(kind, model)
    assert torch.allclose(head.score_tokens(ids, mask), alone(model, ids)[:, 7], atol=1e-6)
    table = head.check()
    assert table["passed"].all()
    assert "layers" in set(table["check"])


@pytest.mark.parametrize("kind", KINDS)
def test_seen_padding_is_refused(kind, monkeypatch):
    """The probe on opening, on a body that does not hide padding from bidirectional attention."""
    from rmtension.bodies._bodies import BootNativeBody
    from rmtension.bodies._hooked_transformer_body import HookedTransformerBody

    model = make_own(kind, attention_dir="bidirectional")
    assert open_own(kind, model).n_layers == 2
    if kind == "hooked":
        monkeypatch.setattr(HookedTransformerBody, "_hiding_padding", lambda *_: [])
    else:
        monkeypatch.setattr(
            TokenBatch, "position_mask", lambda batch, _: torch.ones_like(batch.input_ids, dtype=torch.bool)
        )
        assert BootNativeBody.residual
    with pytest.raises(ModelError, match=r"expected causal attention.*padding behind a text changes"):
        open_own(kind, model)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_alone_has_no_mlp(kind):
    head = open_own(kind, make_own(kind, attn_only=True))
    assert head.sites == ["attn_head"]
    with pytest.raises(ModelError, match=r"site 'mlp': this model has only attention.*Use site 'attn_head'"):
        head.n_neurons("mlp")
    with pytest.raises(ModelError, match=r"only attention"):
        ActivationCollector(head, site="mlp")


@pytest.mark.parametrize("changes", grid(CONFIGS.values(), keep=[CONFIGS["LN"], CONFIGS["no norm, ReLU"]]), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_direct_contributions_sum_to_the_reward(kind, changes):
    """Neurons, biases and the embedding; without a norm, a last neuron's part is what its ablation takes away."""
    head = open_own(kind, make_own(kind, **changes))
    ids, mask = ragged_ids()
    batch = TokenBatch.from_rows(ids, mask.bool())
    parts = direct_contributions(head, batch)
    assert torch.allclose(parts.reward, head.score_tokens(ids, mask), atol=1e-6)
    assert set(parts.neurons) == set(head.sites) - {"mlp_gate"}
    inside = sum(part.sum(dim=2) for part in parts.neurons.values()) + parts.biases
    assert torch.allclose(inside, parts.blocks, atol=1e-6)
    # Zeroing a neuron of the last layer of a model without norm changes the reward by its part, exactly.
    if head.model.cfg.normalization_type is None:
        changes_of = []
        for neuron in range(20):
            ablated = torch.zeros(2, 20, dtype=torch.bool).index_put(
                (torch.tensor(1), torch.tensor(neuron)), torch.tensor(True)
            )
            with AblationContext(head, NeuronSet(ablated, "mlp", head.architecture)):
                changes_of.append(parts.reward - head.score_tokens(ids, mask))
        assert torch.allclose(torch.stack(changes_of, dim=1), parts.neurons["mlp"][:, 1], atol=1e-9)
        assert parts.neurons["mlp"][:, 1].abs().max() > 1e-2


@pytest.mark.parametrize("site", grid(["mlp", "attn_head"]))
@pytest.mark.parametrize("changes", grid([CONFIGS["LN"], CONFIGS["bidirectional, no norm"]]), ids=["LN", "no norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_permanent_ablation_equals_the_context_and_comes_back_from_a_folder(kind, changes, site, tokenizer, tmp_path):
    pairs = make_pairs(4, longest=2)
    sizes = {"d_vocab": len(tokenizer), "n_ctx": 96}
    run_options = {"max_length": 90, "on_nonfinite": "skip"}
    model = make_own(kind, **sizes | changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = open_own(kind, model, tokenizer=tokenizer, pad_token_id=1, **run_options)
    mask = torch.rand(2, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.5
    neurons = NeuronSet(mask, site, head.architecture)
    statistics = ActivationCollector(head, site=site).collect(pairs)
    plain = head.score_pairs(pairs).margin
    for options in ({}, {"replacement": Scale(0.25)}, {"replacement": Mean(statistics)}):
        with AblationContext(head, neurons, **options):
            expected = head.score_pairs(pairs).margin
        ablated = head.with_ablation(neurons, **options)
        assert torch.allclose(ablated.score_pairs(pairs).margin, expected, atol=1e-9)
        assert not torch.allclose(expected, plain, atol=1e-3)
    ablated.save_pretrained(tmp_path / "saved")
    opened = RewardHead.from_pretrained(tmp_path / "saved", dtype=torch.float64, **run_options)
    assert opened.run_options == ablated.run_options == head.run_options
    assert torch.allclose(opened.score_pairs(pairs).margin, expected, atol=1e-9)
    assert (opened.pad_token_id, opened.architecture) == (1, head.architecture)
    assert torch.allclose(
        RewardHead.from_pretrained(tmp_path / "saved").score_pairs(pairs).margin.double(), expected, atol=1e-4
    )
    # The reopened head is ablated like any other, and the model is as it was.
    with AblationContext(opened, neurons):
        expected = opened.score_pairs(pairs).margin
    assert torch.allclose(opened.with_ablation(neurons).score_pairs(pairs).margin, expected, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(head.score_pairs(pairs).margin, plain)


def test_a_saved_model_opens_with_another_head_and_output(tmp_path, monkeypatch):
    """From the path of a file too, as a constructor takes it."""
    head = open_own("native", make_own("native"))
    head.save_pretrained(tmp_path / "model")
    rows = torch.stack([head.weight, -2 * head.weight]).contiguous()
    save_file({"score.weight": rows}, tmp_path / "rows.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    ids = torch.tensor([[3, 4, 5]])
    expected = -2 * (head.score_tokens(ids) - head.bias)
    for given in (rows, tmp_path / "rows.safetensors", str(tmp_path / "rows.safetensors")):
        for opened in (
            RewardHead.from_pretrained("~/model", head=given, output=1, dtype=torch.float64),
            RewardHead(head.model, given, output=1, pad_token_id=head.pad_token_id),
        ):
            assert torch.allclose(opened.score_tokens(ids), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_in_the_config_draws_nothing(kind, tmp_path):
    """Building a copy leaves the user's random numbers alone."""
    head = open_own(kind, make_own(kind, seed=3))
    state = torch.random.get_rng_state()
    head.save_pretrained(tmp_path)
    RewardHead.from_pretrained(tmp_path)
    head.with_ablation(NeuronSet(torch.ones(2, 4, dtype=torch.bool), "attn_head", head.architecture))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mean_has_no_place_in_a_gated_native_mlp(tokenizer):
    head = open_own(
        "native",
        make_own("native", d_vocab=len(tokenizer), n_ctx=96, **CONFIGS["RMS, gated, rotary"]),
        tokenizer=tokenizer,
    )
    statistics = ActivationCollector(head, site="mlp").collect(make_pairs(2, longest=2))
    neurons = NeuronSet(torch.ones(2, 20, dtype=torch.bool), "mlp", head.architecture)
    with pytest.raises(ModelError, match=r"gated MLP have none.*Zero\(\) needs no bias"):
        head.with_ablation(neurons, Mean(statistics))
    assert head.with_ablation(neurons).n_layers == 2
    with pytest.raises(ModelError, match=r"site 'mlp_gate'.*Use site 'mlp'"):
        head.n_neurons("mlp_gate")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_does_not_belong_together_is_refused(kind, tmp_path):
    head = open_own(kind, make_own(kind))
    head.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(OptionError, match=r"dtype, device, tokenizer, head and output; got \['revision'\]"):
        RewardHead.from_pretrained(tmp_path, revision="main")
    with pytest.raises(OptionError, match="with the weights that it was saved with"):
        RewardHead.from_pretrained(tmp_path, process_weights=True)
    about = json.loads((tmp_path / "transformer_lens.json").read_text())
    for change, message in (
        ({"config": about["config"] | {"act_fn": "relu"}}, r"another residual stream.*saved with transformer-lens"),
        ({"config": about["config"] | {"d_mlp": 21}}, r"damaged, or do not belong together"),
        ({"class": "Elsewhere"}, r"expected the class HookedTransformer or TransformerBridge"),
    ):
        (tmp_path / "transformer_lens.json").write_text(json.dumps(about | change))
        with pytest.raises(ModelError, match=message):
            RewardHead.from_pretrained(tmp_path)
    (tmp_path / "transformer_lens.json").write_text(json.dumps(about))
    ids, mask = ragged_ids()
    other = RewardHead.from_pretrained(tmp_path, dtype=torch.float64, head=[0.5] * 16)
    assert torch.equal(other.weight, torch.full((16,), 0.5, dtype=torch.float64))
    assert torch.allclose(
        RewardHead.from_pretrained(tmp_path, dtype=torch.float64).score_tokens(ids, mask), head.score_tokens(ids, mask)
    )


@pytest.mark.skipif(HAS_HOOKED_TRANSFORMER, reason="this transformer-lens has a HookedTransformer")
def test_a_hooked_transformer_needs_its_class(tmp_path):
    open_own("native", make_own("native")).save_pretrained(tmp_path)
    path = tmp_path / "transformer_lens.json"
    path.write_text(path.read_text().replace("TransformerBridge.boot_native", "HookedTransformer"))
    with pytest.raises(ModelError, match=r"HookedTransformer needs transformer-lens 3.*transformer-lens<4"):
        RewardHead.from_pretrained(tmp_path)


def test_a_native_bridge_in_compatibility_mode_needs_its_norm():
    """And one without a norm has no gain that could be folded away."""
    ids, mask = ragged_ids()
    for changes in ({}, {"normalization_type": None}):
        model = make_own("native", **changes)
        columns, _ = unembedding("native", model)
        weight = columns[:, 7].clone()
        expected = RewardHead(model, weight=weight).score_tokens(ids, mask)
        norm = make_own("native", **changes).ln_final.original_component
        model.enable_compatibility_mode(disable_warnings=True)
        if changes:
            assert torch.allclose(RewardHead(model, weight=weight).score_tokens(ids, mask), expected, atol=1e-6)
        else:
            with pytest.raises(ModelError, match=r"folded the gain.*final_norm="):
                RewardHead(model, weight=weight)
            head = RewardHead(model, weight=weight, final_norm=norm)
            assert torch.allclose(head.score_tokens(ids, mask), expected, atol=1e-6)


def test_bridges_of_something_else_are_refused():
    model = make_own("native")
    model.original_model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"boot_native, got a bridge around a Linear"):
        RewardHead(model, weight=torch.zeros(16))
    with pytest.raises(ModelError, match=r"expected a TransformerBridge or a HookedTransformer, got Linear"):
        RewardHead(torch.nn.Linear(2, 2), weight=torch.zeros(2))


def test_an_encoder_in_a_bridge_is_refused(tmp_path):
    """A BERT bridge runs without complaint, and every text would see the padding of the longest one."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=30
    )
    config.architectures = ["BertForMaskedLM"]
    bert = transformers.BertForMaskedLM(config).eval()
    bert.save_pretrained(tmp_path)
    from rmtension.bodies._bridges import _spare

    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=bert, tokenizer=_spare(None), device="cpu")
    with pytest.raises(
        ModelError, match=r"expected causal attention.*padding behind a text changes.*as an encoder does"
    ):
        RewardHead(bridge, weight=torch.zeros(16))


def test_the_check_still_fails_on_a_wrong_direct_path(monkeypatch):
    """Negative control: a projection that leaves out a neuron, whose part would pass for the bias."""
    from rmtension.bodies._projections import Projection

    head = open_own("native", make_own("native"))
    of = Projection.of

    def without_one(module):
        right = of(module)
        return Projection(
            right.read, right.written, lambda x: right.apply(x * (torch.arange(x.shape[-1]) > 0)), right.dtype
        )

    monkeypatch.setattr(Projection, "of", without_one)
    with pytest.raises(CheckError, match=r"direct contributions: nan.*is not what comes out of the projection"):
        head.check()


def test_direct_effects_of_pairs_have_one_value_per_neuron(tokenizer):
    head = open_own("native", make_own("native", d_vocab=len(tokenizer), n_ctx=96), tokenizer=tokenizer)
    pairs = make_pairs(3, longest=2)
    scores = NeuronAttribution(head, method="direct_effect").score(pairs)
    assert scores.values.shape == (2, 20)
    assert scores.values.abs().max() > 1e-3
