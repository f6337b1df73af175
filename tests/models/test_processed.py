"""Models whose weights TransformerLens converted or processed: the final norm's gain is folded into the head."""

from importlib.metadata import version

import pytest
import torch
import transformers
from reference import transformers_rewards
from tiny_models import grid

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.errors import ModelError, OptionError
from rmtension.synthetic.check_matrix import make_classifier

pytestmark = pytest.mark.lens
HAS_HOOKED_TRANSFORMER = int(version("transformer-lens").split(".")[0]) < 4
WAYS = [{"process_weights": True}]
if HAS_HOOKED_TRANSFORMER:
    WAYS += [{"model_class": "HookedTransformer"}, {"model_class": "HookedTransformer", "process_weights": True}]
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        make_classifier(family, len(tokenizer) + 8).save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.parametrize("family", grid(FAMILIES))
def test_rewards_and_neurons_are_those_of_the_checkpoint(folders, ragged_texts, pairs, family, options, tmp_path):
    plain = RewardHead.from_pretrained(folders[family])
    # In float32: TransformerLens 3.9 processes Qwen2 to two dtypes otherwise.
    head = RewardHead.from_pretrained(folders[family], **options)
    assert torch.allclose(head.score(ragged_texts), plain.score(ragged_texts), atol=1e-5, rtol=0)
    table = head.check()
    assert table["passed"].all()
    assert "equal to transformers" in set(table["check"])
    # Neurons of the MLP mean the same: the same activations, and the same reward without them.
    ours, theirs = (ActivationCollector(scorer, site="mlp").collect(pairs) for scorer in (head, plain))
    assert torch.allclose(ours.mean, theirs.mean, atol=1e-5)
    mask = torch.rand(3, 128, generator=torch.Generator().manual_seed(0)) < 0.5
    rewards = []
    for scorer in (head, plain):
        with AblationContext(scorer, NeuronSet(mask, "mlp", scorer.architecture)):
            rewards.append(scorer.score(ragged_texts))
    assert torch.allclose(rewards[0], rewards[1], atol=1e-5)
    assert not torch.allclose(rewards[0], plain.score(ragged_texts), atol=1e-3)
    direct = [NeuronAttribution(scorer, method="direct_effect").score(pairs[:4]).values for scorer in (head, plain)]
    assert torch.allclose(*direct, atol=1e-4)
    assert direct[1].abs().max() > 1e-2
    neurons = NeuronSet(mask, "mlp", head.architecture)
    if "model_class" not in options:
        with pytest.raises(
            ModelError, match=r"save_pretrained: expected weights of transformers, .* that TransformerLens converted"
        ):
            head.save_pretrained("nowhere")
    else:  # what transformers has no class for is a state dict, which opens again
        head.with_ablation(neurons).save_pretrained(tmp_path)
        opened = RewardHead.from_pretrained(tmp_path)
        assert torch.allclose(opened.score(ragged_texts), rewards[0], atol=1e-5)
        assert opened.check()["passed"].all()


@pytest.mark.parametrize("family", grid(FAMILIES))
def test_a_bridge_in_compatibility_mode_needs_its_norm_and_keeps_rewards(folders, ragged_texts, tokenizer, family):
    """The user's own bridge: without the norm it is refused, with the norm it scores what transformers scores."""
    from transformer_lens.model_bridge import TransformerBridge

    load = transformers.AutoModelForSequenceClassification.from_pretrained
    classifier = load(folders[family], dtype=torch.float32).eval()
    expected = RewardHead.from_pretrained(folders[family]).score(ragged_texts)
    config = transformers.AutoConfig.from_pretrained(folders[family])
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    lm.base_model.load_state_dict(classifier.base_model.state_dict())
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(family, "norm")
    norm = getattr(classifier.base_model, norm)
    bridge = TransformerBridge.boot_transformers("local", hf_model=lm, tokenizer=tokenizer, device="cpu")
    options = {"weight": classifier.score, "tokenizer": tokenizer, "pad_token_id": 1}
    assert torch.allclose(RewardHead(bridge, **options).score(ragged_texts), expected, atol=1e-5)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelError, match=r"folded the gain.*final_norm="):
        RewardHead(bridge, **options)
    head = RewardHead(bridge, final_norm=norm, **options)
    assert torch.allclose(head.score(ragged_texts), expected, atol=1e-5)
    assert head.check(reference=classifier)["passed"].all()
    # Negative control: a norm with another gain gives other rewards.
    other = type(norm)(32)
    assert not torch.allclose(RewardHead(bridge, final_norm=other, **options).score(ragged_texts), expected, atol=1e-3)


def test_a_classifier_in_training_mode_is_processed_in_eval_mode(folders, ragged_texts, tokenizer):
    """Its dropout is off while the conversion is compared with it, and afterwards it trains on."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    classifier = load(folders["gpt2"], dtype=torch.float32).train()
    assert classifier.config.resid_pdrop > 0
    state = torch.random.get_rng_state()
    head = RewardHead.from_classifier(classifier, tokenizer=tokenizer, process_weights=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in classifier.modules())
    expected = RewardHead.from_pretrained(folders["gpt2"]).score(ragged_texts)
    assert torch.allclose(head.score(ragged_texts), expected, atol=1e-5)


@pytest.mark.skipif(HAS_HOOKED_TRANSFORMER, reason="this transformer-lens has a HookedTransformer")
def test_a_hooked_transformer_needs_transformer_lens_3(folders):
    with pytest.raises(ModelError, match=r"HookedTransformer needs transformer-lens 3.*transformer-lens<4"):
        RewardHead.from_pretrained(folders["gpt2"], model_class="HookedTransformer")


def test_a_conversion_that_differs_is_refused(folders, monkeypatch):
    """Rewards are compared on opening, because TransformerLens converts some families wrongly."""
    from rmtension.bodies import _bridges as wrapping

    boot = wrapping._boot

    def boot_wrong(name, base, tokenizer, trust_remote_code, **options):
        bridge = boot(name, base, tokenizer, trust_remote_code, **options)
        if options:
            with torch.no_grad():
                base.layers[0].mlp.down_proj.weight.mul_(1.2)
        return bridge

    monkeypatch.setattr(wrapping, "_boot", boot_wrong)
    with pytest.raises(ModelError, match=r"rewards of the converted .* differ .*by \d.*Open it without model_class"):
        RewardHead.from_pretrained(folders["llama"], process_weights=True)


def test_what_transformer_lens_raises_reaches_the_user(folders, monkeypatch):
    """Where it should have converted weights, and where its hook points are asked for; else the model opens without."""
    from rmtension.bodies import _bridges as wrapping

    def fail(*args, **options):
        raise KeyError("no adapter for this architecture")

    monkeypatch.setattr(wrapping, "_boot", fail)
    with pytest.raises(ModelError, match=r"could not wrap a LlamaModel.*KeyError.*no adapter.*families_measured"):
        RewardHead.from_pretrained(folders["llama"], process_weights=True)
    texts = ["how do i bake bread", "please help"]
    head = RewardHead.from_pretrained(folders["llama"])
    assert torch.allclose(head.score(texts), transformers_rewards(folders["llama"], texts), atol=1e-5)
    neurons = NeuronSet.from_indices(
        [(0, 1)], shape=(3, head.n_neurons("mlp")), site="mlp", architecture=head.architecture
    )
    with pytest.raises(OptionError, match=r"LlamaModel without a TransformerBridge .*KeyError.*no adapter"):
        head.fwd_hooks(neurons)
