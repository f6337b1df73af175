"""True single-neuron effects against plain hooks, and measures of agreement against SciPy, NumPy and brute force."""

import numpy as np
import pytest
import torch
from model_states import snapshot
from replaced import NAMES, replacement_of, sides, targets_of
from scipy import stats
from some_neurons import some
from tiny_models import batches_of, grid, make_pairs, unchecked

from rmtension import (
    AblationContext,
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronScores,
    NeuronSet,
    OtherResponse,
    RewardHead,
)
from rmtension.attribution._faithfulness import faithfulness, sample_neurons
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._neuron_attribution import score_together
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import DataError, ModelError, OptionError, ProvenanceError
from rmtension.models._replay import Replay
from rmtension.neurons._neuron_scores import N_BLOCKS
from rmtension.neurons._score_agreement import MEASURES, _indices_within, agreement
from rmtension.store._provenance import Provenance

CLOSE = {"atol": 1e-9, "rtol": 0.0}
SITES = ("mlp", "attn_head")


@pytest.fixture(scope="module")
def gpt2(checkpoints):
    return RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)


@pytest.fixture(scope="module")
def few():
    return make_pairs(3)


@pytest.mark.parametrize("site", grid(SITES))
@pytest.mark.parametrize("positions", grid(["all", "response", "last"]))
@pytest.mark.parametrize("name", NAMES)
def test_single_effects_equal_hooks_on_transformers(both, few, site, positions, name):
    """Against transformers with a plain hook for every neuron, one text at a time, in float64."""
    head, reference = both
    texts = sides(reference, few)
    replacement = replacement_of(head, site, few, name)
    targets = targets_of(head, reference, site, few, positions, replacement)
    neurons = some(head, site)
    per_neuron = head.n_channels(site) // head.n_neurons(site)
    options = {"site": site, "positions": positions, "neurons": neurons}
    effects = single_neuron_effects(head, few, replacement=replacement, **options)

    def reward(ids, n_prompt, target, layer, neuron):
        def replace(number, activation):
            if number != layer:
                return None
            changed = activation.clone().reshape(1, ids.shape[1], -1)
            select = reference.selected(ids.shape[1], n_prompt, positions)
            columns = slice(neuron * per_neuron, (neuron + 1) * per_neuron)
            changed[0, select, columns] = target[layer].expand(ids.shape[1], -1)[select, columns]
            return changed.reshape(activation.shape)

        with torch.no_grad(), reference.hooked(site, replace):
            return float(reference.reward(ids))

    for layer, neuron in neurons:
        changes = []
        for pair, target in zip(texts, targets, strict=True):
            margins = []
            for layer_or_none in (layer, None):
                chosen, rejected = (
                    reward(ids, n, replaced, layer_or_none, neuron)
                    for (ids, n), replaced in zip(pair, target, strict=True)
                )
                margins.append(chosen - rejected)
            changes.append(margins[0] - margins[1])
        assert float(effects.values[layer, neuron]) == pytest.approx(np.mean(changes), abs=1e-9)
        assert float(effects.stderr[layer, neuron]) == pytest.approx(stats.sem(changes), abs=1e-9)
    # Neurons outside the set have no effect; effects are not 0, and differ between neurons.
    assert effects.values.isnan().equal(~neurons.mask)
    assert float(effects.values[neurons.mask].abs().max()) > 1e-4
    assert not torch.allclose(effects.values[neurons.mask].roll(1), effects.values[neurons.mask], atol=1e-5)
    where = effects.provenance
    assert (where.method, where.replacement) == ("effect of ablation", replacement.label)
    assert where.label == f"effect of ablation to {replacement.label}"


@pytest.mark.parametrize("positions", ["all", "response", "last"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "other_response"])
def test_single_effects_are_those_of_a_context_of_each_neuron(gpt2, few, name, positions):
    replacement = replacement_of(gpt2, "mlp", few, name)
    neurons = sample_of(gpt2, [(0, 3), (1, 7), (2, 11)])
    effects = single_neuron_effects(gpt2, few, replacement=replacement, positions=positions, neurons=neurons)
    base, changes = gpt2.score_pairs(few).margin, []
    for index in neurons:
        with AblationContext(gpt2, sample_of(gpt2, [index]), replacement, positions=positions):
            changes.append(float((gpt2.score_pairs(few).margin - base).mean()))
        assert float(effects.values[index]) == pytest.approx(changes[-1], abs=1e-9)
    # Negative control: the neurons' effects differ from each other and from 0.
    assert len({round(change, 6) for change in changes} | {0.0}) == 4


