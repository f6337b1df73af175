"""The linear map from the residual stream to the reward, however a checkpoint or a user holds it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.errors import ModelError
from rmtension.norms import NormLayer

# How checkpoints name a scalar head: transformers and OpenRLHF "score", trl "v_head.summary", others as they like.
_NAMES = re.compile(r"(^|\.)(score|v_head|value_head|reward_head|rm_head|regression_head)(\.[\w.]+)?\.(weight|bias)$")


@dataclass(frozen=True)
class LinearHead:
    """reward = weight @ h + bias."""

    weight: Float[Tensor, "d_model"]
    bias: float = 0.0

    def after_folding(self, norm: NormLayer) -> "LinearHead":
        """The head for a residual stream whose final norm lost its gain and bias: gain * x + bias is folded in."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, gain, bias = (t.to(self.weight.device, dtype) for t in (self.weight, norm.gain, norm.bias))
        return LinearHead(weight * gain, self.bias + float(weight @ bias))


def read_head(given: object, width: int | None = None) -> LinearHead:
    """The head of a vector, a matrix of one row, a (weight, bias) pair, an `nn.Linear` or a state dict.

    Raises `ModelError` for more than one output, another width than `width`, or a state dict without a head.
    """
    given = _as_tensors(given)
    if isinstance(given, LinearHead):
        head = given
    elif isinstance(given, nn.Linear):
        head = _head(given.weight, given.bias)
    elif isinstance(given, Mapping):
        head = _from_state_dict(given)
    elif isinstance(given, tuple | list) and len(given) == 2:
        head = _head(*given)
    elif isinstance(given, Tensor):
        head = _head(given, None)
    else:
        raise ModelError(
            "head: expected a weight of d_model numbers, a (weight, bias) pair, an nn.Linear or a state dict, got "
            f"{type(given).__name__}."
        )
    if width is not None and len(head.weight) != width:
        raise ModelError(
            f"weight: expected {width} numbers, one for each direction of the residual stream, got "
            f"{len(head.weight)}. The head belongs to a model of another width."
        )
    return head


def head_keys(names: Any) -> list[str]:
    """Those of the parameter names that look like a scalar head's."""
    return sorted(name for name in names if _NAMES.search(name))


def _from_state_dict(state: Mapping[str, Any]) -> LinearHead:
    weights = [name for name in head_keys(state) if name.endswith("weight")]
    if not weights and {"weight"} <= set(state) <= {"weight", "bias"}:
        weights = ["weight"]
    if len(weights) != 1:
        raise ModelError(
            f"head: expected one weight called score, v_head, value_head or reward_head, got {weights} among "
            f"{sorted(map(str, state))[:6]}. Pass the (weight, bias) pair itself."
        )
    return _head(state[weights[0]], state.get(weights[0].removesuffix("weight") + "bias"))


def _head(weight: Any, bias: Any) -> LinearHead:
    if not isinstance(weight, Tensor):
        raise ModelError(f"weight: expected a tensor, got {type(weight).__name__}.")
    row = weight.detach()
    row = row[0] if row.ndim == 2 and row.shape[0] == 1 else row
    if row.ndim != 1:
        raise ModelError(
            f"weight: expected one row of numbers, one for each direction of the residual stream, got shape "
            f"{tuple(weight.shape)}. A reward head has one output."
        )
    try:
        constant = torch.as_tensor(0.0 if bias is None else bias, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"bias: expected one number, got {bias!r:.40}.") from error
    if constant.numel() != 1:
        raise ModelError(f"bias: expected one number, got shape {tuple(constant.shape)}.")
    return LinearHead(row.clone(), float(constant))


def _as_tensors(given: Any) -> Any:
    """The same with tensors where arrays or lists of numbers are: the weight itself, of a pair, or in a state dict."""
    if isinstance(given, Mapping):
        return {name: _as_tensor(value) for name, value in given.items()}
    if isinstance(given, tuple | list) and len(given) == 2 and not isinstance(given[0], Number):
        weight, bias = given
        is_matrix = isinstance(weight, list) and isinstance(bias, list) and len(weight) == len(bias) > 1
        return _as_tensor(given) if is_matrix else (_as_tensor(weight), bias)
    return _as_tensor(given)


def _as_tensor(weight: Any) -> Any:
    """A tensor of floats for an array or a list, float64 where it does not say otherwise; anything else as it is."""
    if isinstance(weight, Tensor) or not (isinstance(weight, tuple | list) or hasattr(weight, "__array__")):
        return weight
    try:
        values = torch.from_numpy(np.array(weight))
    except (TypeError, ValueError) as error:
        raise ModelError(f"weight: expected numbers, got {weight!r:.60} ({error}).") from error
    return values if values.is_floating_point() else values.double()
