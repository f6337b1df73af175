"""NaN and infinity: errors name where the values come from; pairs that produce them can be skipped and counted."""

import warnings

import pytest
import torch
from tiny_models import grid, make_pairs, save_classifier

from rmtension import ActivationCollector, NeuronAttribution, NeuronSet, PreferencePairs, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.data._token_places import ReadAt
from rmtension.data._tokens import TokenBatch
from rmtension.errors import DataError, ModelError, OptionError, RMTensionWarning
from rmtension.interventions._sweep import score_without
from rmtension.passes._collect_profiles import collect_profiles
from rmtension.passes._nonfinite import are_finite, where_not_finite

BAD = " kill"


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(20, seed=2)


def is_bad(pair):
    return any(BAD in pair.text(side) for side in ("chosen", "rejected"))


def broken(checkpoints, family="gpt2", dtype=torch.float64, **options):
    """A model whose embedding of one token is infinite, so that every text with this token gets a NaN reward."""
    head = RewardHead.from_pretrained(checkpoints[family], dtype=dtype, **options)
    (token,) = head.tokenizer(BAD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        head.body.native.get_input_embeddings().weight[token] = float("inf")
    return head


def neurons(head):
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[1, 3] = mask[2, 5] = True
    return NeuronSet(mask, "mlp", head.architecture)


RUNS = {
    "collect": lambda head, pairs, **options: ActivationCollector(head).collect(pairs, **options),
    "rewards": lambda head, pairs, **options: head.score_pairs(pairs, **options),
    "scores": lambda head, pairs, **options: NeuronAttribution(head, method="gradient_x_activation").score(
        pairs, **options
    ),
    "per pair": lambda head, pairs, **options: NeuronAttribution(head, "mean_difference").per_pair(pairs, **options),
    "profile": lambda head, pairs, **options: collect_profiles(head, pairs, **options, positions=("response",))[
        "mlp", "response"
    ],
    "sweep": lambda head, pairs, **options: score_without(head, pairs, [neurons(head)], **options)[0],
    "effects": lambda head, pairs, **options: single_neuron_effects(head, pairs, neurons=neurons(head), **options),
}


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_donor_that_is_not_finite_is_refused(checkpoints, pairs, on_nonfinite):
    """Its values would make pairs NaN that are finite without it."""
    head = broken(checkpoints, on_nonfinite=on_nonfinite)
    first = next(pair for pair in pairs if is_bad(pair))
    with pytest.raises(ModelError, match=f"sample: a text of pair '{first.id}' has NaN or infinite activations"):
        ActivationCollector(head).sample(PreferencePairs([first]), n=10_000)
    finite = PreferencePairs(pair for pair in pairs if not is_bad(pair))
    assert ActivationCollector(head).sample(finite, n=50).values.isfinite().all()


def tensors_of(result):
    return {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", grid(["gpt2", "llama"]))
def test_the_pair_and_the_layer_are_named(name, family, checkpoints, pairs):
    head = broken(checkpoints, family)
    first = [pair.id for pair in pairs if is_bad(pair)]
    with pytest.raises(ModelError) as caught:
        RUNS[name](head, pairs)
    message = str(caught.value)
    assert any(
        f"pair {pair_id!r} (number {number})" in message
        for number, pair_id in enumerate(p.id for p in pairs)
        if pair_id in first
    )
    assert "layer 0 of 3" in message
    assert "weights in" in message
    assert 'on_nonfinite="skip"' in message


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("family", grid(["gpt2", "llama"]))
def test_skipping_equals_leaving_the_pairs_out(name, family, checkpoints, pairs):
    """Equal up to rounding, because the batches differ; provenance has the ids of the skipped pairs."""
    head = broken(checkpoints, family, on_nonfinite="skip")
    good = PreferencePairs(pair for pair in pairs if not is_bad(pair))
    bad = tuple(pair.id for pair in pairs if is_bad(pair))
    assert len(bad) >= 5
    assert len(good) >= 5
    with pytest.warns(RMTensionWarning, match=f"{len(bad)} of {len(pairs)} pairs produced NaN or infinite values"):
        result = RUNS[name](head, pairs)
    expected = RUNS[name](head, good)
    assert result.provenance.skipped == bad
    assert expected.provenance.skipped == ()
    for field in ("n_pairs", "n_tokens", "data"):
        assert getattr(result.provenance, field) == getattr(expected.provenance, field)
    for tensor_name, value in tensors_of(expected).items():
        torch.testing.assert_close(tensors_of(result)[tensor_name], value, atol=1e-6, rtol=1e-6, equal_nan=True)
    if hasattr(result, "pairs"):
        assert result.pairs == good


def test_skipping_resumes_after_an_interruption(checkpoints, pairs, tmp_path, monkeypatch):
    """Pairs that were skipped before and after the interruption are counted together."""
    monkeypatch.setattr("rmtension.store._work_folder.EVERY", 0.0)
    monkeypatch.setattr("rmtension.store._work_folder._SHARE", float("inf"))
    monkeypatch.setattr("rmtension.passes._pair_pass._PAIRS_PER_CHUNK", 4)
    head = broken(checkpoints, on_nonfinite="skip")

    def cut_short():
        yield from pairs[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ActivationCollector(head).collect(cut_short(), work=tmp_path)
    with pytest.warns(RMTensionWarning):
        result = ActivationCollector(head).collect(iter(pairs), work=tmp_path)
    assert result.provenance.skipped == tuple(pair.id for pair in pairs if is_bad(pair))
    assert 0 < sum(map(is_bad, pairs[:12])) < len(result.provenance.skipped)


def test_a_good_model_skips_nothing(head, checkpoints, pairs):
    skipping = RewardHead.from_pretrained(checkpoints["gpt2"], on_nonfinite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = skipping.score_pairs(pairs)
    assert result.provenance == head.score_pairs(pairs).provenance
    assert len(result) == len(pairs)


def test_an_error_is_raised_if_all_pairs_are_skipped(checkpoints, pairs):
    head = broken(checkpoints, on_nonfinite="skip")
    bad = PreferencePairs(pair for pair in pairs if is_bad(pair))
    with pytest.warns(RMTensionWarning), pytest.raises(DataError, match=f"got {len(bad)} with NaN or infinite values"):
        NeuronAttribution(head, "mean_difference").score(bad)
    with pytest.raises(OptionError, match=r"on_nonfinite: expected one of .*got 'ignore'"):
        RewardHead.from_pretrained(checkpoints["gpt2"], on_nonfinite="ignore")


def test_texts_and_tokens_are_named(checkpoints):
    head = broken(checkpoints)
    with pytest.raises(ModelError, match=r"texts: text 1 got the reward nan: layer 0 of 3: .* weights in .*wte"):
        head.score(["help", f"sorry{BAD}"])
    good, bad = (head.tokenizer(text)["input_ids"] for text in (" please help sorry", f" help{BAD} sorry"))
    ids = torch.tensor([good, bad])
    with pytest.raises(ModelError, match="texts: text 1 got the reward nan: layer 0 of 3"):
        head.score_tokens(ids)


def test_overflow_of_half_precision_is_named_as_such(tmp_path, tokenizer, pairs):
    """The weights are finite, and in float32 the activations are finite too."""
    folder = save_classifier(tmp_path, "gpt2", tokenizer)
    head = RewardHead.from_pretrained(folder)
    with torch.no_grad():
        head.body.native.h[1].mlp.c_fc.weight *= 1e5
    head.save_pretrained(tmp_path / "large")
    assert len(RewardHead.from_pretrained(tmp_path / "large").score_pairs(pairs)) == len(pairs)
    half = RewardHead.from_pretrained(tmp_path / "large", dtype=torch.float16)
    with pytest.raises(
        ModelError, match=r"layer 1 of 3: .* not finite \((nan|-?inf)\)\. float16 overflows above 65,504"
    ):
        half.score_pairs(pairs)


def test_gradients_and_rewards_of_finite_activations_are_named(head, pairs):
    """The error tells a gradient that overflows from a reward that does."""
    batch = TokenBatch.from_texts([*head.encode(pairs[:1]).chosen], [0], read_at=ReadAt(1), device=head.device)
    values = torch.zeros(1, 3, 64)
    values[0, 1, 5] = float("nan")
    assert "layer 1: its activations are finite, but a gradient or sum of them is nan" in where_not_finite(
        head, batch, [values], 1
    )
    reward = where_not_finite(head, batch, [torch.tensor([float("inf")])], None)
    assert "the reward is inf, though all activations are finite" in reward


def test_finite_numbers_with_an_infinite_sum_are_finite():
    large = torch.full((3,), 3e38)
    assert not large.sum().isfinite()
    assert are_finite([large])
    assert not are_finite([large, torch.tensor([1.0, float("nan")])])
    assert not are_finite([torch.tensor([float("inf"), -float("inf")])])


def test_unselected_tokens_may_be_nonfinite(checkpoints):
    """Activations at a token of weight 0 may be infinite; at a token that counts, they make the sums infinite."""
    from rmtension.passes._token_sums import TokenWeights, weighted_sums

    activations = torch.randn(1, 6, 4, dtype=torch.float64)
    weights = TokenWeights(torch.tensor([[1.0, 1, 1, 1, 0, 1]]))
    expected = weighted_sums(activations, weights, "mlp", 4)
    spoiled = activations.clone()
    spoiled[0, 4] = float("inf")
    result = weighted_sums(spoiled, weights, "mlp", 4)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-12, rtol=0.0)
    spoiled[0, 3] = float("inf")
    assert not weighted_sums(spoiled, weights, "mlp", 4)["square"].isfinite().any()