def test_single_effects_cost_the_documented_blocks(gpt2, few):
    """Blocks run: three for the batch, the last one for the start; above layer l, 2 - l for each of the 64 neurons.

    Every layer's block runs once more, to see whether the stream takes the projection's output as it is.
    """
    blocks = [gpt2.body.block(layer) for layer in range(3)]
    calls = []
    handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
    try:
        single_neuron_effects(gpt2, few)
        assert len(calls) == 3 + 3 + 1 + 64 * (2 + 1 + 0)
        calls.clear()
        # An MLP follows the heads in their block, so that block runs too.
        single_neuron_effects(gpt2, few, site="attn_head")
        assert len(calls) == 3 + 3 + 1 + 4 * (3 + 2 + 1)
        calls.clear()
        # Layers without a wanted neuron cost nothing.
        single_neuron_effects(gpt2, few, neurons=sample_of(gpt2, [(1, 5)]))
        assert len(calls) == 3 + 1 + (1 + 1) * 1
    finally:
        for handle in handles:
            handle.remove()


def test_every_layer_starts_from_the_same_bits(checkpoints, few):
    """So that one starting point serves the neurons of all layers."""
    for family in ("gpt2", "llama"):
        for dtype in (torch.float32, torch.bfloat16):
            head = RewardHead.from_pretrained(checkpoints[family], dtype=dtype)
            for batch in batches_of(head, few):
                replay = Replay(head, batch)
                with torch.no_grad():
                    assert all(torch.equal(replay.rewards_from(layer), replay.base) for layer in range(head.n_layers))


def sample_of(head, indices):
    shape = (head.n_layers, head.n_neurons("mlp"))
    return NeuronSet.from_indices(indices, shape=shape, site="mlp", architecture=head.architecture)


def test_single_effects_run_the_whole_model_under_user_hooks(gpt2, few):
    """With a hook of the user's on the bridge, the whole model runs for every neuron, hook included."""
    neurons = some(gpt2, "mlp")
    plain = single_neuron_effects(gpt2, few, neurons=neurons)

    def nothing(value, hook):
        return value

    def half(value, hook):
        return value / 2

    for hook, same in ((nothing, True), (half, False)):
        with gpt2.model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", hook)]):
            (batch,) = batches_of(gpt2, few)
            replay = Replay(gpt2, batch)
            assert not replay.is_partial
            with pytest.raises(ModelError, match="only transformers' own modules run one by one"):
                replay.stream(0)
            hooked = single_neuron_effects(gpt2, few, neurons=neurons)
        # The bridge's attention is rounded to float32.
        assert torch.allclose(hooked.values[neurons.mask], plain.values[neurons.mask], atol=1e-5) == same


def test_the_model_is_unchanged_afterwards(gpt2, few, monkeypatch):
    before = snapshot(gpt2)
    statistics = ActivationCollector(gpt2).collect(few)
    scores = NeuronAttribution(gpt2, "mean_difference").score(few)
    faithfulness(gpt2, few, scores, replacement=Mean(statistics), sample=6, set_fractions=(0.1,), n_random=1)
    assert snapshot(gpt2) == before

    def fail(*_):
        raise KeyboardInterrupt

    for target in (
        "rmtension.models._replay.Replay.read",
        "rmtension.attribution._single_effects.RunningScores.update",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, fail)
            with pytest.raises(KeyboardInterrupt):
                single_neuron_effects(gpt2, few, site="attn_head")
        assert snapshot(gpt2) == before


# -- measures ------------------------------------------------------------------------------------------------------


def made_scores(values, blocks=None, *, sign=-1, data="a"):
    """Scores with given values, and given values of every block of prompts, which average to them."""
    values = torch.as_tensor(values, dtype=torch.float64)
    blocks = values.expand(N_BLOCKS, *values.shape) if blocks is None else torch.as_tensor(blocks)
    without = (blocks.sum(0) - blocks) / (N_BLOCKS - 1)
    provenance = Provenance("toy", "m", "mlp", "all", "probe", "float64", data, 320, 640, "0", sign=sign)
    return NeuronScores(values, torch.ones_like(values), provenance, without)


