"""A copy of a model with other weights in its projections, and perhaps another head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.bodies._native_weights import plain_copy
from rmtension.heads._head import Head
from rmtension.interventions._export import projection_names, projection_weight
from rmtension.models._classifiers import current_checkpoint
from rmtension.models._lens_models import copy_model, is_own_model
from rmtension.models._opening import with_checkpoint, with_lens_model
from rmtension.models._reward_model import RewardModel

_Model = TypeVar("_Model", bound=RewardModel)
# The factors of the channels of a layer, and what is added to its weight after that.
Change = tuple[Float[Tensor, "channel"] | None, Float[Tensor, "d_model channel"] | None]


def edit_projections(
    head: _Model, site: str, changes: Mapping[int, Change], new_head: Head | None, name: str
) -> _Model:
    """A copy of `head` with changed weights in the projections that read `site`, by layer, and with another head.

    Raises `ModelError` for weights that TransformerLens converted, and for projections that are no linear layers.
    """
    if is_own_model(head.body):
        edited = with_lens_model(head, copy_model(head.body), head=new_head)
        body: Any = edited.body
        with torch.no_grad():
            for layer, change in changes.items():
                _change(body.weights(site, layer)[0].T, change)
        return edited
    checkpoint, base = current_checkpoint(head, name)
    base = plain_copy(base, share=False)
    names = projection_names(head, site)
    with torch.no_grad():
        for layer, change in changes.items():
            projection = base.get_submodule(names[layer])
            _change(projection_weight(projection, names[layer], name, "Use an edit of the reward row."), change)
    opened = replace(
        checkpoint,
        base=base,
        head=checkpoint.head if new_head is None else new_head,
        source=None,
        classifier=None,
        name=f"{checkpoint.name}, {name}",
    )
    return with_checkpoint(head, opened)


def _change(weight: Float[Tensor, "d_model channel"], change: Change) -> None:
    """Change a weight, or a view of it, in place; computed in float64, so that it is rounded once."""
    factors, added = change
    exact = weight.double()
    if factors is not None:
        exact = exact * factors.to(exact)
    if added is not None:
        exact = exact + added.to(exact)
    weight.copy_(exact)
