"""Replacements: their values against closed forms, and the arguments that they refuse."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import batches_of, make_pairs, unchecked

from rmtension import AblationContext, ActivationCollector, Mean, NeuronSet, OtherResponse, Resample, Scale, Zero
from rmtension.errors import OptionError, RMTensionWarning
from rmtension.interventions._replacement import Replacement, SingleTextReplacement


@pytest.fixture(scope="module")
def few():
    return make_pairs(4)


@pytest.fixture(scope="module")
def batch(head, few):
    """One text per row."""
    (batch,) = batches_of(head, few, sharing="none")
    return batch


@pytest.fixture(scope="module")
def every(head, few):
    collector = ActivationCollector(head)
    return (Zero(), Mean(collector.collect(few)), Resample(collector.sample(few, n=9)), Scale(0.3), OtherResponse())


@pytest.fixture(scope="module")
def activation(head, batch):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch.input_ids.shape, head.n_channels("mlp"), generator=generator, dtype=torch.float64)


def test_values_are_factor_times_activation_plus_constant(every, activation, head):
    """A replacement with a factor needs no batch; exports write the same values as weights."""
    columns = torch.tensor([3, 0, 7])
    for replacement in every[:2] + every[3:4]:
        for layer in range(head.n_layers):
            constant = replacement.constant(layer)
            expected = replacement.factor(layer, slice(None)) * activation + (0 if constant is None else constant)
            for some in (slice(None), columns):
                values = replacement.values(layer, some, activation[..., some], None)
                assert torch.allclose(values, expected[..., some], atol=1e-12)
    assert [replacement.is_affine for replacement in every] == [True, True, False, True, False]
    assert [replacement.constant(0) is None for replacement in every] == [True, False, True, True, True]


@pytest.mark.parametrize("positions", ["all", "response"])
def test_a_step_is_replacement_minus_activation(every, activation, batch, positions):
    select = batch.position_mask(positions)
    for replacement in every[:4]:
        step = replacement.step(1, activation, select, batch)
        target = replacement.values(1, slice(None), activation, batch)
        assert torch.allclose(activation[select] + step[select], target[select], atol=1e-12)
        assert (step[~select] == 0).all()
    assert not select.all()
    step = every[4].step(1, activation, select, batch)
    n = batch.n_pairs
    for row in range(2 * n):
        other = (row + n) % (2 * n)
        mean = activation[other][select[other]].mean(0)
        assert torch.allclose(
            activation[row][select[row]] + step[row][select[row]], mean.expand(int(select[row].sum()), -1)
        )


def test_a_scale_near_one_loses_no_digits(activation, batch):
    """The step is (alpha - 1) a; alpha a - a would keep only three digits of float32."""
    alpha = 1 + 2.0**-14
    step = Scale(alpha).step(0, activation.float(), batch.position_mask("all"), batch)
    expected = activation.float() * 2.0**-14 * batch.position_mask("all")[..., None]
    assert torch.allclose(step, expected, rtol=1e-6, atol=0)
    difference = activation.float() * alpha - activation.float()
    assert not torch.allclose(difference * batch.position_mask("all")[..., None], expected, rtol=1e-6, atol=0)


def test_keys_are_equal_exactly_if_values_are(every, head, few):
    assert [replacement.name for replacement in every] == ["zero", "mean", "resample", "scale", "other_response"]
    assert [replacement.label for replacement in every] == ["zero", "mean", "resample", "scale 0.3", "other_response"]
    assert [replacement.shares_tokens for replacement in every] == [True] * 4 + [False]
    assert [isinstance(replacement, SingleTextReplacement) for replacement in every] == [True] * 4 + [False]
    # Different values have different keys, and equal values have equal keys.
    collector = ActivationCollector(head)
    others = [
        Mean(collector.collect(few[:2])),
        Resample(collector.sample(few, n=9), seed=1),
        Resample(collector.sample(few, n=8)),
        Scale(0.31),
    ]
    keys = [replacement.key for replacement in (*every, *others)]
    assert len(set(keys)) == len(keys)
    again = Zero(), Mean(collector.collect(few)), Resample(collector.sample(few, n=9)), Scale(np.float64(0.3))
    assert [replacement.key for replacement in again] == keys[:4]


def test_replacements_compare_by_value():
    assert Zero() == Zero()
    assert Zero() != OtherResponse()
    assert Scale(2.0) == Scale(2.0) != Scale(3.0)
    assert len({Zero(), Zero(), Scale(2.0), Scale(2.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scale(2.0).alpha = 3.0
    with pytest.raises(TypeError, match="abstract"):
        Replacement()
    with pytest.raises(TypeError):
        Zero(0.5)


def test_the_repr_is_short(every):
    for replacement in every:
        assert repr(replacement).startswith(f"{type(replacement).__name__}(")
        assert len(repr(replacement)) < 150


def made(kind, **given):
    """A replacement made without the type checker of the suite, as users make it."""
    replacement = object.__new__(kind)
    for name, value in given.items():
        object.__setattr__(replacement, name, value)
    unchecked(kind.__post_init__)(replacement)
    return replacement


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "half", None, True, 1j, torch.tensor(0.5)])
def test_a_scale_is_a_finite_number(wrong):
    with pytest.raises(OptionError, match=r"^alpha: expected a finite number such as Scale\(0\.5\), got "):
        made(Scale, alpha=wrong)


def gains(head, site="mlp"):
    """A factor for every neuron, all different."""
    n = head.n_layers * head.n_neurons(site)
    return torch.linspace(-1, 2, n, dtype=torch.float64).view(head.n_layers, -1)


@pytest.mark.parametrize("site", ["mlp", "mlp_gate"])
def test_factors_of_neurons_are_those_of_one_scale_each(head, few, site):
    """In the context and in the weights, against a context for every neuron of a small set."""
    factors = gains(head, site)
    neurons = NeuronSet.from_indices(
        [(0, 3), (0, 5), (1, 0)], shape=tuple(factors.shape), site=site, architecture=head.architecture
    )
    with contextlib.ExitStack() as stack:
        for place in neurons:
            one = NeuronSet.from_indices([place], shape=tuple(factors.shape), site=site, architecture=head.architecture)
            stack.enter_context(AblationContext(head, one, Scale(float(factors[place]))))
        expected = head.score_pairs(few).margin
    with AblationContext(head, neurons, Scale(factors)):
        inside = head.score_pairs(few).margin
    assert torch.allclose(inside, expected, rtol=0, atol=1e-6)
    copied = head.with_ablation(neurons, Scale(factors))
    assert torch.allclose(copied.score_pairs(few).margin, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(head.score_pairs(few).margin, expected, rtol=0, atol=1e-3)


def test_factors_of_neurons_step_by_their_own_factor(head, activation, batch):
    factors = torch.linspace(0, 2, 2 * activation.shape[-1], dtype=torch.float64).view(2, -1)
    select = batch.position_mask("all")
    step = Scale(factors).step(1, activation, select, batch)
    assert torch.equal(step, activation * (factors[1] - 1) * select[..., None])


def test_factors_of_neurons_have_keys_and_a_short_repr(head):
    factors = gains(head)
    scale = Scale(factors)
    same = factors.clone()
    factors += 1  # the caller may change the tensor
    assert scale == Scale(same) != Scale(factors)
    assert scale.label == "scale by neuron"
    assert len(repr(scale)) < 60


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.ones(3), r"factors of shape \[layer, neuron\], got a tensor of shape \(3,\)"),
        (torch.full((2, 2), torch.nan), "got values that are not finite"),
    ],
)
def test_factors_are_finite_and_of_layers(alpha, message):
    with pytest.raises(OptionError, match=message):
        made(Scale, alpha=alpha)


def test_factors_fit_the_model(head):
    everything = ~NeuronSet.from_indices(
        [], shape=(head.n_layers, head.n_neurons("mlp")), site="mlp", architecture=head.architecture
    )
    with pytest.raises(OptionError, match=r"alpha: .*of shape \(\d+, \d+\), got \(2, 3\)"):
        AblationContext(head, everything, Scale(torch.ones(2, 3)))


@pytest.mark.parametrize("right", [2, np.int64(2), np.float32(2)])
def test_a_scale_may_be_any_real_number(right):
    scale = made(Scale, alpha=right)
    assert scale == Scale(2.0)
    assert type(scale.alpha) is float


def test_arguments_of_the_wrong_type_are_refused(every, head, few):
    _, mean, resample, *_ = every
    for wrong in ("mean", None, resample.sample, resample):
        with pytest.raises(
            OptionError, match=r"statistics: Mean expected ActivationStatistics, got .*\.collect\(pairs\)"
        ):
            made(Mean, statistics=wrong)
    for wrong in ("resample", None, mean.statistics):
        with pytest.raises(OptionError, match=r"sample: Resample expected ActivationSample, got .*\.sample\(pairs\)"):
            made(Resample, sample=wrong)
    for wrong in (-1, 0.5, "1", True):
        with pytest.raises(OptionError, match="seed: expected a whole number from 0 on"):
            made(Resample, sample=resample.sample, seed=wrong)


class TestSpikes:
    """Neurons whose mean is nothing that they ever are."""

    def statistics(self, few, head, activations):
        """Statistics of the first neuron's given activations at 100 tokens; all others alternate between -1 and 1."""
        real = ActivationCollector(head).collect(few)
        values = torch.ones(100, *real.mean.shape, dtype=torch.float64)
        values[::2] = -1
        values[:, 0, 0] = torch.as_tensor(activations, dtype=torch.float64)
        mean = values.mean(0)
        rms = values.square().mean(0).sqrt()
        return dataclasses.replace(real, mean=mean, abs_mean=values.abs().mean(0), rms=rms, channel_mean=mean)

    def test_a_mean_of_two_tokens_warns(self, few, head):
        spiky = self.statistics(few, head, [3000.0, 3000.0, *[0.0] * 98])
        with pytest.warns(RMTensionWarning, match=r"Mean: 1 of \d+ neurons .* L0 N0 \(mean 60, root mean square 424;"):
            Mean(spiky)

    @pytest.mark.parametrize(
        "activations",
        [[60.0] * 100, [100.0, 100.0, *[0.0] * 98], [3000.0, -3000.0, *[0.0] * 98], [0.0] * 100],
        ids=["large everywhere", "sparse and ordinary", "no mean", "dead"],
    )
    def test_other_neurons_do_not(self, few, head, activations, recwarn):
        Mean(self.statistics(few, head, activations))
        assert not recwarn
