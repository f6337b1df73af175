"""Scores and ablations of neurons of experts: all of them count an expert that is not routed to as 0."""

import itertools

import pytest
import torch
import transformers
from expert_reference import ExpertReference
from tiny_models import grid, make_pairs

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronSet,
    OtherResponse,
    PreferencePairs,
    Resample,
    RewardHead,
    Scale,
    Zero,
)
from rmtension.attribution import single_neuron_effects
from rmtension.errors import ModelError
from rmtension.interventions import score_without
from rmtension.neurons import conflict
from rmtension.synthetic.check_matrix import make_classifier

SIZES = {"num_hidden_layers": 2, "intermediate_size": 12, "moe_intermediate_size": 12}
# Some norms are float32 in a float64 model.
TOLERANCE = {"atol": 1e-6, "rtol": 0}


@pytest.fixture(scope="module", params=grid(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]))
def folder(request, tmp_path_factory, plain_tokenizer):
    folder = tmp_path_factory.mktemp(request.param)
    make_classifier(request.param, len(plain_tokenizer) + 8, **SIZES).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(folder):
    return RewardHead.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(folder):
    return ExpertReference(folder)


@pytest.fixture(scope="module")
def few():
    return PreferencePairs(make_pairs(3))


@pytest.fixture(scope="module")
def neurons(head):
    mask = torch.rand(2, head.n_neurons("expert"), generator=torch.Generator().manual_seed(0)) < 0.4
    return NeuronSet(mask, "expert", head.architecture)


@pytest.fixture(scope="module")
def means(head, few):
    return Mean(ActivationCollector(head, site="expert").collect(few))


def texts_of(reference, pairs):
    return [(*reference.tokens(pair, side), side) for pair in pairs for side in ("chosen", "rejected")]


@pytest.mark.parametrize("positions", grid(["all", "response", "last"]))
def test_statistics_count_an_expert_that_is_not_routed_to_as_zero(head, reference, few, positions):
    rows = torch.cat(
        [
            reference.activations("expert", ids)[:, reference.selected(ids.shape[1], n_prompt, positions)]
            for ids, n_prompt, _ in texts_of(reference, few)
        ],
        dim=1,
    )
    statistics = ActivationCollector(head, site="expert", positions=positions).collect(few)
    expected = {
        "mean": rows.mean(dim=1),
        "abs_mean": rows.abs().mean(dim=1),
        "rms": rows.square().mean(dim=1).sqrt(),
        "frequency": (rows > 0).double().mean(dim=1),
        "channel_mean": rows.mean(dim=1),
    }
    for name, values in expected.items():
        assert torch.allclose(getattr(statistics, name), values, **TOLERANCE), name
    # Negative control: the mean over the tokens that are routed to the expert is another number.
    routed = rows.sum(dim=1) / (rows != 0).sum(dim=1).clamp(min=1)
    assert not torch.allclose(statistics.mean, routed, atol=1e-3)


def replaced(reference, few, replacement, means):
    """(layer, activation) -> a_ref, for one text at a time."""
    if isinstance(replacement, Scale):
        return lambda layer, values: replacement.alpha * values
    if isinstance(replacement, Mean):
        return lambda layer, values: means[layer].expand_as(values)
    return lambda layer, values: torch.zeros_like(values)


@pytest.mark.parametrize(
    ("kind", "positions"),
    grid(
        list(itertools.product(["zero", "scale", "mean"], ["all", "response", "last"])),
        keep=[("zero", "all"), ("mean", "response")],
        unpack=True,
    ),
)
def test_ablation_and_attribution_patching_are_those_of_the_dense_computation(
    head, reference, few, neurons, means, kind, positions
):
    replacement = {"zero": Zero(), "scale": Scale(0.4), "mean": means}[kind]
    to = replaced(reference, few, replacement, means.statistics.mean)
    expected, patched = [], []
    for ids, n_prompt, side in texts_of(reference, few):
        selected = torch.zeros(ids.shape[1], 1, dtype=torch.bool)
        selected[reference.selected(ids.shape[1], n_prompt, positions)] = True

        def ablate(layer, values, selected=selected):
            return torch.where(selected & neurons.mask[layer], to(layer, values), values)

        with torch.no_grad(), reference.hooked("expert", ablate):
            expected.append(reference.reward(ids))
        values, slopes = reference.activations("expert", ids, gradients=True)
        steps = torch.stack([to(layer, row) - row for layer, row in enumerate(values)])
        patched.append((1 if side == "chosen" else -1) * (steps * slopes * selected).sum(dim=1))
    with AblationContext(head, neurons, replacement, positions=positions):
        rewards = head.score_pairs(few)
    both = torch.stack([rewards.chosen, rewards.rejected], dim=1).flatten()
    assert torch.allclose(both, torch.stack(expected), **TOLERANCE)
    assert (rewards.margin - head.score_pairs(few).margin).abs().max() > 1e-4
    patching = NeuronAttribution(
        head, "attribution_patching", replacement=replacement, site="expert", positions=positions
    )
    scores = patching.score(few).values
    assert torch.allclose(scores, torch.stack(patched).sum(dim=0) / len(few), **TOLERANCE)
    # Negative control: not the neurons of the next expert.
    assert not torch.allclose(scores, scores.roll(reference.d_expert, 1), atol=1e-4)