def measures(scores, truth, **options):
    measured = torch.isfinite(truth.values)
    return agreement(scores, truth, measured, **({"top": 0.1, "level": 0.95, "seed": 0} | options))


def test_measures_agree_with_scipy_and_brute_force():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 40))
    predicted = 0.5 * truth + 0.4 * rng.normal(size=truth.shape)
    # Ties and zeros, as models with ReLU have.
    truth[0, :10], predicted[0, :8] = 0.0, 0.0
    result = measures(made_scores(predicted), made_scores(truth), top=0.2)
    a, b = predicted.flatten(), truth.flatten()
    assert result["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert result["slope"] == pytest.approx(stats.linregress(a, b).slope, abs=1e-12)
    moves = (a != 0) & (b != 0)
    assert result["sign_agreement"] == pytest.approx(np.mean(np.sign(a[moves]) == np.sign(b[moves])))
    tops = [set(sorted(range(120), key=lambda i, each=each: -abs(each[i]))[:24]) for each in (a, b)]
    assert result["top_precision"] == pytest.approx(len(tops[0] & tops[1]) / 24)
    # Contributions predict effects with their sign turned.
    turned = measures(made_scores(-predicted, sign=1), made_scores(truth), top=0.2)
    assert turned == pytest.approx(result)
    # Magnitudes are compared with magnitudes.
    size = measures(made_scores(np.abs(predicted), sign=None), made_scores(truth), top=0.2)
    assert size["spearman"] == pytest.approx(stats.spearmanr(np.abs(a), np.abs(b)).statistic, abs=1e-12)
    assert np.isnan(size["sign_agreement"])
    assert size["top_precision"] == result["top_precision"]


def test_without_other_prompts_there_is_no_interval():
    """If one block holds all prompts, no pairs remain without that block."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 30))
    known, unknown = made_scores(values), made_scores(values + 0.1 * rng.normal(size=values.shape))
    without = known.without_block.clone()
    without[3] = torch.nan
    result = measures(NeuronScores(known.values, known.stderr, known.provenance, without), unknown)
    for name in MEASURES:
        assert np.isfinite(result[name])
        assert np.isnan([result[f"{name}_low"], result[f"{name}_high"]]).all()
    assert np.isfinite(list(measures(known, unknown).values())).all()


def test_intervals_contain_the_observed_value():
    """With few neurons, shares change in steps."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        blocks = rng.normal(size=(2, N_BLOCKS, 3, 4)) + rng.normal(size=(2, 1, 3, 4))
        result = measures(*(made_scores(each.mean(0), each) for each in blocks), top=0.2)
        for name in MEASURES:
            assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]


@pytest.mark.parametrize("sizes", [[5, 9], [2, 2, 2], [1, 1, 6]])
def test_resampled_neurons_vary_as_samples_do(sizes):
    """The variance of a layer's resampled mean is s^2 / n; drawing n of n would give (n - 1) / n of it."""
    layers = np.repeat(np.arange(len(sizes)), sizes)
    values = np.random.default_rng(1).normal(size=len(layers))
    drawn = values[_indices_within(layers, 200_000, np.random.default_rng(2))]
    strata = [len(layers)] if min(sizes) < 2 else sizes
    ends = np.cumsum([size - 1 for size in strata])[:-1]
    for own, part in zip(np.split(values, np.cumsum(strata)[:-1]), np.split(drawn, ends, axis=1), strict=True):
        assert part.shape[1] == len(own) - 1
        # 1%: three standard errors of the variance of 200,000 draws.
        assert part.mean(1).var() == pytest.approx(own.var(ddof=1) / len(own), rel=0.01)
        assert np.isin(part, own).all()


