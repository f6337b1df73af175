"""Encoders: attention in both directions, padding hidden by a mask, rewards read at the first token, their heads."""

import warnings

import pytest
import torch
import transformers
from native_families import ENCODERS, make_native
from reference import kept_inputs, zeroed_inputs
from some_neurons import some
from tiny_models import EOS, batches_of, grid, make_pairs

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.bodies._native_body import NativeBody
from rmtension.data._encoding import encode_texts
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError, RMTensionWarning
from rmtension.heads._encoder_heads import PooledHead, encoder_head
from rmtension.interventions._sweep import score_without
from rmtension.passes._scoring import score_tokens

# Family -> the names of its list of blocks, and in a block of the projections of the MLP and of attention.
NAMES = {
    "deberta-v2": ("encoder.layer", "output.dense", "attention.output.dense"),
    "modernbert": ("layers", "mlp.Wo", "attn.Wo"),
    "bert": ("encoder.layer", "output.dense", "attention.output.dense"),
    "roberta": ("encoder.layer", "output.dense", "attention.output.dense"),
    "electra": ("encoder.layer", "output.dense", "attention.output.dense"),
    "distilbert": ("transformer.layer", "ffn.lin2", "attention.out_lin"),
    "eurobert": ("layers", "mlp.down_proj", "self_attn.o_proj"),
}


@pytest.fixture(scope="module")
def texts():
    return [pair.text(side) for pair in make_pairs(4) for side in ("chosen", "rejected")]


@pytest.fixture
def folder(request, tmp_path, plain_tokenizer):
    make_native(request.param, len(plain_tokenizer)).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def opened(folder, dtype):
    """The model under test, and transformers' classifier."""
    model = RewardHead.from_pretrained(folder, dtype=dtype)
    assert isinstance(model.head, PooledHead)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    return model, classifier


def batch_of(model, texts):
    encoded = encode_texts(model.tokenizer, texts, max_length=model.max_length)
    return TokenBatch.from_texts(encoded, range(len(texts)), read_at=model.read_at, device=model.device)


def rewards_of(model, texts):
    """The rewards in one batch, of texts of different lengths."""
    batch = batch_of(model, texts)
    with model.last_mlp_where_read(batch):
        return model.forward(batch)


