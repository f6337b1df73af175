"""A copy of a model with other weights, and perhaps another head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._native_weights import plain_copy
from rmtension.errors import ModelError, OptionError
from rmtension.heads._head import Head
from rmtension.interventions._projection_change import (
    ProjectionChange,
    change_own_projections,
    change_projections,
)
from rmtension.models._classifiers import current_checkpoint
from rmtension.models._lens_models import is_own_model
from rmtension.models._opening import with_checkpoint
from rmtension.models._reward_model import RewardModel

_Model = TypeVar("_Model", bound=RewardModel)


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
        advice = "Use gains or a head refit."
        return change_own_projections(head, site, changes, new_head=new_head, what=name, advice=advice)
    checkpoint, base = current_checkpoint(head, name)
    base = plain_copy(base, share=False)
    base = change_projections(head, base, site, changes, what=name, advice="Use an edit of the reward row.")
    known = dict(base.named_parameters())
    for parameter, added in parameters.items():
        if parameter not in known or known[parameter].shape != added.shape:
            raise OptionError(
                f"parameters: {parameter!r} of the shape {tuple(added.shape)} is no parameter of "
                f"{type(base).__name__}. Names are those of its named_parameters()."
            )
    with torch.no_grad():
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
