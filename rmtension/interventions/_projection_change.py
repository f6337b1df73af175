"""Changes of projections: the weights that read a site, in a copy of a model."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rmtension._sites import find_site
from rmtension.errors import ModelError
from rmtension.heads._head import Head
from rmtension.models._lens_models import copy_model, is_own_model
from rmtension.models._opening import with_lens_model
from rmtension.models._reward_model import RewardModel

COPIES = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")
_Model = TypeVar("_Model", bound=RewardModel)


@dataclass(frozen=True, eq=False)
class ProjectionChange:
    """A change of one down (or output) projection.

    Its channels are multiplied by `factors`; what it writes for the activations `constants` is added to its bias, by
    its old weights; then `added` is added to its weight.
    """

    factors: Float[Tensor, "channel"] | None = None
    constants: Float[Tensor, "channel"] | None = None
    added: Float[Tensor, "d_model channel"] | None = None

    @torch.no_grad()
    def apply(self, weight: Float[Tensor, "d_model channel"], bias: Float[Tensor, "d_model"] | None) -> None:
        """Change a weight, or a view of it, and its bias in place; in float64, so that both are rounded once."""
        exact = weight.double()
        if self.constants is not None:
            assert bias is not None
            bias.copy_(bias.double() + exact @ self.constants.to(exact))
        if self.factors is not None:
            exact = exact * self.factors.to(exact)
        if self.added is not None:
            exact = exact + self.added.to(exact)
        weight.copy_(exact)


def change_projections(
    head: RewardModel, base: Any, site: str, changes: Mapping[int, ProjectionChange], *, what: str, advice: str
) -> Any:
    """Change the projections of `base` that read `site`, by layer: in place, or in a copy of it that has biases.

    Raises `ModelError`, which names `what` and ends with `advice`, for projections that are no linear layers, and for
    constants where the architecture allows no bias.
    """
    names = projection_names(head, site)
    if any(base.get_submodule(names[layer]).bias is None for layer in changes if changes[layer].constants is not None):
        base = _with_biases(base, names, what, advice)
    for layer, change in changes.items():
        projection: Any = base.get_submodule(names[layer])
        change.apply(_weight_of(projection, names[layer], what, advice), projection.bias)
    return base


def change_own_projections(
    head: _Model, site: str, changes: Mapping[int, ProjectionChange], *, new_head: Head | None, what: str, advice: str
) -> _Model:
    """A copy of a model of a TransformerLens class with changed W_out or W_O and biases, and perhaps another head."""
    assert is_own_model(head.body)
    changed = with_lens_model(head, copy_model(head.body), head=new_head)
    body: Any = changed.body
    for layer, change in changes.items():
        weight, bias = body.weights(site, layer)
        if bias is None and change.constants is not None:
            raise ModelError(
                f"{what}: constants such as means need a bias to write to, and the projections of this gated MLP have "
                f"none. {advice}"
            )
        change.apply(weight.T, bias)
    return changed


def projection_names(head: RewardModel, site: str) -> list[str]:
    """The names of the projections that read a site, layer by layer, in a plain copy of the model's base."""
    site = find_site(site).factor_of or site
    # If peft keeps a trained copy of a module, the plain copy has that copy under the module's own name.
    return [COPIES.sub("", head.body.projection_names[site, layer]) for layer in range(head.n_layers)]


# -- inside ------------------------------------------------------------------------------------------------------------


def _weight_of(projection: Any, name: str, what: str, advice: str) -> Float[Tensor, "d_model channel"]:
    """The weight of a projection, or a view of it; raises `ModelError` unless it is a linear layer."""
    if not isinstance(projection, nn.Linear | Conv1D):
        raise ModelError(
            f"{what}: {name} is a {type(projection).__name__}, and only the weights of a Linear or Conv1D layer can be "
            f"edited. {advice}"
        )
    # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
    weight: Tensor = projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
    return weight


def _with_biases(base: Any, names: list[str], what: str, advice: str) -> Any:
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
        f"{what}: constants such as means need a bias to write to. The projections of {type(base).__name__} have no "
        f"bias, and its config cannot add one. {advice}"
    )