def test_perfect_scores_agree_and_shuffled_scores_do_not():
    rng = np.random.default_rng(1)
    truth = made_scores(rng.normal(size=(4, 500)))
    perfect = measures(truth, truth)
    for name, value in perfect.items():
        assert value == pytest.approx(1.0), name
    shuffled = measures(made_scores(rng.permutation(truth.values.numpy().flatten()).reshape(4, 500)), truth)
    assert abs(shuffled["spearman"]) < 4 / 2000**0.5
    assert abs(shuffled["sign_agreement"] - 0.5) < 4 * 0.5 / 2000**0.5
    assert shuffled["top_precision"] < 0.2
    assert abs(shuffled["slope"]) < 4 / 2000**0.5


@pytest.mark.grid
@pytest.mark.parametrize("sampled", [False, True])
def test_intervals_cover_the_population_value(sampled):
    """95% intervals of the rank correlation contain its mean over data sets of one population.

    Of 100 data sets, between 88 and 100 do so with 99% probability if the true share is .95.
    """
    rng = np.random.default_rng(2)
    population = rng.normal(size=(2, 300))
    effects = population + 0.6 * rng.normal(size=population.shape)
    results = []
    for _ in range(100):
        # Every block of prompts has its own noise, and scores and truth share part of it.
        noise = rng.normal(size=(3, N_BLOCKS, *population.shape))
        blocks = population + noise[0] + noise[2], effects + noise[1] + noise[2]
        scores, truth = (made_scores(each.mean(0), each) for each in blocks)
        measured = torch.ones(2, 300, dtype=torch.bool)
        if sampled:
            measured = torch.zeros(2, 300, dtype=torch.bool)
            for layer in range(2):
                measured[layer, torch.from_numpy(rng.permutation(300)[:60])] = True
        results.append(agreement(scores, truth, measured, top=0.1, level=0.95, seed=0))
    target = np.mean([result["spearman"] for result in results])
    covered = [result["spearman_low"] <= target <= result["spearman_high"] for result in results]
    assert np.mean(covered) >= 0.88
    # Negative control: intervals of half the width cover less.
    narrow = [
        abs(result["spearman"] - target) <= (result["spearman_high"] - result["spearman_low"]) / 4 for result in results
    ]
    assert np.mean(narrow) < 0.88


def test_faithfulness_agrees_with_scipy_and_single_ablations(gpt2, few):
    statistics = ActivationCollector(gpt2).collect(few)
    patching, difference = score_together(
        [
            NeuronAttribution(gpt2, "attribution_patching", replacement=Mean(statistics)),
            NeuronAttribution(gpt2, "mean_difference"),
        ],
        few,
    )
    named = {"patching": patching, "difference": difference}
    truth = single_neuron_effects(gpt2, few, replacement=Mean(statistics))
    options = {"replacement": Mean(statistics), "set_fractions": (0.05, 0.2), "n_random": 2}
    result = faithfulness(gpt2, few, named, true_effects=truth, **options)
    summary = result.summary.set_index("method")
    for name, scores in named.items():
        expected = stats.spearmanr(scores.as_effects().flatten(), truth.values.flatten()).statistic
        assert summary.loc[name, "spearman"] == pytest.approx(expected, abs=1e-12)
        assert summary.loc[name, "spearman_low"] <= expected <= summary.loc[name, "spearman_high"]
    assert summary.loc["patching", "spearman"] > 0.9 > summary.loc["difference", "spearman"]
    assert list(result.neurons) == ["layer", "neuron", "effect", "stderr", "patching", "difference"]
    assert len(result.neurons) == truth.values.numel()
    # Sets: the effect of the whole set together, and the sum that was predicted.
    base = gpt2.score_pairs(few).margin
    for row in result.sets.to_dict("records"):
        top = named[row["method"]].top(row["fraction"])
        with AblationContext(gpt2, top, Mean(statistics)):
            change = float((gpt2.score_pairs(few).margin - base).mean())
        assert row["effect"] == pytest.approx(change, abs=1e-9)
        assert row["size"] == len(top)
        assert row["predicted"] == pytest.approx(float(named[row["method"]].as_effects()[top.mask].sum()))
        assert row["random_min"] <= row["random"] <= row["random_max"]
        assert row["low"] <= row["effect"] <= row["high"]
        assert row["match"] == ("layer" if max(top.n_per_layer) <= 32 else "model")
    assert len(result.sets) == 4
    # True effects are computed unless they are given; a single method needs no name.
    alone = faithfulness(gpt2, few, patching, replacement=Mean(statistics), set_fractions=())
    assert alone.sets.empty
    row = alone.summary.iloc[0]
    assert row["method"] == "attribution_patching to mean"
    assert row["spearman"] == summary.loc["patching", "spearman"]


