"""Every family: rewards are transformers' own, ablated neurons are the right ones, the direct path sums to the reward.

All in float64, so that only the order of sums and the norms that families keep in float32 differ.
"""

import pytest
import torch
import transformers
from all_families import DENSE, EXPERTS
from reference import Reference
from tiny_models import EOS, PAD, grid, make_pairs

from rmtension import AblationContext, NeuronSet, RewardHead, Scale
from rmtension.bodies import _bridges as wrapping
from rmtension.data._encoding import encode_texts
from rmtension.data._length_buckets import text_batches
from rmtension.errors import ModelError
from rmtension.models._direct_path import direct_contributions
from rmtension.synthetic.check_matrix import FAMILIES, make_classifier

pytestmark = pytest.mark.lens


@pytest.fixture(scope="module")
def texts():
    return [pair.text(side) for pair in make_pairs(6) for side in ("chosen", "rejected")]


@pytest.fixture
def folder(request, tmp_path, plain_tokenizer):
    make_classifier(request.param, len(plain_tokenizer) + 8).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def rewards_of(reference, texts):
    with torch.no_grad():
        return torch.stack([reference.reward(reference.tokenizer(t, return_tensors="pt")["input_ids"]) for t in texts])


@pytest.mark.parametrize("folder", grid(DENSE, keep=["gpt2", "llama"]), indirect=True)
def test_every_family_equals_transformers(folder, texts):
    assert folder.name
    head = RewardHead.from_pretrained(folder, dtype=torch.float64)
    reference = Reference(folder)
    plain = rewards_of(reference, texts)
    assert plain.std() > 0.05, "the rewards must differ for this test to mean anything"
    # Norms that compute in float32 round differently in another batch: 2e-7 of a reward. Others are exact to 1e-12.
    assert torch.allclose(head.score(texts), plain, atol=1e-6, rtol=0)
    # Texts that end in pad and eos tokens of their own: every family pools as transformers does.
    ending = [texts[0] + PAD, texts[1] + EOS + EOS, texts[2] + EOS + PAD + PAD]
    assert torch.allclose(head.score(ending), rewards_of(reference, ending), atol=1e-6, rtol=0)
    assert torch.allclose(head.score(ending[:1]), plain[:1], atol=1e-6, rtol=0)
    assert not torch.allclose(head.score(ending[1:]), plain[1:3], atol=1e-3)
    assert head.sites == ["attn_head", "mlp", "mlp_gate"]
    for site in head.sites:
        shape = (head.n_layers, head.n_neurons(site))
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
        columns = mask.repeat_interleave(head.n_channels(site) // head.n_neurons(site), dim=1)

        def zero(layer, activation, columns=columns):
            return torch.where(columns[layer], 0.0, activation)

        # Where one factor of a product is 0, the product is: the input of the down projection either way.
        with reference.hooked("mlp" if site == "mlp_gate" else site, zero):
            expected = rewards_of(reference, texts)
        with AblationContext(head, NeuronSet(mask, site, head.architecture)):
            assert torch.allclose(head.score(texts), expected, atol=1e-6, rtol=0)
        assert not torch.allclose(expected, plain, atol=1e-3), "the ablation must do something"
    (batch,) = text_batches(
        encode_texts(head.tokenizer, texts, max_length=head.max_length),
        tokens_per_batch=10_000,
        read_at=head.read_at,
        device=head.device,
    )
    parts = direct_contributions(head, batch)
    order = list(batch.indices)
    assert torch.allclose(parts.reward, plain[order], atol=1e-6, rtol=0)
    written = sum(neurons.sum(dim=2) for neurons in parts.neurons.values()) + parts.biases
    assert torch.allclose(written, parts.blocks, atol=1e-6, rtol=0)
    # Negative control: another layer's neurons do not sum to it.
    assert not torch.allclose(written.roll(1, dims=1), parts.blocks, atol=1e-3)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_direct_path_of_an_ablated_model(folder, texts):
    """Layer 0 gets the same activations either way, so that halving them halves its neurons' parts, and no bias."""
    head = RewardHead.from_pretrained(folder, dtype=torch.float64)
    # One text: the scale of the final norm differs between the two runs, by the same factor for all parts.
    encoded = encode_texts(head.tokenizer, texts[:1], max_length=head.max_length)
    (batch,) = text_batches(encoded, tokens_per_batch=10_000, read_at=head.read_at, device=head.device)
    whole = direct_contributions(head, batch)
    everything = NeuronSet(torch.ones(3, 128, dtype=torch.bool), "mlp", head.architecture)
    with AblationContext(head, everything, Scale(0.5)):
        half = direct_contributions(head, batch)
        assert torch.allclose(half.reward, head.score(texts[:1]), atol=1e-6)
    scale = half.embedding / whole.embedding
    assert torch.allclose(half.neurons["mlp"][:, 0], 0.5 * scale * whole.neurons["mlp"][:, 0], atol=1e-6)
    assert torch.allclose(half.biases, torch.zeros(1, 3, dtype=torch.float64), atol=1e-6)
    with (
        head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: value)]),
        pytest.raises(ModelError, match=r"head.model has hooks that this library did not install"),
    ):
        direct_contributions(head, batch)


