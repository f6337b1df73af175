"""Ablate neurons permanently: a copy of a model whose weights compute what an `AblationContext` does."""

from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._sites import find_site
from rmtension.bodies._native_weights import plain_copy
from rmtension.errors import OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._expert_weights import ablate_experts, expert_names
from rmtension.interventions._projection_change import (
    COPIES,
    ProjectionChange,
    change_own_projections,
    change_projections,
)
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._classifiers import current_checkpoint, require_same_stream, run_eagerly
from rmtension.models._lens_models import is_own_model
from rmtension.models._opening import with_checkpoint
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet

# A copy has the class of its model.
_Model = TypeVar("_Model", bound=RewardModel)


def ablate_weights(head: _Model, neurons: NeuronSet, replacement: Replacement = Zero()) -> _Model:
    """A copy of `head` whose weights compute what `AblationContext(head, neurons, replacement)` does at all positions.

    `Zero` and `Scale` multiply the neurons' weights in the down (or output) projection by 0 or `alpha`. Constants
    (`Mean`, `Median`, `Optimal`) set them to 0, and add what the constants write to the projection's bias. If the
    projection has no bias, the model is rebuilt with one, where its config allows that (Llama: `mlp_bias`,
    `attention_bias`); further biases that this creates are 0.

    At site `expert` it changes the down projections of the experts; constants need experts with biases (GPT-OSS).

    Raises `ModelError` if a constant needs a bias that the architecture does not allow, and `OptionError` for constants
    at `mlp_gate` of a gated MLP, where the input of the projection is not constant, and for other replacements. Memory:
    the model a second time.
    """
    is_own = is_own_model(head.body)
    if not is_own:
        checkpoint, base = current_checkpoint(head, "with_ablation")
    context = AblationContext(head, neurons, replacement)
    if not replacement.is_affine:
        raise OptionError(
            f"replacement: expected Zero(), a constant such as Mean(statistics), or Scale(alpha), which weights can "
            f"express, got {replacement!r:.80}. Use AblationContext for this replacement."
        )
    # Layer -> the constant activations of its channels; empty for replacements without a constant.
    constants = {layer: constant for layer in context.columns if (constant := replacement.constant(layer)) is not None}
    product = find_site(neurons.site).factor_of
    hook_sites = head.body.hook_sites
    if product is not None and any(
        hook_sites(neurons.site, layer) != hook_sites(product, layer) for layer in constants
    ):
        raise OptionError(
            f"replacement: weights cannot express {type(replacement).__name__} at site {neurons.site!r} of a gated "
            "MLP, because what a neuron writes still depends on its other factor. Use AblationContext, or neurons and "
            f"statistics of site {product!r}."
        )
    changes = {
        layer: _change(head.n_channels(neurons.site), columns, replacement.factor(layer, columns), constants.get(layer))
        for layer, columns in context.columns.items()
    }
    about = {"what": "replacement", "advice": "Use AblationContext, which changes no weights; Zero() needs no bias."}
    if is_own:
        ablated = change_own_projections(head, neurons.site, changes, new_head=None, **about)
        require_same_stream(head, context, ablated.body.residual, "with_ablation")
        return ablated
    base = plain_copy(base, share=False)
    if neurons.site == "expert":
        names = [COPIES.sub("", name) for name in expert_names(head)]
        ablate_experts(base, names, context.columns, replacement, constants)
    else:
        base = change_projections(head, base, neurons.site, changes, **about)
    opened = replace(
        checkpoint, base=base, source=None, classifier=None, name=f"{checkpoint.name}, {len(neurons)} neurons ablated"
    )
    require_same_stream(head, context, partial(run_eagerly, base), "with_ablation")
    return with_checkpoint(head, opened)


def _change(
    n_channels: int,
    columns: Int[Tensor, "ablated"],
    factor: float | Float[Tensor, "ablated"] | None,
    constant: Float[Tensor, "channel"] | None,
) -> ProjectionChange:
    """The change of a layer's projection that replaces some of its channels."""
    columns = columns.cpu()
    factors = torch.ones(n_channels, dtype=torch.float64)
    factors[columns] = torch.as_tensor(factor, dtype=torch.float64).cpu()
    if constant is None:
        return ProjectionChange(factors)
    constants = torch.zeros(n_channels, dtype=torch.float64)
    constants[columns] = constant.double().cpu()[columns]
    return ProjectionChange(factors, constants)
