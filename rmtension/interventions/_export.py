"""Ablate neurons permanently: a copy of a model whose weights compute what an `AblationContext` does."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmtension._sites import find_site
from rmtension.bodies._native_weights import plain_copy
from rmtension.errors import ModelError, OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._expert_weights import ablate_experts, expert_names
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._classifiers import current_checkpoint, require_same_stream, run_eagerly
from rmtension.models._lens_models import copy_model, is_own_model
from rmtension.models._opening import with_checkpoint, with_lens_model
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet

_COPIES = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")
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
    at `mlp_gate` of a gated MLP, which are none at the projection, and for other replacements. Memory: the model a
    second time.
    """
    is_own = is_own_model(head.body)
    if not is_own:
        checkpoint, base = current_checkpoint(head, "with_ablation")
    context = AblationContext(head, neurons, replacement)
    if not replacement.is_affine:
        raise OptionError(
            f"replacement: expected Zero(), Mean(statistics) or Scale(alpha), which weights can express, got "
            f"{replacement!r:.80}. Use AblationContext for this replacement."
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
    if is_own:
        return _ablate_own(head, context, constants)
    base = plain_copy(base, share=False)
    if neurons.site == "expert":
        names = [_COPIES.sub("", name) for name in expert_names(head)]
        ablate_experts(base, names, context.columns, replacement, constants)
    else:
        base = _ablate_projections(head, base, context, constants)
    opened = replace(
        checkpoint, base=base, source=None, classifier=None, name=f"{checkpoint.name}, {len(neurons)} neurons ablated"
    )
    require_same_stream(head, context, partial(run_eagerly, base), "with_ablation")
    return with_checkpoint(head, opened)


def _ablate_projections(head: RewardModel, base: Any, context: AblationContext, constants: Mapping[int, Tensor]) -> Any:
    """`base`, or a copy of it with biases, with other weights and biases in the projections of the neurons."""
    names = projection_names(head, context.neurons.site)
    if any(base.get_submodule(names[layer]).bias is None for layer in constants):
        base = with_biases(base, names)
    with torch.no_grad():
        for layer, columns in context.columns.items():
            projection: Any = base.get_submodule(names[layer])
            weight = projection_weight(
                projection, names[layer], "with_ablation", "Use AblationContext, which needs no weights."
            )
            columns = columns.to(weight.device)
            if layer in constants:
                means = constants[layer].to(weight.device)[columns]
                # In float64, because the sum over channels is rounded only once.
                projection.bias += (weight[:, columns].double() @ means).to(projection.bias.dtype)
            weight[:, columns] *= _factor(context, layer, weight)
    return base


def projection_names(head: RewardModel, site: str) -> list[str]:
    """The names of the projections that read a site, layer by layer, in a plain copy of the model's base."""
    site = find_site(site).factor_of or site
    # If peft keeps a trained copy of a module, the plain copy has that copy under the module's own name.
    return [_COPIES.sub("", head.body.projection_names[site, layer]) for layer in range(head.n_layers)]


def projection_weight(projection: Any, name: str, what: str, advice: str) -> Float[Tensor, "d_model channel"]:
    """The weight of a projection, or a view of it; raises `ModelError` unless it is a linear layer."""
    if not isinstance(projection, nn.Linear | Conv1D):
        raise ModelError(
            f"{what}: {name} is a {type(projection).__name__}, and only the weights of a Linear or Conv1D layer can be "
            f"edited. {advice}"
        )
    # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
    weight: Tensor = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    return weight


def _ablate_own(head: _Model, context: AblationContext, constants: Mapping[int, Float[Tensor, "channel"]]) -> _Model:
    """The same for a model of a TransformerLens class: its W_out or W_O, and b_out or b_O."""
    site = context.neurons.site
    assert is_own_model(head.body)
    ablated = with_lens_model(head, copy_model(head.body))
    body = ablated.body
    assert is_own_model(body)
    with torch.no_grad():
        for layer, columns in context.columns.items():
            weight, bias = body.weights(site, layer)
            if layer in constants:
                if bias is None:
                    raise ModelError(
                        "replacement: constants such as Mean need a bias to write to. The projections of this "
                        "gated MLP have no bias, "
                        "and boot_native cannot add one. Use Zero(), or AblationContext, which needs no bias."
                    )
                means = constants[layer].to(weight.device)[columns]
                bias += (means @ weight[columns].double()).to(bias.dtype)
            weight[columns] *= _factor(context, layer, weight)[:, None]
    require_same_stream(head, context, ablated.residual, "with_ablation")
    return ablated


def _factor(context: AblationContext, layer: int, weight: Tensor) -> Float[Tensor, "channel"]:
    """The factors of the ablated channels of a layer."""
    columns = context.columns[layer]
    factor = torch.as_tensor(context.replacement.factor(layer, columns))
    return factor.to(weight).expand(len(columns))


def with_biases(base: Any, names: list[str]) -> Any:
    """`base` rebuilt from a config that gives the projections `names` a bias; all new biases are 0."""
    flags = [key for key, value in base.config.to_dict().items() if "bias" in key and value is False]
    for flag in flags:
        config = copy.deepcopy(base.config)
        setattr(config, flag, True)
        with torch.device("meta"):
            rebuilt = type(base)(config)
        if any(rebuilt.get_submodule(name).bias is None for name in names):
            continue
        state = dict(base.state_dict())
        parameter = next(base.parameters())
        new = [key for key in rebuilt.state_dict() if key not in state]
        if not all(key.endswith(".bias") for key in new):
            continue
        state |= {
            key: torch.zeros(rebuilt.get_parameter(key).shape, dtype=parameter.dtype, device=parameter.device)
            for key in new
        }
        rebuilt.load_state_dict(state, assign=True)
        for name, buffer in base.named_buffers():
            owner, _, key = name.rpartition(".")
            setattr(rebuilt.get_submodule(owner), key, buffer)
        return rebuilt.eval().requires_grad_(False)
    raise ModelError(
        f"replacement: constants such as Mean need a bias to write to. The projections of {type(base).__name__} "
        "have no bias, and its "
        "config cannot add one. Use Zero(), or AblationContext, which needs no bias."
    )