@pytest.mark.parametrize("folder", ["openai-gpt"], indirect=True)
def test_a_family_without_a_final_norm_has_no_direct_effects(folder, texts):
    """It has no direct path; everything else is checked."""
    head = RewardHead.from_pretrained(folder)
    assert torch.allclose(head.score(texts), rewards_of(Reference(folder, dtype=torch.float32), texts), atol=1e-5)
    table = head.check()
    assert table["passed"].all()
    assert "direct contributions" not in set(table["check"])


@pytest.mark.parametrize("folder", grid(EXPERTS), indirect=True)
def test_a_mixture_of_experts_has_no_mlp(folder, texts):
    """In float32: torch has no grouped matrix product of float64."""
    head = RewardHead.from_pretrained(folder)
    reference = Reference(folder, dtype=torch.float32)
    assert torch.allclose(head.score(texts), rewards_of(reference, texts), atol=1e-5)
    assert head.sites == ["attn_head", "expert"]
    assert head.check()["passed"].all()
    with pytest.raises(ModelError, match=r"no single output projection.*Use site 'expert'"):
        head.n_neurons("mlp")
    with pytest.raises(ModelError, match="no single output projection"):
        head.hooks("mlp", lambda layer, activation: None)


@pytest.mark.parametrize("folder", grid(["bert", "modernbert-decoder"]), indirect=True)
def test_heads_of_several_modules_equal_transformers(folder, texts):
    head = RewardHead.from_pretrained(folder)
    assert head.weight is None
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = torch.stack([classifier(**head.tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])
    assert torch.allclose(head.score(texts), expected, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_wrong_bridge_never_runs(folder, texts, monkeypatch):
    """A bridge off by 1% (TransformerLens 3.9 has two such) is noticed on opening; transformers' modules may run."""
    boot = wrapping._boot

    def boot_wrong(*args, **options):
        bridge = boot(*args, **options)
        bridge.ln_final.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        return bridge

    monkeypatch.setattr(wrapping, "_boot", boot_wrong)
    head = RewardHead.from_pretrained(folder)
    expected = rewards_of(Reference(folder, dtype=torch.float32), texts)
    assert torch.allclose(head.score(texts), expected, atol=1e-5)
    with (
        head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: value)]),
        pytest.raises(ModelError, match=r"TransformerBridge of LlamaModel is off by 1\.0e-02"),
    ):
        head.score(texts)
    assert torch.allclose(head.score(texts), expected, atol=1e-5)
    # One that returns no numbers is wrong too.
    head.body._bridge_error = float("nan")
    with (
        head.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: value)]),
        pytest.raises(ModelError, match=r"is off by nan"),
    ):
        head.score(texts)


def test_named_families_are_in_the_table():
    assert set(DENSE) | set(EXPERTS) <= set(FAMILIES)
