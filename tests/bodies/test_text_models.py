"""Reward models inside a class for text and images open as their language model; other kinds are refused."""

import subprocess

import pytest
import torch
import transformers
from reference import kept_inputs, zeroed_inputs
from safetensors.torch import save_file
from some_neurons import some
from tiny_models import grid, make_pairs
from vision_models import KINDS, make_vision_model

from rmtension import AblationContext, NeuronAttribution, RewardHead
from rmtension.bodies._text_models import media_tokens, text_model
from rmtension.errors import DataError, ModelError

HEAD = {"v_head.summary.weight": torch.linspace(-1, 1, 32)[None], "v_head.summary.bias": torch.tensor([0.5])}


@pytest.fixture
def whole(request, tmp_path, plain_tokenizer):
    make_vision_model(request.param).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    save_file(HEAD, tmp_path / "value_head.safetensors")
    return transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64).eval()


def rewards_of(whole, tokenizer, texts):
    """By the whole class, one text at a time."""
    with torch.no_grad():
        states = [whole.model(**tokenizer(text, return_tensors="pt"))[0][0, -1] for text in texts]
    return torch.stack(states) @ HEAD["v_head.summary.weight"][0].double() + 0.5


def down_projections(whole):
    return [block.mlp.down_proj for block in whole.model.language_model.layers]


@pytest.mark.parametrize("whole", grid(KINDS, keep=[]), indirect=True)
def test_texts_get_the_rewards_of_the_whole_class(whole, tmp_path, plain_tokenizer):
    pairs = make_pairs(3)
    texts = [pair.text(side) for pair in pairs for side in ("chosen", "rejected")]
    head = RewardHead.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(head.body.module) is type(whole.model.language_model), "nothing of the vision tower is kept"
    expected = rewards_of(whole, plain_tokenizer, texts)
    assert expected.std() > 0.1
    assert torch.allclose(head.score(texts), expected, atol=1e-6, rtol=0)
    assert torch.allclose(head.score_pairs(pairs).chosen, expected[::2], atol=1e-6, rtol=0), "in packed rows"
    assert head.body.pack_up_to == 96
    neurons = some(head, "mlp")
    with zeroed_inputs(down_projections(whole), neurons.mask):
        ablated = rewards_of(whole, plain_tokenizer, texts)
    with AblationContext(head, neurons):
        assert torch.allclose(head.score(texts), ablated, atol=1e-6, rtol=0)
    assert not torch.allclose(ablated, expected, atol=1e-3)
    without = head.with_ablation(neurons)
    assert torch.allclose(without.score(texts), ablated, atol=1e-6, rtol=0)
    # The saved folder has the vision tower too, so both this library and the whole class open it.
    without.save_pretrained(tmp_path / "saved")
    again = RewardHead.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert torch.allclose(again.score(texts), ablated, atol=1e-6, rtol=0)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    reloaded, found = load(tmp_path / "saved", dtype=torch.float64, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert torch.allclose(rewards_of(reloaded.eval(), plain_tokenizer, texts), ablated, atol=1e-6, rtol=0)
    for name, tensor in whole.state_dict().items():
        if ".language_model." not in name:
            assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert head.check(pairs)["passed"].all()


@pytest.mark.parametrize("whole", grid(["qwen2_5_vl"], keep=[]), indirect=True)
def test_gradients_of_a_language_model_inside_a_vision_model(whole, tmp_path, plain_tokenizer):
    pairs = make_pairs(1)
    head = RewardHead.from_pretrained(tmp_path, dtype=torch.float64)
    scores = NeuronAttribution(head, "gradient_x_activation").score(pairs).values
    expected = torch.zeros_like(scores)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        with kept_inputs(down_projections(whole)) as kept:
            states = whole.model(**plain_tokenizer(pairs[0].text(side), return_tensors="pt"))[0]
        slopes = torch.autograd.grad(states[0, -1] @ HEAD["v_head.summary.weight"][0].double(), kept)
        expected += sign * torch.stack([(a * g).detach().sum(dim=(0, 1)) for a, g in zip(kept, slopes, strict=True)])
    assert torch.allclose(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("whole", ["qwen2_5_vl"], indirect=True)
def test_images_are_refused(whole, tmp_path, plain_tokenizer):
    head = RewardHead.from_pretrained(tmp_path)
    assert media_tokens(whole.config) == {320, 321, 322, 323}
    ids = torch.tensor([[5, 6, 320, 7]])
    with pytest.raises(DataError, match=r"row 0: it has the tokens \[320\], which stand for images"):
        head.score_tokens(ids)
    assert head.score_tokens(ids, torch.tensor([[1, 1, 0, 1]])).isfinite().all()
    with pytest.raises(DataError, match="image"):
        head.score([[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]])
    # What the vision tower changes is noticed, and the whole model is then kept.
    whole.model.language_model.norm.register_forward_hook(lambda module, inputs, output: output)
    assert text_model(whole.model) is whole.model.language_model
    whole.model.register_forward_hook(lambda module, inputs, output: (1.01 * output[0],))
    assert text_model(whole.model) is whole.model


def test_opening_installs_nothing(tmp_path, plain_tokenizer, monkeypatch):
    """TransformerLens runs pip for a model that reads images; the call is caught, and the model opens."""
    called = []

    def record(*arguments, **_):
        called.append(arguments)
        raise OSError("not in a test")

    monkeypatch.setattr(subprocess, "check_call", record)
    model = make_vision_model("gemma3", transformers.AutoModelForSequenceClassification)
    head = RewardHead.from_classifier(model, tokenizer=plain_tokenizer)
    assert head.score(["help"]).isfinite().all()
    assert called == []
    assert subprocess.check_call is record


class TestRefusedKinds:
    def test_a_joint_encoder(self, tmp_path, plain_tokenizer):
        config = transformers.DebertaV2Config(
            vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            architectures=["DebertaV2PairRM"], source_prefix_id=3, cand1_prefix_id=4, cand2_prefix_id=5,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        save_file({"head_layer.1.weight": torch.zeros(32, 64)}, tmp_path / "model.safetensors")
        with pytest.raises(
            ModelError, match=r"got DebertaV2PairRM, which reads both responses.*one response at a time"
        ):
            RewardHead.from_pretrained(tmp_path)

    @pytest.mark.parametrize("head", [None, torch.ones(32)])
    def test_an_encoder_decoder(self, head, tmp_path, plain_tokenizer):
        config = transformers.T5Config(vocab_size=320, d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
        model = transformers.T5ForConditionalGeneration(config)
        model.save_pretrained(tmp_path)
        plain_tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"expected a decoder or an encoder, got T5ForConditionalGeneration"):
            RewardHead.from_pretrained(tmp_path, head=head)
        with pytest.raises(ModelError, match=r"which has both"):
            RewardHead.from_language_model(tmp_path)
        classifier = transformers.T5ForSequenceClassification(config)
        with pytest.raises(ModelError, match=r"expected a decoder or an encoder"):
            RewardHead.from_classifier(classifier, tokenizer=plain_tokenizer)
