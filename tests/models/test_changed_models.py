"""Whatever users do to a model before or after they open it, results are exact, or an error is raised."""

from functools import partial

import pytest
import torch
from changed_models import LIMIT, OPERATIONS, PAIRS, WAYS, fresh, inline_mlp, outcomes, rewards, right_values
from conftest import grid
from torch import nn
from torch.nn.utils import prune

from rmtension import AblationContext, ActivationCollector, NeuronAttribution, NeuronSet, RewardHead
from rmtension.attribution._methods import METHODS
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.errors import ModelError
from rmtension.interventions._sweep import score_without
from rmtension.passes._collect_profiles import collect_profiles

pytestmark = pytest.mark.filterwarnings("ignore")  # torch, peft and transformers deprecate much of what is tried here

# Changes after which a model cannot be read or edited exactly, and part of the error message.
REFUSED = {
    "mlp.forward replaced, does not call its modules": ("forward", OPERATIONS[1:]),
    "the same, after opening": ("del module.forward", OPERATIONS[1:]),
    "utils.weight_norm": ("remove_weight_norm", OPERATIONS),
    "utils.spectral_norm": ("remove_spectral_norm", OPERATIONS),
    "utils.prune": ("prune.remove", OPERATIONS),
    "int8, dynamic": ("quantised", OPERATIONS),
    "int8 parameters": ("quantised", OPERATIONS),
    "mlp.forward replaced, calls its modules": ("del module.forward", OPERATIONS[5:]),
    "user's hook that changes": (r"handle.remove()", OPERATIONS[5:]),
}


# Compiling is the same for every family; weights are stored in another layout in GPT-2.
CASES = [("llama", name) for name in WAYS] + [("gpt2", name) for name in WAYS if "compile" not in name]
# One way of each kind; what is refused takes no time.
FAST = [
    ("llama", name) for name in ("unchanged", "torch.compile(model)", "LoRA", "parametrizations.weight_norm", *REFUSED)
]


@pytest.mark.parametrize(
    ("family", "name"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.grid) for case in CASES]
)
def test_changed_models_are_exact_or_refused(family, name, tokenizer):
    words, refused = REFUSED.get(name, ("", ()))
    for operation, outcome in outcomes(WAYS[name], family, tokenizer).items():
        if operation in refused:
            assert outcome.refusal is not None, operation
            assert words in outcome.refusal
        else:
            assert outcome.refusal is None, operation
            assert outcome.difference <= LIMIT, operation


def test_the_ablation_changes_the_expected_values(tokenizer):
    """Without this, exact could mean that nothing happened."""
    for family in ("llama", "gpt2"):
        right = right_values(fresh(family, tokenizer), tokenizer)
        assert float((right["ablate"] - right["score"]).abs().min()) > 100 * LIMIT


def test_the_advice_of_errors_works(tokenizer):
    model = fresh("llama", tokenizer)
    right = right_values(model, tokenizer)
    for block in model.model.layers:
        inline_mlp(model, block)
    with pytest.raises(ModelError, match="`del module"):
        RewardHead.from_classifier(model, tokenizer=tokenizer).n_neurons("mlp")
    for block in model.model.layers:
        del block.mlp.forward
        nn.utils.weight_norm(block.mlp.up_proj)
        prune.identity(block.mlp.down_proj, "weight")
    with pytest.raises(ModelError, match="weight_norm"):
        RewardHead.from_classifier(model, tokenizer=tokenizer)
    for block in model.model.layers:
        nn.utils.remove_weight_norm(block.mlp.up_proj)
        prune.remove(block.mlp.down_proj, "weight")
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    with AblationContext(head, NeuronSet(right["mask"], "mlp", head.architecture)), torch.no_grad():
        assert torch.allclose(rewards(model, tokenizer), right["ablate"], atol=LIMIT)


@pytest.mark.parametrize("layer", grid([0, 1, 2], keep=[1]))
def test_no_pass_over_pairs_reads_a_layer_whose_hook_does_not_fire(layer, tokenizer):
    """Passes that only look end at the last layer's activation; a layer below it counts as well."""
    model = fresh("llama", tokenizer)
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    inline_mlp(model, model.model.layers[layer])
    by_method = [NeuronAttribution(head, method) for method in METHODS]
    passes = [
        lambda: ActivationCollector(head).collect(PAIRS),
        lambda: ActivationCollector(head).sample(PAIRS),
        lambda: collect_profiles(head, PAIRS),
        lambda: single_neuron_effects(head, PAIRS, neurons=NeuronSet(mask, "mlp", head.architecture)),
        lambda: score_without(head, PAIRS, [NeuronSet(mask, "mlp", head.architecture)] * 2),
        *(partial(attribution.score, PAIRS) for attribution in by_method),
        *(partial(attribution.per_pair, PAIRS) for attribution in by_method),
        *(lambda attribution=attribution: next(attribution.per_token(PAIRS)) for attribution in by_method),
    ]
    mask = torch.ones(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    for run in passes:
        with pytest.raises(ModelError, match=f"of layer {layer} did not fire"):
            run()


def test_hooks_that_do_not_fire_in_a_single_layer_are_found(tokenizer):
    """A single replaced module and a single hook of many: every hook site is checked separately."""
    model = fresh("llama", tokenizer)
    head = RewardHead.from_classifier(model, tokenizer=tokenizer)
    inline_mlp(model, model.model.layers[1])
    mask = torch.zeros(head.n_layers, head.n_neurons("mlp"), dtype=torch.bool)
    mask[2, 0] = True
    with AblationContext(head, NeuronSet(mask, "mlp", head.architecture)):
        head.score(["how do i"])  # layers 0 and 1 have no hook
    mask[1, 0] = True
    with (
        AblationContext(head, NeuronSet(mask, "mlp", head.architecture)),
        pytest.raises(ModelError, match="site 'mlp' of layer 1 did not fire"),
    ):
        head.score(["how do i"])
    assert head.score(["how do i"]).isfinite().all()
