"""Neurons ablated in the weights: a copy of a model that computes at all positions what an ablation context does."""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rmtension.ablation import AblationContext
from rmtension.activations import ActivationStatistics
from rmtension.classifiers import current_checkpoint, require_same_stream, run_eagerly
from rmtension.errors import ModelError, OptionError
from rmtension.lens_models import copy_model, is_own_model
from rmtension.neurons import NeuronSet
from rmtension.opening import with_checkpoint, with_lens_model
from rmtension.plain_weights import plain_copy
from rmtension.reward_model import RewardModel
from rmtension.sites import find_site

_COPIES = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")
# A copy is of the class of its model.
_Model = TypeVar("_Model", bound=RewardModel)


def ablate_weights(
    head: _Model, neurons: NeuronSet, *, mode: str = "zero", reference: Any = None, alpha: float | None = None
) -> _Model:
    """A copy of `head` whose weights do what `AblationContext(head, neurons, mode=mode, ...)` does at all positions.

    `zero` and `scale` multiply the neurons' weights in the down (or output) projection by 0 or `alpha`; `mean` sets
    them to 0 and adds what the mean activations write to the projection's bias. Where the projection has no bias, one
    is made if the architecture has a place for it in its config (Llama: `mlp_bias`, `attention_bias`), with zeros
    in the biases that come with it; otherwise `ModelError`. A mean at `mlp_gate` of a gated MLP is no constant at the
    projection: `OptionError`. Memory: the model a second time.
    """
    is_own = is_own_model(head.body)
    if not is_own:
        checkpoint, base = current_checkpoint(head, "with_ablation")
    if mode not in ("zero", "mean", "scale"):
        raise OptionError(
            f"mode: weights can do 'zero', 'mean' or 'scale' for good, got {mode!r}. Use AblationContext for the rest."
        )
    context = AblationContext(head, neurons, mode=mode, reference=reference, alpha=alpha)
    product = find_site(neurons.site).factor_of
    if mode == "mean" and product is not None:
        spots = head.body.spots
        if any(spots(neurons.site, layer) != spots(product, layer) for layer in context.columns):
            raise OptionError(
                f"mode: no weights do 'mean' at site {neurons.site!r} of a gated MLP, where what a neuron writes still "
                f"depends on its other factor. Use AblationContext, or neurons and means of site {product!r}."
            )
    if is_own:
        return _ablate_own(head, context)
    base = copy.deepcopy(plain_copy(base))
    # A module that peft keeps a trained copy of is at its own place in the plain copy.
    names = [_COPIES.sub("", head.body.projection_names[neurons.site, layer]) for layer in range(head.n_layers)]
    if mode == "mean" and any(base.get_submodule(names[layer]).bias is None for layer in context.columns):
        base = _with_biases(base, names)
    with torch.no_grad():
        for layer, columns in context.columns.items():
            projection: Any = base.get_submodule(names[layer])
            if not isinstance(projection, nn.Linear | Conv1D):
                raise ModelError(
                    f"with_ablation: {names[layer]} is a {type(projection).__name__}, and only the weights of a Linear "
                    "or Conv1D layer can be edited. Use AblationContext, which needs no weights."
                )
            # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
            weight = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
            columns = columns.to(weight.device)
            if mode == "mean":
                means = reference.channel_mean[layer].to(weight.device)[columns]
                # In float64 until the end: it stands for what thousands of tokens had in common.
                projection.bias += (weight[:, columns].double() @ means).to(projection.bias.dtype)
            # Only "scale" takes an alpha; the context has made sure.
            weight[:, columns] *= 0.0 if alpha is None else alpha
    opened = replace(
        checkpoint, base=base, source=None, classifier=None, name=f"{checkpoint.name}, {len(neurons)} neurons ablated"
    )
    require_same_stream(head, context, partial(run_eagerly, base), "with_ablation")
    return with_checkpoint(head, opened)


def _ablate_own(head: _Model, context: AblationContext) -> _Model:
    """The same for a model of TransformerLens' own: its W_out or W_O, and b_out or b_O."""
    site, factor = context.neurons.site, context.alpha or 0.0
    ablated = with_lens_model(head, copy_model(head.body))
    body = ablated.body
    assert is_own_model(body)
    with torch.no_grad():
        for layer, columns in context.columns.items():
            weight, bias = body.weights(site, layer)
            if isinstance(context.reference, ActivationStatistics):
                if bias is None:
                    raise ModelError(
                        "mode 'mean': the projections of this gated MLP have no bias, and boot_native builds none. Use "
                        "mode='zero', or AblationContext, which needs none."
                    )
                means = context.reference.channel_mean[layer].to(weight.device)[columns]
                bias += (means @ weight[columns].double()).to(bias.dtype)
            weight[columns] *= factor
    require_same_stream(head, context, ablated.residual, "with_ablation")
    return ablated


def _with_biases(base: Any, names: list[str]) -> Any:
    """`base` rebuilt by a config in which the projections `names` have a bias; all new biases are 0."""
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
        f"mode 'mean': the projections of {type(base).__name__} have no bias, and its config has no place for one. Use "
        "mode='zero', or AblationContext, which needs none."
    )
