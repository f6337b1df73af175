"""Activation scores against sums over the raw classifier's own activations, text by text and block by block."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import grid, make_pairs, save_classifier
from transformers import AutoModelForSequenceClassification

from rmtension import NeuronAttribution, PreferencePairs, RewardHead
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.neurons._neuron_scores import N_BLOCKS, block_of, jackknife_stderr
from rmtension.passes._activation_profile import SCORES, ActivationProfile
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._selectivity import selectivity

POSITIONS = ("all", "response", "last")


@pytest.fixture(scope="module")
def pairs():
    made = make_pairs(20)
    # Two pairs of one prompt: they belong to one block.
    again = PreferencePairs.from_records(
        [{"prompt": made[0].prompt, "chosen": "sure then", "rejected": "sorry", "objective": "helpful"}]
    )
    return made + again


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    return [save_classifier(tmp_path_factory.mktemp(f"m{seed}"), "gpt2", tokenizer, seed=seed) for seed in (0, 5)]


@pytest.fixture(scope="module")
def heads(folders):
    return [RewardHead.from_pretrained(folder, dtype=torch.float64) for folder in folders]


@pytest.fixture(scope="module")
def profiles(heads, pairs):
    return collect_profiles(heads[0], pairs, sites=("mlp", "attn_head"), positions=POSITIONS, base=heads[1])


@pytest.fixture(scope="module")
def raw(folders, heads, pairs):
    """Every text's activations from transformers' own modules: (model, site) -> [side][pair] -> [layer, token, column].

    One text at a time, read where GPT-2 computes them: the input of `mlp.c_proj` and of `attn.c_proj`.
    """
    encoded = heads[0].encode(pairs)
    activations = {}
    for number, folder in enumerate(folders):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        kept = {"mlp": [], "attn_head": []}
        hooks = []
        for block in model.transformer.h:
            for site, module in (("mlp", block.mlp.c_proj), ("attn_head", block.attn.c_proj)):
                hooks.append(
                    module.register_forward_pre_hook(lambda _, inputs, part=kept[site]: part.append(inputs[0][0]))
                )
        for site in kept:
            activations[number, site] = ([], [])
        for side, texts in enumerate((encoded.chosen, encoded.rejected)):
            for text in texts:
                for part in kept.values():
                    part.clear()
                with torch.no_grad():
                    model(input_ids=torch.tensor([text.ids]))
                for site, part in kept.items():
                    activations[number, site][side].append(torch.stack(part))
        for hook in hooks:
            hook.remove()
    return activations, encoded


def selected(activation, text, positions):
    start = {"all": 0, "response": text.response_start, "last": len(text) - 1}[positions]
    return activation[:, start:]


def neurons_of(activation, site, n_heads=4):
    """Heads: the norm of their columns."""
    if site == "mlp":
        return activation
    layers, tokens, width = activation.shape
    return activation.reshape(layers, tokens, n_heads, width // n_heads).norm(dim=-1)


def expected_sides(raw, site, positions, method, pool):
    """The mean of a method's statistic on each side, by loops over texts."""
    activations, encoded = raw
    sides = []
    for side, texts in enumerate((encoded.chosen, encoded.rejected)):
        per_text, weights = [], []
        for text, own, base in zip(texts, activations[0, site][side], activations[1, site][side], strict=True):
            a = neurons_of(selected(own, text, positions), site)
            moved = neurons_of(selected(own - base, text, positions), site)
            per_token = {
                "magnitude": a,
                "mean_difference": a,
                "abs_mean": a.abs(),
                "rms": a**2,
                "frequency": (a > 0).double(),
                "change": moved**2,
            }[method]
            per_text.append(per_token.mean(dim=1))
            weights.append(per_token.shape[1] if pool else 1)
        weights = torch.tensor(weights, dtype=torch.float64)
        mean = torch.einsum("t,tln->ln", weights, torch.stack(per_text)) / weights.sum()
        sides.append(mean.sqrt() if method in ("rms", "change") else mean)
    return sides