def test_a_sample_is_spread_evenly_over_layers(gpt2, few, tmp_path):
    scores = NeuronAttribution(gpt2, method="attribution_patching").score(few)
    chosen = sample_neurons(gpt2, "mlp", 20, seed=3)
    assert sorted(chosen.n_per_layer) == [6, 7, 7]
    assert chosen == sample_neurons(gpt2, "mlp", 20, seed=3)
    assert chosen != sample_neurons(gpt2, "mlp", 20, seed=4)
    result = faithfulness(gpt2, few, scores, sample=20, seed=3, set_fractions=(0.1,), n_random=1)
    assert list(zip(result.neurons["layer"], result.neurons["neuron"], strict=True)) == list(chosen)
    assert result.summary["n"].tolist() == [20]
    assert result.summary["top"].tolist() == [2]
    assert "n = 20" in repr(result)
    assert "spearman" in repr(result)
    result.save(tmp_path / "result.safetensors")
    back = Faithfulness.load(tmp_path / "result.safetensors")
    assert repr(back) == repr(result)
    for name in ("summary", "neurons", "sets"):
        assert getattr(back, name).equals(getattr(result, name))
    assert back.to_frame().equals(result.summary)


def test_responses_that_do_not_fit_are_cut_everywhere(gpt2, few, monkeypatch):
    longest = max(len(text) - text.response_start for text in gpt2.encode(few).chosen)
    monkeypatch.setattr(gpt2, "max_length", longest - 2)
    options = {"sample": 6, "set_fractions": (0.1,), "n_random": 1}
    with monkeypatch.context() as opened:
        opened.setattr(gpt2, "truncate_response", True)
        scores = NeuronAttribution(gpt2, method="gradient_x_activation").score(few)
        assert len(faithfulness(gpt2, few, scores, **options).neurons) == 6
    with pytest.raises(DataError, match="truncate_response=True"):
        NeuronAttribution(gpt2, "mean_difference").score(few)
    with pytest.raises(DataError, match="truncate_response=True"):
        faithfulness(gpt2, few, scores, **options)


def test_activations_are_replaced_at_the_positions_of_the_scores(gpt2, few):
    scores = NeuronAttribution(gpt2, method="gradient_x_activation", positions="last").score(few)
    result = faithfulness(gpt2, few, scores, sample=6, set_fractions=())
    assert result.provenance.positions == "last"
    elsewhere = faithfulness(gpt2, few, scores, sample=6, set_fractions=(), positions="all")
    assert elsewhere.provenance.positions == "all"
    assert not result.neurons["effect"].equals(elsewhere.neurons["effect"])


def test_other_responses_ablate_no_sets(gpt2, few):
    scores = NeuronAttribution(gpt2, method="attribution_patching", replacement=OtherResponse()).score(few)
    result = faithfulness(gpt2, few, scores, replacement=OtherResponse())
    assert result.sets.empty
    assert result.summary["spearman"].item() > 0.9


@pytest.mark.parametrize("name", ["resample", "scale"])
def test_sets_are_ablated_by_every_replacement_that_a_context_takes(gpt2, few, name):
    replacement = replacement_of(gpt2, "mlp", few, name)
    scores = NeuronAttribution(gpt2, "attribution_patching", replacement=replacement).score(few)
    result = faithfulness(gpt2, few, scores, replacement=replacement, set_fractions=(0.1,), n_random=1)
    assert result.summary["spearman"].item() > 0.9
    assert result.provenance.replacement == replacement.label
    with AblationContext(gpt2, scores.top(0.1), replacement):
        without = gpt2.score_pairs(few).margin
    assert result.sets["effect"].item() == pytest.approx(float((without - gpt2.score_pairs(few).margin).mean()))


