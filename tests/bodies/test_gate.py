"""The site `mlp_gate`: act(gate) against formulas written out here, on transformers' classifiers in float64.

The reference takes the input of the first projection and the weights, computes gate, up and activation function by
hand, and writes a changed act(gate) as act(gate) * up into the input of the down projection. It hooks no activation
function, so that it shares nothing with what it checks. One text at a time, unpadded.

1e-10 where both run the same operations on one text. Where a batch or a bridge orders them otherwise, the norms of most
families, which round to float32 whatever the model's dtype, may turn 1e-16 into 1e-7 of an activation: 1e-6 there.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version

import pytest
import torch
from tiny_models import grid, make_pairs
from torch import nn

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    Resample,
    RewardHead,
    Scale,
    Zero,
)
from rmtension.bodies._gate_search import GATE_ROWS, find_gates
from rmtension.bodies._hooks import HookSite, count_foreign_hooks
from rmtension.errors import ModelError, OptionError
from rmtension.synthetic.check_matrix import make_classifier

pytestmark = pytest.mark.lens
HAS_HOOKED_TRANSFORMER = int(version("transformer-lens").split(".")[0]) < 4


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Family -> where gate, up and down projections are in a block, and the activation function. No `up`: no gate.
GATED = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", silu),
    "mistral": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", silu),
    "phi3": ("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj", silu),
    "gemma2": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", gelu_tanh),
    "olmo2": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", silu),
}
UNGATED = {
    "gpt2": ("mlp.c_fc", None, "mlp.c_proj", gelu_tanh),
    "gpt_neox": ("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h", gelu),
    "opt": ("fc1", None, "fc2", torch.relu),
}
FAMILIES = GATED | UNGATED
WAYS = ("plain", "bridge")


class ByHand:
    """A classifier of transformers whose act(gate) is seen, and replaced, without a hook on what computes it."""

    def __init__(self, family, vocab_size, tokenizer):
        self.model = make_classifier(family, vocab_size).double()
        self.tokenizer = tokenizer
        self.gate, self.up, self.down, self.act = FAMILIES[family]
        base = getattr(self.model.base_model, "decoder", self.model.base_model)
        self.blocks = next(getattr(base, name) for name in ("h", "layers") if hasattr(base, name))

    def _linear(self, layer, name, x):
        """`x` through a projection by its weights alone: nn.Linear has them [out, in], GPT-2's Conv1D [in, out]."""
        projection = self.blocks[layer].get_submodule(name)
        weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
        bias = 0 if projection.bias is None else projection.bias
        return x @ weight.T + bias

    def gate_and_up(self, layer, x):
        """act(gate) and up of what the MLP of `layer` reads; the first half of a fused projection is the gate."""
        gate = self._linear(layer, self.gate, x)
        if self.up is None:
            return self.act(gate), torch.ones_like(gate)
        if self.up == self.gate:
            gate, up = gate[..., : gate.shape[-1] // 2], gate[..., gate.shape[-1] // 2 :]
            return self.act(gate), up
        return self.act(gate), self._linear(layer, self.up, x)

    @contextmanager
    def hooked(self, function):
        """`function(layer, act_gate)` [1, token, neuron] sees, and may replace, act(gate) of every layer."""
        read = {}

        def keep(layer, _module, inputs):
            read[layer] = inputs[0]

        def write(layer, _module, inputs):
            act_gate, up = self.gate_and_up(layer, read[layer])
            assert torch.allclose(act_gate * up, inputs[0], atol=1e-10), "the formula must be the model's"
            changed = function(layer, act_gate.reshape(1, -1, act_gate.shape[-1]))
            return None if changed is None else ((changed.reshape(up.shape) * up), *inputs[1:])

        handles = []
        for layer, block in enumerate(self.blocks):
            handles.append(block.get_submodule(self.gate).register_forward_pre_hook(partial(keep, layer)))
            handles.append(block.get_submodule(self.down).register_forward_pre_hook(partial(write, layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ids(self, text):
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def reward(self, text, function=lambda layer, act_gate: None):
        with self.hooked(function):
            return self.model(input_ids=self.ids(text), use_cache=False).logits[0, 0]

    def activations(self, text):
        """act(gate) [layer, token, neuron] and dr/d act(gate)."""
        seen = {}

        def keep(layer, act_gate):
            seen[layer] = act_gate
            return act_gate

        slopes = torch.autograd.grad(self.reward(text, keep), list(seen.values()))
        return torch.cat([activation.detach() for activation in seen.values()]), torch.cat(slopes)


@pytest.fixture(scope="module", params=grid(FAMILIES, keep=["llama", "gpt2"]))
def both(request, tokenizer):
    """A head and the reference: two models with the same weights, so that they do not share hooks."""
    reference = ByHand(request.param, len(tokenizer), tokenizer)
    classifier = make_classifier(request.param, len(tokenizer)).double()
    return RewardHead.from_classifier(classifier, tokenizer=tokenizer), reference


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(5)


def texts_of(pairs):
    return [pair.text(side) for pair in pairs for side in ("chosen", "rejected")]


def running(head, way):
    """A context in which transformers' modules run, or the bridge because of a hook of the user's."""
    if way == "plain":
        return nullcontext()
    return head.model.hooks(fwd_hooks=[(next(iter(head.model.hook_dict)), lambda value, hook: value)])


def some_neurons(head, site="mlp_gate"):
    """A third of all neurons, with one layer left out."""
    mask = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 1 / 3
    mask[1] = False
    return NeuronSet(mask, site, head.architecture)


def gated(reference):
    return reference.up is not None


def seen(head, site, text):
    """[layer, token, neuron] of one text."""
    kept = {}

    def keep(layer, activation):
        kept[layer] = activation.reshape(-1, activation.shape[-1]).clone()

    with head.hooks(site, keep):
        head.score([text])
    return torch.stack([kept[layer] for layer in range(head.n_layers)])


def test_the_site_has_the_neurons_of_mlp(both):
    head, reference = both
    assert head.sites == ["attn_head", "mlp", "mlp_gate"]
    assert head.n_neurons("mlp_gate") == head.n_channels("mlp_gate") == head.n_neurons("mlp") == 128
    assert "-3x128-heads4x8-d32" in head.architecture, "the site must not change what saved results carry"
    # The same place where nothing is multiplied, in both ways; another one where there is a gate.
    for layer in range(3):
        hook_sites = [head.body.hook_sites(site, layer) for site in ("mlp", "mlp_gate")]
        assert len(hook_sites[1]) == 2
        assert [mlp == other for mlp, other in zip(*hook_sites, strict=True)] == [not gated(reference)] * 2


@pytest.mark.parametrize("way", WAYS)
def test_activations_equal_the_formula(both, pairs, way):
    head, reference = both
    with running(head, way):
        assert head.body.runs_native == (way == "plain")
        for text in texts_of(pairs)[:3]:
            expected, _ = reference.activations(text)
            activations = seen(head, "mlp_gate", text)
            assert torch.allclose(activations, expected, atol=1e-10 if way == "plain" else 1e-6, rtol=0)
            # Negative control: with a gate, the input of the down projection is something else.
            product = seen(head, "mlp", text)
            assert torch.allclose(product, expected, atol=1e-2) != gated(reference)
            if not gated(reference):
                assert torch.equal(product, activations)


@pytest.mark.parametrize("way", WAYS)
def test_statistics_and_scores_equal_autograd_on_the_formula(both, pairs, way):
    """Batched, against one text at a time: means, mean differences, and gradients by autograd on the formula."""
    head, reference = both
    runs = [reference.activations(text) for text in texts_of(pairs)]
    tokens = torch.cat([values for values, _ in runs], dim=1)
    means = torch.stack([values.mean(1) for values, _ in runs])
    sums = torch.stack([(values * slopes).sum(1) for values, slopes in runs])
    expected = {
        method: (per_text[::2] - per_text[1::2]).mean(0)
        for method, per_text in {"mean_difference": means, "gradient_x_activation": sums}.items()
    }
    with running(head, way):
        statistics = ActivationCollector(head, site="mlp_gate").collect(pairs)
        scores = {
            method: NeuronAttribution(head, method=method, site="mlp_gate").score(pairs).values for method in expected
        }
        products = {method: NeuronAttribution(head, method=method).score(pairs).values for method in expected}
    assert statistics.provenance.site == "mlp_gate"
    close = {"atol": 1e-6, "rtol": 0}
    assert torch.allclose(statistics.mean, tokens.mean(1), **close)
    assert torch.equal(statistics.mean, statistics.channel_mean)
    assert torch.allclose(statistics.abs_mean, tokens.abs().mean(1), **close)
    assert torch.allclose(statistics.rms, tokens.square().mean(1).sqrt(), **close)
    for method, values in expected.items():
        assert float(values.abs().max()) > 1e-2, "the scores must not vanish for this test to mean anything"
        assert torch.allclose(scores[method], values, **close)
    # a dM/da is the same for a product and its factor: only what is read tells the sites apart.
    assert torch.allclose(products["gradient_x_activation"], expected["gradient_x_activation"], **close)
    assert torch.allclose(products["mean_difference"], expected["mean_difference"], atol=1e-3) != gated(reference)


@pytest.mark.parametrize("way", WAYS)
def test_zero_and_scale_equal_those_of_the_product(both, pairs, way):
    head, reference = both
    neurons = some_neurons(head)
    product = NeuronSet(neurons.mask, "mlp", head.architecture)
    with running(head, way):
        plain = head.score(texts_of(pairs))
        for options in ({}, {"replacement": Scale(-0.3)}, {"positions": "last"}):
            with AblationContext(head, neurons, **options):
                inside = head.score(texts_of(pairs))
            with AblationContext(head, product, **options):
                expected = head.score(texts_of(pairs))
            assert torch.allclose(inside, expected, atol=1e-6 if "replacement" in options else 1e-12, rtol=0)
            assert not torch.allclose(inside, plain, atol=1e-3), "the ablation must do something"
        assert torch.equal(head.score(texts_of(pairs)), plain)
    text = texts_of(pairs)[0]
    by_hand = reference.reward(text, lambda layer, act_gate: act_gate.masked_fill(neurons.mask[layer], 0.0)).detach()
    with running(head, way), AblationContext(head, neurons):
        assert float(head.score([text])[0] - by_hand) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_mean_and_resample_write_act_gate(both, pairs, way):
    head, reference = both
    neurons = some_neurons(head)
    texts = texts_of(pairs[:2])
    collector = ActivationCollector(head, site="mlp_gate")
    means, donor = collector.collect(pairs), collector.sample(pairs[4:], n=1, seed=0)
    # One donor: all tokens of all texts get its values.
    by_hand = {Mean(means): means.channel_mean, Resample(donor): donor.values[0]}
    for replacement, written in by_hand.items():

        def put(layer, act_gate, values=written):
            return torch.where(neurons.mask[layer], values[layer], act_gate)

        expected = torch.stack([reference.reward(text, put).detach() for text in texts])
        with running(head, way), AblationContext(head, neurons, replacement):
            assert torch.allclose(head.score_pairs(pairs[:2]).chosen, expected[::2], atol=1e-6, rtol=0)
            assert torch.allclose(head.score_pairs(pairs[:2]).rejected, expected[1::2], atol=1e-6, rtol=0)
    # Negative control: the same numbers written into the product are another model, where there is a gate.
    product = NeuronSet(neurons.mask, "mlp", head.architecture)
    products = ActivationCollector(head).collect(pairs)
    with AblationContext(head, product, Mean(products)):
        other = head.score(texts)
    with AblationContext(head, neurons, Mean(means)):
        assert torch.allclose(head.score(texts), other, atol=1e-3) != gated(reference)


@pytest.mark.parametrize("both", grid(["phi3", "gpt2"]), indirect=True)
def test_export_equals_the_context(both, pairs):
    head, reference = both
    texts, neurons = texts_of(pairs), some_neurons(head)
    replacements = [Zero(), Scale(0.5)]
    means = ActivationCollector(head, site="mlp_gate").collect(pairs)
    if gated(reference):
        with pytest.raises(OptionError, match=r"weights cannot express Mean at site 'mlp_gate' of a gated.*Context"):
            head.with_ablation(neurons, Mean(means))
    else:
        replacements.append(Mean(means))
    for replacement in replacements:
        with AblationContext(head, neurons, replacement):
            expected = head.score(texts)
        pruned = head.with_ablation(neurons, replacement)
        assert torch.allclose(pruned.score(texts), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("both", grid(["phi3", "gpt2"]), indirect=True)
def test_the_self_check_covers_the_site(both):
    table = both[0].check().set_index("check")
    assert table.loc[["hooks, mlp_gate", "zeroing, mlp_gate", "direct contributions", "layers"], "passed"].all()


def test_a_bridge_without_native_modules_has_the_site(both, pairs):
    """Only the bridge runs; it has the same activations."""
    head, _ = both
    bare = RewardHead(head.model, weight=head.weight, tokenizer=head.tokenizer, pad_token_id=head.pad_token_id)
    assert [len(bare.body.hook_sites("mlp_gate", layer)) for layer in range(3)] == [1, 1, 1]
    text = texts_of(pairs)[0]
    assert torch.allclose(seen(bare, "mlp_gate", text), seen(head, "mlp_gate", text), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", grid([torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("family", ["phi3", "opt"])
def test_half_precision_has_a_gate_only_where_the_family_has_one(family, dtype, tokenizer):
    head = RewardHead.from_classifier(make_classifier(family, len(tokenizer)).to(dtype), tokenizer=tokenizer)
    same = [head.body.hook_sites("mlp_gate", layer) == head.body.hook_sites("mlp", layer) for layer in range(3)]
    assert same == [family not in GATED] * 3


def test_opening_leaves_no_trace(tokenizer):
    classifier = make_classifier("llama", len(tokenizer))
    state = torch.random.get_rng_state()
    head = RewardHead.from_classifier(classifier.train(), tokenizer=tokenizer)
    assert "mlp_gate" in head.sites
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in classifier.modules())
    assert count_foreign_hooks(classifier) == 0
    for module in classifier.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("zero", ["gate_proj", "up_proj"])
def test_a_layer_that_was_pruned_still_has_its_site(zero, tokenizer):
    """silu(0) = 0 = 0 * up: equal numbers are no proof that two places are one, nor are different places two."""
    classifier = make_classifier("llama", len(tokenizer))
    with torch.no_grad():
        getattr(classifier.model.layers[1].mlp, zero).weight.zero_()
    head = RewardHead.from_classifier(classifier, tokenizer=tokenizer)
    for layer, block in enumerate(classifier.model.layers):
        assert head.body.hook_sites("mlp_gate", layer)[-1] == HookSite(block.mlp.act_fn, "output")


class TestMissing:
    def refused(self, head, match):
        assert "mlp_gate" not in head.sites
        for use in (
            lambda: head.n_neurons("mlp_gate"),
            lambda: head.hooks("mlp_gate", lambda layer, activation: None),
            lambda: ActivationCollector(head, site="mlp_gate"),
            lambda: AblationContext(
                head, NeuronSet(torch.ones(3, 128, dtype=torch.bool), "mlp_gate", head.architecture)
            ),
        ):
            with pytest.raises(ModelError, match=match):
                use()

    def test_experts_are_refused(self, tokenizer):
        """In float32: torch has no grouped matrix product of float64."""
        head = RewardHead.from_classifier(make_classifier("mixtral", len(tokenizer)), tokenizer=tokenizer)
        self.refused(head, r"site 'mlp_gate' has the neurons of 'mlp'.*no single output projection.*mixture of experts")

    def test_processed_weights_are_refused(self, tokenizer):
        """The bridge then computes the activation function by itself, in no module."""
        classifier = make_classifier("llama", len(tokenizer))
        head = RewardHead.from_classifier(classifier, tokenizer=tokenizer, process_weights=True)
        self.refused(head, r"neither read nor written.*no module of its own.*Use site 'mlp'.*without process_weights")
        assert head.check(reference=classifier)["passed"].all()

    @pytest.mark.parametrize("process_weights", [False, True])
    def test_processed_weights_without_a_gate_keep_the_site(self, tokenizer, pairs, process_weights):
        """GPT-2 keeps the site: through a bridge with processed weights, and as a HookedTransformer."""
        options = {"process_weights": process_weights}
        if not process_weights:
            if not HAS_HOOKED_TRANSFORMER:
                pytest.skip("this transformer-lens has no HookedTransformer")
            options["model_class"] = "HookedTransformer"
        plain = RewardHead.from_classifier(make_classifier("gpt2", len(tokenizer)), tokenizer=tokenizer)
        head = RewardHead.from_classifier(make_classifier("gpt2", len(tokenizer)), tokenizer=tokenizer, **options)
        assert head.body.hook_sites("mlp_gate", 1) == head.body.hook_sites("mlp", 1)
        ours, theirs = (ActivationCollector(scorer, site="mlp_gate").collect(pairs) for scorer in (head, plain))
        assert torch.allclose(ours.mean, theirs.mean, atol=1e-5)

    @pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="this transformer-lens has no HookedTransformer")
    @pytest.mark.parametrize("process_weights", [False, True])
    def test_a_gated_hooked_transformer_is_refused(self, tokenizer, process_weights):
        classifier = make_classifier("llama", len(tokenizer))
        head = RewardHead.from_classifier(
            classifier, tokenizer=tokenizer, model_class="HookedTransformer", process_weights=process_weights
        )
        self.refused(head, r"HookedTransformer computes.*before any hook.*Use site 'mlp'.*without model_class")
        assert head.check(reference=classifier)["passed"].all()


class FusedSiLU(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


class Toy(nn.Module):
    """Two MLPs in a row, in the ways that there are to compute one, with `act_fn` where its name promises it."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        shared = nn.SiLU()
        self.act_fn = nn.ModuleList(shared if "shared" in kind else nn.SiLU() for _ in range(2))
        self.fused = FusedSiLU()
        self.norm = nn.RMSNorm(16, elementwise_affine=False)

    def hidden(self, layer, x):
        gate, up, act = self.gate[layer](x), self.up[layer](x), self.act_fn[layer]
        return {
            "gated": lambda: act(gate) * up,
            "gated, shared": lambda: act(gate) * up,
            "ungated": lambda: act(gate),
            "ungated, shared": lambda: act(gate),
            "dropout after": lambda: nn.functional.dropout(act(gate), training=self.training) * up,
            "functional": lambda: nn.functional.silu(gate) * up,
            "fused": lambda: self.fused(torch.cat([gate, up], dim=-1)),
            "norm after": lambda: self.norm(act(gate) * up),
            "shifted": lambda: act(gate) * up + 0.1,
            "other order": lambda: (act(gate) * up).flip(-1),
            "unused": lambda: (act(gate), nn.functional.silu(gate) * up)[1],
            "twice": lambda: act(act(gate)) * up,
            "both": lambda: act(gate) * act(up),
        }[self.kind]()

    def forward(self, x):
        for layer in range(2):
            x = x + self.down[layer](self.hidden(layer, x))
        return x


def search(kind):
    toy = Toy(kind).eval()
    inputs = [HookSite(module, "input") for module in toy.down]
    text = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    before = toy(text)
    try:
        return toy, inputs, find_gates(lambda: toy(text.repeat(GATE_ROWS, 1, 1)), toy.modules(), inputs)
    finally:
        assert torch.equal(toy(text), before), "no hook stays"


@pytest.mark.parametrize("kind", ["gated", "dropout after"])
def test_a_gate_is_found(kind):
    toy, _, gates = search(kind)
    assert gates == [HookSite(module, "output") for module in toy.act_fn]


@pytest.mark.parametrize("kind", ["ungated", "ungated, shared"])
def test_no_gate_is_found(kind):
    _, inputs, gates = search(kind)
    assert gates == inputs


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gated, shared", "its SiLU runs 2 times"),
        ("twice", "its SiLU runs 2 times"),
        ("both", "the output of SiLU is not a factor"),
        ("functional", "no module of its own"),
        ("fused", "no module of its own"),
        ("norm after", "the output of SiLU is not a factor"),
        ("shifted", "the output of SiLU is not a factor"),
        ("other order", "the output of SiLU is not a factor"),
        ("unused", "the output of SiLU is not a factor"),
    ],
)
def test_modules_that_are_not_a_factor_are_refused(kind, why):
    with pytest.raises(ModelError, match=rf"act\(gate\) of layer 0 can be neither .* because .*{why}"):
        search(kind)