def logits_of(classifier, model, texts):
    return torch.stack([classifier(**model.tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])


def projections(classifier, site):
    blocks, mlp, attention = NAMES[classifier.config.model_type]
    return [
        block.get_submodule(mlp if site == "mlp" else attention)
        for block in classifier.base_model.get_submodule(blocks)
    ]


@pytest.mark.parametrize("dtype", grid([torch.float64, torch.float32]))
@pytest.mark.parametrize("folder", grid(ENCODERS, keep=["deberta-v2"]), indirect=True)
def test_rewards_gradients_and_ablations_of_padded_texts(folder, texts, dtype):
    model, classifier = opened(folder, dtype)
    atol = 1e-6 if dtype == torch.float64 else 1e-5
    body = model.body
    assert isinstance(body, NativeBody)
    assert not body.is_causal
    assert body.pack_up_to == 0
    assert model.sites == ["attn_head", "mlp", "mlp_gate"]
    with torch.no_grad():
        expected = logits_of(classifier, model, texts)
        assert expected.std() > 0.01, "the rewards must differ for this test to mean anything"
        assert torch.allclose(rewards_of(model, texts), expected, atol=atol, rtol=0)
        ending = [texts[0] + EOS, texts[1]]
        assert torch.allclose(rewards_of(model, ending), logits_of(classifier, model, ending), atol=atol, rtol=0)
    for site in ("mlp", "attn_head"):
        modules = projections(classifier, site)
        mask = torch.rand(3, model.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.5
        columns = mask.repeat_interleave(model.n_channels(site) // model.n_neurons(site), dim=1)
        with torch.no_grad():
            with zeroed_inputs(modules, columns):
                ablated = logits_of(classifier, model, texts)
            with AblationContext(model, NeuronSet(mask, site, model.architecture)):
                assert torch.allclose(rewards_of(model, texts), ablated, atol=atol, rtol=0)
        assert not torch.allclose(ablated, expected, atol=1e-3), "the ablation must do something"
        # The gradient of each reward in a padded batch, and that of transformers' logit of the text alone.
        seen = {}

        def keep(layer, activation, seen=seen):
            seen[layer] = activation if activation.requires_grad else activation.detach().requires_grad_()
            return seen[layer]

        with model.hooks(site, keep):
            rewards = rewards_of(model, texts)
        slopes = torch.autograd.grad(rewards.sum(), [seen[layer] for layer in range(3)])
        for number, text in enumerate(texts[:3]):
            with kept_inputs(modules) as kept:
                logit = logits_of(classifier, model, [text])[0]
            alone = torch.autograd.grad(logit, kept)
            for ours, own in zip(slopes, alone, strict=True):
                n_tokens = own.shape[1]
                assert torch.allclose(ours[number, :n_tokens], own[0], atol=10 * atol, rtol=0)
                assert not ours[number, n_tokens:].any(), "padding has no effect"


@pytest.mark.parametrize("folder", ["deberta-v2"], indirect=True)
def test_padding_is_hidden_and_the_first_token_is_last(folder, texts):
    model, _ = opened(folder, torch.float64)
    batch = batch_of(model, texts)
    assert batch.last.tolist() == [0] * len(texts)
    assert batch.select("last").sum(dim=1).tolist() == [1] * len(texts)
    assert batch.select("last")[:, 0].all()
    # Negative control: without the mask, padding changes the stream.
    states = model.residual(batch)
    model.body.is_causal = True
    shown = model.residual(batch)
    shortest = int(batch.mask.sum(dim=1).argmin())
    assert (shown[shortest, 0] - states[shortest, 0]).abs().max() > 1e-4
    longest = int(batch.mask.sum(dim=1).argmax())
    assert torch.allclose(shown[longest], states[longest])


def test_what_is_read_first_is_never_in_a_shared_prefix(tokenizer):
    assert ReadAt(1, first=True).index((5, 6, 1)) == 0
    assert ReadAt(1).index((5, 6, 1)) == 1


@pytest.mark.parametrize(
    ("family", "changes", "pooling"),
    grid(
        [
            *((family, {}, "late" if family == "eurobert" else "first") for family in ENCODERS),
            ("modernbert", {"classifier_pooling": "mean"}, "mean"),
            ("eurobert", {"classifier_pooling": "mean"}, "mean"),
        ],
        unpack=True,
    ),
)
def test_every_pooling_equals_the_classifier(family, changes, pooling, plain_tokenizer):
    classifier = make_native(family, len(plain_tokenizer), num_labels=3, **changes).double()
    head = encoder_head("model", classifier)
    assert (head.pooling, head.reads_first) == (pooling, pooling == "first")
    assert head.outputs == ("LABEL_0", "LABEL_1", "LABEL_2")
    ids = torch.arange(2, 22).reshape(2, 10)
    with torch.no_grad():
        states = classifier.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        batch = TokenBatch.from_rows(ids, torch.ones_like(ids).bool(), read_at=ReadAt(first=pooling == "first"))
        places = head.tokens(batch)
        outputs = head.read_tokens(batch.gather(places, states), places, batch)
        logits = classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(outputs, logits, atol=1e-12, rtol=0)
        # It is a copy, and the classifier can be put together again.
        classifier.classifier.requires_grad_(False)
        again = head.classifier_with(classifier.base_model)
        assert torch.equal(again(input_ids=ids).logits, classifier(input_ids=ids).logits)
        assert not any(parameter.requires_grad for parameter in head.parameters())


def test_another_kind_of_head_is_refused(plain_tokenizer):
    classifier = make_native("bert", len(plain_tokenizer))
    handle = classifier.register_forward_hook(lambda module, inputs, output: output.__class__(logits=output.logits + 1))
    with pytest.raises(ModelError, match=r"model: BertForSequenceClassification .*not supported \(its modules after"):
        encoder_head("model", classifier)
    handle.remove()
    assert isinstance(encoder_head("model", classifier), PooledHead)


@pytest.mark.parametrize("folder", grid(["roberta", "deberta-v2"]), indirect=True)
def test_the_longest_text_and_either_side_of_padding(folder):
    """RoBERTa's table of positions has rows before position 0; all tokens of the context are usable."""
    model, classifier = opened(folder, torch.float64)
    assert model.max_length == (94 if classifier.config.model_type == "roberta" else 96)
    ids = torch.arange(model.max_length)[None] % 200 + 2
    with torch.no_grad():
        assert torch.allclose(score_tokens(model, ids), classifier(input_ids=ids).logits[0], atol=1e-6, rtol=0)
        # A linear head on the same body is read at its first token, whatever the padding.
        linear = RewardHead.from_pretrained(folder, head=torch.ones(32), dtype=torch.float64)
        short = ids[:, :7]
        mask = torch.tensor([[0] * 3 + [1] * 7 + [0] * 5])
        padded = torch.full((1, 15), 5)
        padded[mask.bool()] = short[0]
        expected = classifier.base_model(input_ids=short)[0][:, 0].sum(dim=1)
        assert torch.allclose(score_tokens(linear, padded, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", grid(["modernbert", "eurobert"], keep=["modernbert"]))
def test_means_that_an_encoder_got_as_biases_are_saved(family, tokenizer, tmp_path):
    """The projections of both have no bias; the config that is saved must say that they have one now."""
    make_native(family, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    head, few = RewardHead.from_pretrained(tmp_path / "model"), make_pairs(3)
    mean = Mean(ActivationCollector(head).collect(few))
    every = NeuronSet(torch.ones(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool), "mlp", head.architecture)
    ablated = head.with_ablation(every, mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RMTensionWarning)  # transformers 4 scales rotary angles of ModernBERT otherwise
        ablated.save_pretrained(tmp_path / "saved")
    expected = ablated.score_pairs(few).margin
    assert torch.equal(RewardHead.from_pretrained(tmp_path / "saved").score_pairs(few).margin, expected)
    assert (head.with_ablation(every).score_pairs(few).margin - expected).abs().max() > 1e-4, "zeros are no means"


@pytest.mark.parametrize("family", grid(["bert", "modernbert"], keep=[]))
@pytest.mark.parametrize("site", ["mlp", "attn_head"])
def test_passes_over_pairs_of_an_encoder(family, site, tokenizer, tmp_path):
    """With a linear head: sweeps, single effects and attribution patching, whose texts do not share rows."""
    make_native(family, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    head = RewardHead.from_pretrained(tmp_path, head=torch.randn(32), dtype=torch.float64)
    head.reads_first = True
    few = make_pairs(3)
    assert head.check(few)["passed"].all()
    assert all(batch.position_ids is None for batch in batches_of(head, few))
    neurons = some(head, site)
    base = head.score_pairs(few).margin
    effects = single_neuron_effects(head, few, site=site, neurons=neurons).values
    about = {"shape": tuple(neurons.mask.shape), "site": site, "architecture": head.architecture}
    singles = [NeuronSet.from_indices([index], **about) for index in neurons]
    swept = score_without(head, few, singles)
    for index, single, rewards in zip(neurons, singles, swept, strict=True):
        with AblationContext(head, single):
            margin = head.score_pairs(few).margin
        assert torch.allclose(rewards.margin, margin, atol=1e-6, rtol=0)
        assert torch.allclose(effects[index], (margin - base).mean().double(), atol=1e-6, rtol=0)
    scores = NeuronAttribution(head, "integrated_gradients", site=site, steps=24).score(few).values
    for layer in range(head.n_layers):
        mask = torch.zeros_like(neurons.mask)
        mask[layer] = True
        with AblationContext(head, NeuronSet(mask, site, head.architecture)):
            change = (head.score_pairs(few).margin - base).mean()
        assert torch.allclose(scores[layer].sum().double(), -change.double(), atol=1e-3 * float(base.abs().max()))