class TestWrongArguments:
    def test_sets_that_cannot_be_drawn_stop_before_anything_runs(self, gpt2, few, monkeypatch):
        scores = NeuronAttribution(gpt2, "mean_difference").score(few)
        monkeypatch.setattr("rmtension.attribution._faithfulness.single_neuron_effects", None)
        with pytest.raises(OptionError, match="matched_random: "):
            faithfulness(gpt2, few, scores, set_fractions=(0.9,))

    def test_wrong_options_are_refused(self, gpt2, few):
        scores = NeuronAttribution(gpt2, "mean_difference").score(few)
        for options, message in [
            ({"sample": 0}, "sample: expected 1 to 192"),
            ({"sample": 2}, "sample: expected at least 3"),
            ({"level": 2.0}, "level"),
            ({"n_random": -1}, "n_random: expected 0 or more"),
            ({"sample": 9, "true_effects": single_neuron_effects(gpt2, few)}, "sample: true_effects fixes which"),
        ]:
            with pytest.raises(OptionError, match=message):
                faithfulness(gpt2, few, scores, **options)
        with pytest.raises(OptionError, match="at least one NeuronScores"):
            faithfulness(gpt2, few, {})

        with pytest.raises(OptionError, match=r"\['effect'\] are names of columns"):
            faithfulness(gpt2, few, {"effect": scores})
        both = {"here": scores, "there": NeuronAttribution(gpt2, "mean_difference", positions="response").score(few)}
        with pytest.raises(OptionError, match=r"positions: the scores are of \['all', 'response'\] tokens"):
            faithfulness(gpt2, few, both)
        bare = NeuronScores(scores.values, scores.stderr, scores.provenance)
        with pytest.raises(OptionError, match="keep no blocks of prompts"):
            faithfulness(gpt2, few, bare)

    def test_scores_of_another_model_are_refused(self, gpt2, head, few):
        with pytest.raises(ProvenanceError, match=r"(model|architecture) differs"):
            faithfulness(gpt2, few, NeuronAttribution(head, "mean_difference").score(few), sample=3)

    def test_true_effects_of_another_ablation_are_refused(self, gpt2, few):
        scores = NeuronAttribution(gpt2, method="gradient_x_activation").score(few)
        neurons = some(gpt2, "mlp")
        for truth, field in [
            (single_neuron_effects(gpt2, few, OtherResponse(), neurons=neurons), "replacement"),
            (single_neuron_effects(gpt2, few, positions="response", neurons=neurons), "positions"),
            (single_neuron_effects(gpt2, few[:2], neurons=neurons), "data"),
            (scores, "method"),
        ]:
            with pytest.raises(ProvenanceError, match=f"true_effects of faithfulness: {field} differs"):
                faithfulness(gpt2, few, scores, true_effects=truth)
        right = single_neuron_effects(gpt2, few, neurons=neurons)
        assert faithfulness(gpt2, few, scores, true_effects=right, set_fractions=()).neurons["effect"].notna().all()

    def test_wrong_arguments_of_single_effects_are_refused(self, gpt2, checkpoints, few):
        heads = NeuronSet(torch.ones(3, 4, dtype=torch.bool), "attn_head", gpt2.architecture)
        with pytest.raises(OptionError, match=r"neurons: expected a set of \(3, 64\) at site 'mlp'"):
            single_neuron_effects(gpt2, few, neurons=heads)
        foreign = NeuronSet(torch.ones(3, 64, dtype=torch.bool), "mlp", "another")
        with pytest.raises(ProvenanceError, match="neurons: the set indexes neurons of 'another'"):
            single_neuron_effects(gpt2, few, neurons=foreign)
        with pytest.raises(
            OptionError, match=r"replacement: expected a replacement such as Zero\(\), got 'mean'. Write Mean\("
        ):
            unchecked(single_neuron_effects)(gpt2, few, replacement="mean")
        statistics = ActivationCollector(gpt2, site="attn_head").collect(few)
        for call in (
            lambda **options: single_neuron_effects(gpt2, few, **options),
            lambda **options: faithfulness(gpt2, few, NeuronAttribution(gpt2, "direct_effect").score(few), **options),
        ):
            with pytest.raises(ProvenanceError, match="replacement: its activations are those of site 'attn_head'"):
                call(replacement=Mean(statistics))
        with pytest.raises(DataError, match="at least one preference pair"):
            single_neuron_effects(gpt2, few[:0])
        with pytest.raises(ModelError, match="opened as a language model"):
            single_neuron_effects(RewardHead.from_language_model(checkpoints["gpt2"]), few)