@pytest.mark.parametrize("site", grid(["mlp", "attn_head"]))
@pytest.mark.parametrize("positions", grid(POSITIONS))
@pytest.mark.parametrize("method", SCORES)
def test_scores_are_those_of_the_raw_classifier(profiles, raw, site, positions, method):
    """In float64; only the order of sums differs (1e-12)."""
    chosen, rejected = expected_sides(raw, site, positions, method, pool=False)
    expected = chosen - rejected if method == "mean_difference" else (chosen + rejected) / 2
    scores = profiles[site, positions].scores(method)
    assert torch.allclose(scores.values, expected, rtol=1e-12, atol=1e-12)
    assert scores.n == 21
    assert scores.provenance.method == method


def test_pooled_tokens_weight_texts_by_length(heads, pairs, raw, profiles):
    """The published rule: every token counts once. Texts differ in length, so the means differ (negative control)."""
    pooled = collect_profiles(heads[0], pairs, positions=("response",), pool_tokens=True)["mlp", "response"]
    for method in ("magnitude", "rms"):
        chosen, rejected = expected_sides(raw, "mlp", "response", method, pool=True)
        assert torch.allclose(pooled.scores(method).values, (chosen + rejected) / 2, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(pooled.scores(method).values, profiles["mlp", "response"].scores(method).values)
    provenance = pooled.scores("magnitude").provenance
    assert (provenance.method, provenance.pool_tokens, provenance.label) == (
        "magnitude",
        True,
        "magnitude, tokens pooled",
    )
    assert pooled.weights.sum() == pooled.provenance.n_tokens == profiles["mlp", "response"].provenance.n_tokens


def test_leaving_out_a_block_equals_collecting_without_it(heads, pairs, profiles):
    """For several blocks of prompts, by collecting again from the pairs outside the block."""
    encoded = heads[0].encode(pairs)
    blocks = block_of(torch.tensor([text.key for text in encoded.chosen])).tolist()
    assert blocks[0] == blocks[-1], "one prompt, one block"
    whole = profiles["mlp", "response"]
    for block in sorted(set(blocks))[:4]:
        rest = PreferencePairs(pair for pair, owner in zip(pairs, blocks, strict=True) if owner != block)
        again = collect_profiles(heads[0], rest, base=heads[1], positions=("response",))["mlp", "response"]
        for method in ("magnitude", "change", "mean_difference"):
            left_out = whole.scores(method).without_block[block]
            assert torch.allclose(left_out, again.scores(method).values, rtol=1e-11, atol=1e-12)
    empty = next(block for block in range(N_BLOCKS) if block not in blocks)
    assert torch.allclose(whole.scores("rms").without_block[empty], whole.scores("rms").values)


def test_mean_difference_equals_that_of_neuron_attribution(heads, pairs, profiles):
    attribution = NeuronAttribution(heads[0], "mean_difference", positions="response").score(pairs)
    scores = profiles["mlp", "response"].scores("mean_difference")
    assert torch.allclose(scores.values, attribution.values, atol=1e-14)
    assert torch.allclose(scores.without_block, attribution.without_block, atol=1e-13)
    # A jackknife over blocks and a standard error over pairs estimate the same error, from 21 pairs.
    ratio = (scores.stderr / attribution.stderr).median()
    assert ratio == pytest.approx(1, abs=0.15)


def test_jackknife_of_equal_blocks_is_the_standard_error_of_a_mean():
    """Leave-one-out means of n values give s / sqrt(n) exactly; a bootstrap agrees."""
    values = torch.randn(32, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    without = (values.sum(0) - values) / 31
    assert torch.allclose(jackknife_stderr(without), values.std(dim=0) / math.sqrt(32))
    bootstrap = stats.bootstrap((values[:, 0, 0].numpy(),), np.mean, n_resamples=4000, rng=np.random.default_rng(0))
    assert bootstrap.standard_error == pytest.approx(float(values[:, 0, 0].std()) / math.sqrt(32), rel=0.1)


def test_resampled_scores_are_means_over_the_drawn_blocks(profiles):
    from rmtension import NeuronScores

    values = torch.randn(N_BLOCKS, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    without = (values.sum(0) - values) / (N_BLOCKS - 1)
    scores = NeuronScores(values.mean(0), without[0], profiles["mlp", "all"].provenance, without)
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(N_BLOCKS, np.full(N_BLOCKS, 1 / N_BLOCKS), 5))
    expected = torch.einsum("rb,bln->rln", counts.double(), values) / N_BLOCKS
    assert torch.allclose(scores.resampled(counts.double()), expected)
    with pytest.raises(OptionError, match="keep no blocks"):
        NeuronScores(values.mean(0), without[0], profiles["mlp", "all"].provenance).resampled(counts.double())


def test_profiles_add_up(heads, pairs, profiles):
    asked = {"base": heads[1], "positions": ("response",)}
    parts = [collect_profiles(heads[0], pairs[part], **asked)["mlp", "response"] for part in
             (slice(0, 8), slice(8, None))]  # fmt: skip
    both = parts[0] + parts[1]
    assert torch.allclose(both.sums, profiles["mlp", "response"].sums, rtol=1e-12)
    assert both.provenance.n_pairs == 21
    with pytest.raises(ProvenanceError, match="positions differs"):
        _ = parts[0] + profiles["mlp", "all"]
    with pytest.raises(ProvenanceError, match="same base model"):
        _ = parts[0] + collect_profiles(heads[0], pairs[:3], positions=("response",))["mlp", "response"]


class TestSelectivity:
    def test_selectivity_equals_scipy_entropy(self, heads, pairs):
        parts = {
            name: collect_profiles(heads[0], pairs.filter(objective=name))["mlp", "all"]
            for name in ("helpful", "harmless")
        }
        scores = selectivity(parts, quantile=0.5)
        frequencies = torch.stack([part.scores("frequency").values for part in parts.values()]).numpy()
        entropy = stats.entropy(frequencies, axis=0)
        expected = np.where(np.isnan(entropy), 0, math.log(2) - entropy)
        eligible = frequencies.max(axis=0) > np.quantile(frequencies, 0.5)
        assert 0 < eligible.sum() < eligible.size
        assert scores.values.numpy() == pytest.approx(np.where(eligible, expected, 0), abs=1e-12)
        assert scores.n == 21
        assert (scores.stderr[torch.from_numpy(eligible)] > 0).any()

    def test_selectivity_is_0_for_equal_frequencies_and_log_2_for_a_single_objective(self, profiles):
        """The two extremes of the score for two objectives."""
        profile = profiles["mlp", "all"]
        assert selectivity({"a": profile, "b": profile}, quantile=0.0).values.abs().max() == 0
        silent = ActivationProfile(profile.sums * 0, profile.weights, profile.base, profile.provenance)
        only = selectivity({"a": profile, "b": silent}, quantile=0.0).values
        on = profile.scores("frequency").values > 0
        assert torch.allclose(only[on], torch.full_like(only[on], math.log(2)))

    def test_wrong_arguments_are_refused(self, profiles):
        profile = profiles["mlp", "all"]
        with pytest.raises(OptionError, match="at least two objectives"):
            selectivity({"a": profile})
        with pytest.raises(OptionError, match="quantile"):
            selectivity({"a": profile, "b": profile}, quantile=1.0)
        with pytest.raises(ProvenanceError, match="site differs"):
            selectivity({"a": profile, "b": profiles["attn_head", "all"]})


def test_profiles_load_as_saved_and_name_damage(heads, pairs, profiles, tmp_path, checkpoints):
    profile = profiles["mlp", "response"]
    profile.save(tmp_path / "profile.safetensors")
    loaded = ActivationProfile.load(tmp_path / "profile.safetensors")
    assert torch.equal(loaded.sums, profile.sums)
    assert loaded.provenance == profile.provenance
    with pytest.raises(OptionError, match="method: expected one of"):
        profile.scores("size")
    alone = collect_profiles(heads[0], pairs[:4], positions=("response",))["mlp", "response"]
    with pytest.raises(OptionError, match="needs a base model"):
        alone.scores("change")
    other = RewardHead.from_pretrained(checkpoints["llama"], dtype=torch.float64)
    with pytest.raises(ProvenanceError, match="base: expected a model of gpt2"):
        collect_profiles(heads[0], pairs, base=other)
    with pytest.raises(DataError, match="at least one"):
        collect_profiles(heads[0], PreferencePairs([]))
    with pytest.raises(OptionError, match="positions"):
        collect_profiles(heads[0], pairs, positions=("first",))