def test_attribution_patching_is_the_first_order_effect_of_the_ablation(head, few):
    """The central difference of scaling by 1 - h and 1 + h; routing does not flip for so small a change."""
    h = 1e-3
    patching = NeuronAttribution(head, "attribution_patching", site="expert").score(few).values
    order = patching.abs().flatten().argsort(descending=True)
    for place in order[:3].tolist():
        single = torch.zeros_like(patching, dtype=torch.bool)
        single.view(-1)[place] = True
        margins = []
        for alpha in (1 - h, 1 + h):
            with AblationContext(head, NeuronSet(single, "expert", head.architecture), Scale(alpha)):
                margins.append(head.score_pairs(few).margin.mean())
        # Float32 norms round a margin to about 1e-7, which 2 h divides.
        assert torch.allclose((margins[0] - margins[1]) / (2 * h), patching[single][0], rtol=0.01, atol=1e-4)


def test_other_methods_and_pairs(head, reference, few):
    """Gradient x activation, mean differences, and the path of integrated gradients, which sums to the change."""
    products, differences = 0.0, 0.0
    for ids, _, side in texts_of(reference, few):
        sign = 1 if side == "chosen" else -1
        values, slopes = reference.activations("expert", ids, gradients=True)
        products = products + sign * (values * slopes).sum(dim=1) / len(few)
        differences = differences + sign * values.mean(dim=1) / len(few)
    for method, expected in {"gradient_x_activation": products, "mean_difference": differences}.items():
        scores = NeuronAttribution(head, method, site="expert").score(few)
        assert torch.allclose(scores.values, expected, **TOLERANCE), method
    by_pair = NeuronAttribution(head, "gradient_x_activation", site="expert").per_pair(few)
    assert torch.allclose(by_pair.mean(), products, **TOLERANCE)
    assert list(by_pair.to_frame().columns)[:5] == ["id", "layer", "neuron", "expert", "index"]
    assert list(conflict(by_pair, by_pair).to_frame().columns)[:4] == ["layer", "neuron", "expert", "index"]


def test_direct_effects_are_those_of_the_down_projections(head, reference, few):
    """At the last token: activation x routing weight x output column, through the final norm with its scale frozen."""
    attribution = NeuronAttribution(head, "direct_effect", site="expert")
    if head.architecture.startswith("qwen2moe"):
        with pytest.raises(ModelError, match=r"direct_effect: cannot score site 'expert'.*shared experts"):
            attribution.score(few)
        return
    norm, expected = reference.model.base_model.norm, 0.0
    gain = norm.weight.detach() * reference.model.score.weight.detach()[0]
    handle = norm.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0][0, -1].detach()))
    for ids, _, side in texts_of(reference, few):
        streams, seen = [], {}
        keep = seen.__setitem__
        with torch.no_grad(), reference.hooked("expert", lambda layer, values, keep=keep: keep(layer, values[0, -1])):
            reference.reward(ids)
        sigma = (streams[0].square().mean() + norm.variance_epsilon).sqrt()
        for layer, experts in enumerate(reference.experts):
            down = experts.down_proj.detach()
            written = (down if "GptOss" in type(experts).__name__ else down.mT) @ (gain / sigma)
            seen[layer] = seen[layer] * (written * reference.share[layer][-1][:, None]).flatten().cpu()
        sign = 1 if side == "chosen" else -1
        expected = expected + sign * torch.stack([seen[layer] for layer in range(2)]).detach() / len(few)
    handle.remove()
    scores = attribution.score(few).values
    assert torch.allclose(scores, expected, **TOLERANCE)
    assert scores.abs().max() > 1e-3
    assert not torch.allclose(scores, scores.roll(reference.d_expert, 1), atol=1e-4)
    assert {"layers", "direct contributions"} <= set(head.check()["check"])


