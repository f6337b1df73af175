"""Blocks that do more than add what a projection writes: norms and factors on the way, norms that run twice, rounding.

Language models with a head of random numbers, because not all of these families have a classifier.
"""

import pytest
import torch
import transformers
from some_neurons import some
from tiny_models import batches_of, make_pairs

from rmtension import AblationContext, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import ModelError
from rmtension.models._replay import Replay

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def few():
    return make_pairs(4)


@pytest.fixture
def opened(tokenizer, tmp_path):
    """Opens a model of a family with weights large enough for curvature."""

    def open_family(family, dtype=torch.float64, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SIZES | {"vocab_size": len(tokenizer) + 8} | changes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            weight = torch.randn(32)
        model.eval().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return RewardHead.from_pretrained(tmp_path, head=weight, dtype=dtype)

    return open_family


def by_contexts(head, pairs, neurons):
    """The effect of every neuron of a set by an AblationContext of its own; NaN elsewhere."""
    base = head.score_pairs(pairs).margin.double()
    effects = torch.full(neurons.mask.shape, torch.nan, dtype=torch.float64)
    for index in neurons:
        neuron = NeuronSet.from_indices(
            [index], shape=tuple(neurons.mask.shape), site=neurons.site, architecture=head.architecture
        )
        with AblationContext(head, neuron):
            effects[index] = (head.score_pairs(pairs).margin.double() - base).mean()
    return effects


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gemma2", "mlp"),
        pytest.param("llama", "attn_head", marks=pytest.mark.grid),
        pytest.param("llama", "mlp", marks=pytest.mark.grid),
    ],
)
def test_single_effects_in_half_precision(opened, few, family, site):
    """No worse than ablating one by one: what is left is the rounding of rewards, a few of bfloat16's 1/256."""
    changes = {"head_dim": 8} if family == "gemma2" else {}
    exact = opened(family, **changes)
    truth = single_neuron_effects(exact, few, site=site, neurons=some(exact, site))
    neurons = some(exact, site)
    assert torch.allclose(truth.values[neurons.mask], by_contexts(exact, few, neurons)[neurons.mask], atol=1e-9, rtol=0)
    half = opened(family, torch.bfloat16, **changes)
    effects = single_neuron_effects(half, few, site=site, neurons=neurons).values[neurons.mask]
    by_one = by_contexts(half, few, neurons)[neurons.mask]
    off, room = (each - truth.values[neurons.mask] for each in (effects, by_one))
    assert float(off.abs().max()) <= 2 * float(room.abs().max())
    assert float(truth.values[neurons.mask].abs().max()) > 5 * float(off.abs().max()), "effects stand out of it"


def test_blocks_that_exchange_values_are_not_replayed(checkpoints, few):
    """Gemma-4 hands keys and values on in a dict that all blocks share: what another run left in it would be read."""
    head = RewardHead.from_pretrained(checkpoints["gpt2"], dtype=torch.float64)
    blocks = [head.body.block(layer) for layer in range(head.n_layers)]
    store = {}

    def handing_on(block, first):
        forward = block.forward

        def run(stream, *args, store=store, **kwargs):
            if first:
                store["kept"] = stream
            return forward(stream if first else stream + 0.1 * store["kept"], *args, **kwargs)

        return run

    def with_store(module, args, kwargs):
        return args, kwargs | {"store": store}

    for number, block in enumerate(blocks):
        block.forward = handing_on(block, number == 0)
        block.register_forward_pre_hook(with_store, with_kwargs=True)
    (batch,) = batches_of(head, few)
    assert not Replay(head, batch).is_partial
    neurons = some(head, "mlp")
    effects = single_neuron_effects(head, few, neurons=neurons).values
    assert torch.allclose(effects, by_contexts(head, few, neurons), atol=1e-9, equal_nan=True)


def test_a_final_norm_that_also_runs_on_the_embedding(opened, few):
    """NanoChat's. Streams are those before the blocks and before its last run; GradDrop closes no gate for it."""
    head = opened("nanochat")
    (batch,) = batches_of(head, few)
    with torch.no_grad():
        replay = Replay(head, batch)
        assert replay.is_partial
        for layer in range(head.n_layers + 1):
            assert torch.allclose(replay.rewards_from(layer), replay.rewards, atol=1e-9, rtol=0)
    neurons = some(head, "mlp")
    effects = single_neuron_effects(head, few, neurons=neurons).values[neurons.mask]
    assert torch.allclose(effects, by_contexts(head, few, neurons)[neurons.mask], atol=1e-9, rtol=0)
    options = {"method": "attribution_patching", "aggregate": "absolute"}
    dropped, plain = (NeuronAttribution(head, graddrop=drop, **options).score(few).values for drop in (True, False))
    # Nothing is above the last layer: no gate closes a way of its neurons.
    assert torch.allclose(dropped[-1], plain[-1], atol=1e-9, rtol=0)
    assert float(plain[-1].abs().max()) > 1e-3


def test_a_scaled_block_output_has_no_direct_path(opened, few):
    """Granite's. The direct path would be off by that factor, and says so; what needs no direct path is right."""
    head = opened("granite", residual_multiplier=0.22)
    with pytest.raises(ModelError, match=r"is not what its blocks add .* Use attribution_patching"):
        NeuronAttribution(head, method="direct_effect").score(few)
    neurons = some(head, "mlp")
    effects = single_neuron_effects(head, few, neurons=neurons).values[neurons.mask]
    assert torch.allclose(effects, by_contexts(head, few, neurons)[neurons.mask], atol=1e-9, rtol=0)
    # Without the factor, the same model has a direct path.
    plain = opened("granite", residual_multiplier=1.0)
    assert NeuronAttribution(plain, method="direct_effect").score(few).n == len(few)
