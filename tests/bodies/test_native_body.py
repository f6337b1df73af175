"""Families that TransformerLens does not wrap open through transformers' own modules."""

import pytest
import torch
import transformers
from native_families import CAUSAL, ENCODERS, make_native
from reference import Reference, transformers_rewards
from tiny_models import grid, make_pairs
from torch import nn

from rmtension import AblationContext, ActivationCollector, Mean, NeuronAttribution, NeuronSet, RewardHead
from rmtension.bodies._native_body import NativeBody
from rmtension.bodies._native_sites import attends_both_ways, find_native_sites
from rmtension.errors import ModelError, OptionError


@pytest.fixture(scope="module")
def texts():
    return [pair.text(side) for pair in make_pairs(4) for side in ("chosen", "rejected")]


@pytest.fixture
def folder(request, tmp_path, plain_tokenizer):
    make_native(request.param, len(plain_tokenizer)).save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def some_neurons(head, site, seed=0):
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(seed)) < 0.5
    return NeuronSet(mask, site, head.architecture)


def columns_of(head, neurons):
    return neurons.mask.repeat_interleave(head.n_channels(neurons.site) // head.n_neurons(neurons.site), dim=1)


@pytest.mark.parametrize("dtype", grid([torch.float64, torch.float32]))
@pytest.mark.parametrize("folder", grid(CAUSAL), indirect=True)
def test_rewards_gradients_and_ablations(folder, texts, dtype):
    head = RewardHead.from_pretrained(folder, dtype=dtype)
    assert isinstance(head.body, NativeBody)
    assert head.body.is_causal
    assert isinstance(head.model, transformers.PreTrainedModel)
    assert head.body.pack_up_to > 0
    atol = 1e-6 if dtype == torch.float64 else 1e-5
    reference = Reference(folder, dtype=dtype)
    expected = transformers_rewards(folder, texts, dtype=dtype)
    assert expected.std() > 0.05, "the rewards must differ for this test to mean anything"
    assert torch.allclose(head.score(texts), expected, atol=atol, rtol=0)
    assert head.sites == ["attn_head", "mlp", "mlp_gate"]
    for site in ("attn_head", "mlp"):
        for layer in range(head.n_layers):
            own = head.body.projection(site, layer).read.module.weight
            assert torch.equal(own, reference.projection(site, layer).weight), "the module that transformers names"
        neurons = some_neurons(head, site)
        columns = columns_of(head, neurons)
        with reference.hooked(site, lambda layer, value, columns=columns: torch.where(columns[layer], 0.0, value)):
            ablated = torch.stack(
                [reference.reward(head.tokenizer(t, return_tensors="pt")["input_ids"]) for t in texts]
            )
        with AblationContext(head, neurons):
            assert torch.allclose(head.score(texts), ablated, atol=atol, rtol=0)
        assert not torch.allclose(ablated, expected, atol=1e-3), "the ablation must do something"
    pairs = make_pairs(3)
    scores = NeuronAttribution(head, "gradient_x_activation").score(pairs)
    wanted = torch.zeros_like(scores.values, dtype=torch.float64)
    for pair in pairs:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            values, slopes = reference.activations("mlp", reference.tokens(pair, side)[0], gradients=True)
            wanted += sign * (values * slopes).sum(dim=1).double() / len(pairs)
    assert torch.allclose(scores.values.double(), wanted, atol=10 * atol, rtol=0)


@pytest.mark.parametrize("folder", grid(CAUSAL, keep=[]), indirect=True)
def test_checks_export_and_reload(folder, texts, tmp_path):
    head = RewardHead.from_pretrained(folder)
    table = head.check(make_pairs(4))
    assert table["passed"].all()
    # Without a bridge, it is not compared; the final norm is known, so the reward is split.
    assert "bridge" not in set(table["check"])
    assert "direct contributions" in set(table["check"])
    neurons = some_neurons(head, "mlp")
    without = head.with_ablation(neurons)
    with AblationContext(head, neurons):
        expected = head.score(texts)
    assert torch.allclose(without.score(texts), expected, atol=1e-5)
    without.save_pretrained(tmp_path / "ablated")
    again = RewardHead.from_pretrained(tmp_path / "ablated")
    assert torch.allclose(again.score(texts), expected, atol=1e-5)
    assert torch.allclose(transformers_rewards(tmp_path / "ablated", texts), expected, atol=1e-5)


@pytest.mark.parametrize("folder", ["persimmon"], indirect=True)
def test_what_needs_hook_points_names_the_alternative(folder, texts):
    head = RewardHead.from_pretrained(folder)
    with pytest.raises(OptionError, match=r"got a PersimmonModel without.*could not wrap.*head\.hooks\(site, visit\)"):
        head.fwd_hooks(some_neurons(head, "mlp"))
    with pytest.raises(ModelError, match=r"could not wrap a PersimmonModel as a TransformerBridge with processed"):
        RewardHead.from_pretrained(folder, process_weights=True)
    # The model is not changed, and `cfg` is beside it.
    assert not hasattr(head.model, "cfg")
    statistics = ActivationCollector(head).collect(make_pairs(3))
    with AblationContext(head, some_neurons(head, "mlp"), Mean(statistics)):
        assert head.score(texts).isfinite().all()


class TestFindingSites:
    """Negative controls: what is not what it seems is left out, with the reason."""

    @pytest.fixture
    def base(self, plain_tokenizer):
        return make_native("helium", len(plain_tokenizer)).base_model

    def test_a_causal_and_a_bidirectional_model_are_told_apart(self, base, plain_tokenizer):
        assert not attends_both_ways(base)
        assert not attends_both_ways(base.to(torch.bfloat16))
        encoder = make_native("bert", len(plain_tokenizer)).base_model
        assert attends_both_ways(encoder)
        assert attends_both_ways(encoder.to(torch.bfloat16))

    @pytest.mark.grid
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", CAUSAL | ENCODERS)
    def test_half_precision_finds_the_same(self, family, dtype, plain_tokenizer):
        """Also with transformers' initial weights, which add little to the stream."""
        model = make_native(family, len(plain_tokenizer)).base_model
        torch.manual_seed(0)
        for base in (model, type(model)(model.config).eval()):
            expected = find_native_sites(base)
            assert len(expected.projections) == 6
            assert find_native_sites(base.to(dtype)) == expected
            assert attends_both_ways(base) == (family in ENCODERS)

    def test_an_mlp_that_adds_nothing(self, base):
        with torch.no_grad():
            base.layers[1].mlp.down_proj.weight.zero_()
        sites = find_native_sites(base)
        assert {site for site, _ in sites.projections} == {"attn_head"}
        assert sites.missing["mlp"] == "its projection in layer 1 adds nothing to the residual stream"

    def test_an_mlp_of_several_projections(self, base):
        class Split(nn.Module):
            """The down projection as the sum of two modules, each of which sees all neurons."""

            def __init__(self, whole):
                super().__init__()
                self.one, self.other = nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False)
                self.one.weight = nn.Parameter(0.5 * whole.weight)
                self.other.weight = nn.Parameter(0.5 * whole.weight)

            def forward(self, values):
                return self.one(values) + self.other(values)

        base.layers[2].mlp.down_proj = Split(base.layers[2].mlp.down_proj)
        body = NativeBody(base)
        with pytest.raises(ModelError, match=r"site 'mlp': .*layer 2 has 2 linear maps from the \[48\] neurons"):
            body.hook_sites("mlp", 0)
        assert body.hook_sites("attn_head", 0)

    def test_a_projection_that_mixes_tokens(self, base):
        """What it adds to one token reaches later tokens, so its input is not the activation of a token's neurons."""
        base.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output.cumsum(dim=1))
        sites = find_native_sites(base)
        assert "changes other tokens" in sites.missing["mlp"]

    def test_blocks_that_run_twice(self, base):
        forward = base.layers[1].forward
        base.layers[1].forward = lambda *args, **kwargs: base.layers[0](forward(*args, **kwargs), **kwargs)
        with pytest.raises(ModelError, match=r"no list of 3 blocks.*layers: block 0 runs 2 times"):
            NativeBody(base)

    def test_a_model_without_any_site(self, base, monkeypatch, plain_tokenizer, tmp_path):
        """The error has TransformerLens' reason and the reason why its modules cannot be used."""
        make_native("helium", len(plain_tokenizer)).save_pretrained(tmp_path)
        plain_tokenizer.save_pretrained(tmp_path)
        monkeypatch.setattr("rmtension.bodies._native_sites._sizes", lambda module: None)
        wanted = r"could not wrap a HeliumModel as a TransformerBridge .*modules alone cannot be used: neither the MLP"
        with pytest.raises(ModelError, match=wanted):
            RewardHead.from_pretrained(tmp_path)
