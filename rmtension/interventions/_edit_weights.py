"""A copy of a model with other weights, and perhaps another head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._native_weights import plain_copy
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.interventions._export import projection_names, projection_weight, with_biases
from rmtension.models._classifiers import current_checkpoint
from rmtension.models._lens_models import copy_model, is_own_model
from rmtension.models._opening import with_checkpoint, with_lens_model
from rmtension.models._reward_model import RewardModel

_Model = TypeVar("_Model", bound=RewardModel)


@dataclass(frozen=True, eq=False)
class ProjectionChange:
    """A change of one down projection.

    Its channels are multiplied by `factors`; what it writes for the activations `constants` is added to its bias, by
    its old weights; then `added` is added to its weight.
    """

    factors: Float[Tensor, "channel"] | None = None
    constants: Float[Tensor, "channel"] | None = None
    added: Float[Tensor, "d_model channel"] | None = None


def edit_weights(
    head: _Model,
    site: str,
    changes: Mapping[int, ProjectionChange],
    parameters: Mapping[str, Float[Tensor, "..."]],
    new_head: Head | None,
    name: str,
) -> _Model:
    """A copy of `head` with changed projections that read `site`, by layer, and more added to parameters by name.

    Raises `OptionError` for a parameter that there is not, and `ModelError` for weights that TransformerLens converted,
    for projections that are no linear layers, and for constants where an architecture allows no bias.
    """
    if is_own_model(head.body):
        if parameters:
            raise ModelError(
                f"{name}: it changes parameters of a transformers checkpoint, and this model has none. Use gains, a "
                "down projection or a head refit."
            )
        return _edit_own(head, site, changes, new_head, name)
    checkpoint, base = current_checkpoint(head, name)
    base = plain_copy(base, share=False)
    names = projection_names(head, site)
    if any(base.get_submodule(names[layer]).bias is None for layer in changes if changes[layer].constants is not None):
        base = with_biases(base, names)
    known = dict(base.named_parameters())
    for parameter, added in parameters.items():
        if parameter not in known or known[parameter].shape != added.shape:
            raise OptionError(
                f"parameters: {parameter!r} of the shape {tuple(added.shape)} is no parameter of "
                f"{type(base).__name__}. Names are those of its named_parameters()."
            )
    with torch.no_grad():
        for layer, change in changes.items():
            projection: Any = base.get_submodule(names[layer])
            weight = projection_weight(projection, names[layer], name, "Use an edit of the reward row.")
            _change(weight, projection.bias, change)
        for parameter, added in parameters.items():
            weight = known[parameter]
            weight.copy_(weight.double() + added.to(weight.device).double())
    opened = replace(
        checkpoint,
        base=base,
        head=checkpoint.head if new_head is None else new_head,
        source=None,
        classifier=None,
        name=f"{checkpoint.name}, {name}",
    )
    return with_checkpoint(head, opened)


def _edit_own(
    head: _Model, site: str, changes: Mapping[int, ProjectionChange], new_head: Head | None, name: str
) -> _Model:
    """The same for a model of a TransformerLens class."""
    assert is_own_model(head.body)
    edited = with_lens_model(head, copy_model(head.body), head=new_head)
    body: Any = edited.body
    with torch.no_grad():
        for layer, change in changes.items():
            weight, bias = body.weights(site, layer)
            if bias is None and change.constants is not None:
                raise ModelError(
                    f"{name}: it needs a bias, and the projections of this gated MLP have none. Use gains or a head "
                    "refit."
                )
            _change(weight.T, bias, change)
    return edited


def _change(
    weight: Float[Tensor, "d_model channel"], bias: Float[Tensor, "d_model"] | None, change: ProjectionChange
) -> None:
    """Change a weight, or a view of it, and its bias in place; computed in float64, so that both are rounded once."""
    exact = weight.double()
    if change.constants is not None:
        assert bias is not None
        bias.copy_(bias.double() + exact @ change.constants.to(exact))
    if change.factors is not None:
        exact = exact * change.factors.to(exact)
    if change.added is not None:
        exact = exact + change.added.to(exact)
    weight.copy_(exact)
