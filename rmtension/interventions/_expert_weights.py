"""Ablate neurons of experts permanently, in the down projections that a module of experts holds as one parameter."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rmtension.errors import ModelError
from rmtension.interventions._replacement import Replacement
from rmtension.models._reward_model import RewardModel

# Modules that peft wrapped, once for each parameter with an adapter.
_WRAPPED = re.compile(r"(\.base_layer)+$")


@torch.no_grad()
def ablate_experts(
    base: nn.Module,
    names: list[str],
    columns: Mapping[int, Int[Tensor, "ablated"]],
    replacement: Replacement,
    constants: Mapping[int, Float[Tensor, "channel"]],
) -> None:
    """Multiply the output weights of some neurons by their factors, and let biases write the constants of `Mean`.

    `names` are the modules of experts in `base`, layer by layer, `columns` the neurons (`expert * d_expert + index`) of
    each layer. Raises `ModelError` for constants if the experts have no biases (only GPT-OSS has them).
    """
    for layer, neurons in columns.items():
        experts: Any = base.get_submodule(names[layer])
        # [expert, index, d_model]
        weight = experts.down_proj if getattr(experts, "is_transposed", False) else experts.down_proj.mT
        neurons = neurons.to(weight.device)
        expert, index = neurons // weight.shape[1], neurons % weight.shape[1]
        if layer in constants:
            bias = experts._parameters.get("down_proj_bias")
            if bias is None:
                raise ModelError(
                    "replacement: constants such as Mean are written to a bias, and the experts of "
                    f"{type(base).__name__} have no biases. Use Zero() or Scale(alpha), or AblationContext, which "
                    "needs no bias."
                )
            means = constants[layer].to(weight.device)[neurons]
            written = weight[expert, index].double() * means.double()[:, None]
            # In float64, because the sum over neurons is rounded only once.
            bias += torch.zeros_like(bias, dtype=torch.float64).index_add(0, expert, written).to(bias.dtype)
        factor = torch.as_tensor(replacement.factor(layer, neurons)).to(weight)
        weight[expert, index] *= factor.expand(len(neurons))[:, None]


def expert_names(head: RewardModel) -> list[str]:
    """The name of the module of experts of every layer, in the modules of transformers once adapters are merged."""
    assert head.body.native is not None
    names = {module: name for name, module in head.body.native.named_modules()}
    # The point of the native modules comes before that of the bridge.
    return [_WRAPPED.sub("", names[points[0].experts]) for points in head.body.experts]