@pytest.mark.grid
@pytest.mark.parametrize("method", ["integrated_gradients", "graddrop", "other response", "resample"])
def test_methods_that_run_again(head, few, neurons, method):
    if method == "graddrop":
        scores = NeuronAttribution(
            head, "attribution_patching", site="expert", aggregate="absolute", graddrop=True
        ).score(few)
        assert (scores.values > 0).any()
        return
    if method == "resample":
        donors = Resample(ActivationCollector(head, site="expert").sample(few, n=8))
        plain = head.score_pairs(few).margin.mean()
        (layer, neuron), *_ = neurons.subsample(1)
        effects = single_neuron_effects(head, few, donors, site="expert", neurons=neurons.subsample(1))
        with AblationContext(head, neurons.subsample(1), donors):
            effect = head.score_pairs(few).margin.mean() - plain
        assert torch.allclose(effects.values[layer, neuron], effect, **TOLERANCE)
        patching = NeuronAttribution(head, "attribution_patching", site="expert", replacement=donors).score(few)
        assert torch.allclose(patching.values[layer, neuron], effect, rtol=0.3, atol=1e-3)
        return
    if method == "other response":
        patching = NeuronAttribution(head, "attribution_patching", site="expert", replacement=OtherResponse())
        effects = single_neuron_effects(head, few, OtherResponse(), site="expert", neurons=neurons)
        both = torch.stack([patching.score(few).values[neurons.mask], effects.values[neurons.mask]])
        assert both.corrcoef()[0, 1] > 0.8
        return
    scores = NeuronAttribution(head, method, site="expert", steps=64).score(few)
    # Smooth on the path of the highest layer, behind which no token is routed again.
    assert scores.completeness_gap[-1].abs() < 1e-4


def test_single_effects_and_sweeps_equal_contexts(head, few, neurons):
    some = neurons.subsample(6, seed=0)
    effects = single_neuron_effects(head, few, site="expert", neurons=some)
    plain = head.score_pairs(few).margin.mean()
    sets = []
    for layer, neuron in some:
        mask = torch.zeros_like(some.mask)
        mask[layer, neuron] = True
        sets.append(NeuronSet(mask, "expert", head.architecture))
        with AblationContext(head, sets[-1]):
            assert torch.allclose(
                effects.values[layer, neuron], head.score_pairs(few).margin.mean() - plain, **TOLERANCE
            )
    assert effects.values[some.mask].abs().max() > 1e-4
    swept = score_without(head, few, [neurons, *sets])
    for rewards, ablated in zip(swept, [neurons, *sets], strict=True):
        with AblationContext(head, ablated):
            assert torch.allclose(rewards.margin, head.score_pairs(few).margin, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:save_pretrained. transformers 4 computes other rewards")
@pytest.mark.parametrize("kind", grid(["zero", "scale", "mean"]))
def test_permanent_ablation_is_read_by_transformers(head, few, neurons, means, kind, tmp_path):
    replacement = {"zero": Zero(), "scale": Scale(0.4), "mean": means}[kind]
    if kind == "mean" and not head.architecture.startswith("gptoss"):
        with pytest.raises(ModelError, match=r"written to a bias.*have no biases.*AblationContext"):
            head.with_ablation(neurons, replacement)
        return
    texts = [pair.text("chosen") for pair in few]
    with AblationContext(head, neurons, replacement):
        expected = head.score(texts)
    plain = head.score(texts)
    permanent = head.with_ablation(neurons, replacement)
    assert torch.allclose(permanent.score(texts), expected, **TOLERANCE)
    permanent.save_pretrained(tmp_path)
    assert torch.allclose(RewardHead.from_pretrained(tmp_path, dtype=torch.float64).score(texts), expected, **TOLERANCE)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = [model(**head.tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
    assert torch.allclose(torch.stack(logits).cpu(), expected, **TOLERANCE)
    assert torch.equal(head.score(texts), plain)
    assert (plain - expected).abs().max() > 1e-3


def test_names_say_layer_expert_and_index(head, few, neurons, tmp_path):
    frame = neurons.to_frame()
    d_expert = head.n_neurons("expert") // 4
    assert list(frame.columns) == ["layer", "neuron", "expert", "index"]
    assert (frame["expert"] * d_expert + frame["index"] == frame["neuron"]).all()
    assert frame["index"].max() < d_expert
    assert set(frame["expert"]) == {0, 1, 2, 3}
    layer, neuron = list(neurons)[-1]
    assert (
        f"E{neuron // d_expert} N{neuron % d_expert}"
        in NeuronSet.from_indices(
            [(layer, neuron)], shape=tuple(neurons.mask.shape), site="expert", architecture=head.architecture
        )._repr_html_()
    )
    scores = NeuronAttribution(head, "gradient_x_activation", site="expert").score(few)
    assert list(scores.to_frame().columns)[:4] == ["layer", "neuron", "expert", "index"]
    statistics = ActivationCollector(head, site="expert").collect(few)
    assert list(statistics.to_frame().columns)[:4] == ["layer", "neuron", "expert", "index"]
    neurons.save(tmp_path / "set.safetensors")
    assert NeuronSet.load(tmp_path / "set.safetensors").to_frame().equals(frame)
