"""The linear map from the residual stream to the reward, read from the forms in which checkpoints and users hold it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmtension.errors import ModelError
from rmtension.heads._head import Head, LinearHead

# How checkpoints name a head: "score" (transformers, OpenRLHF), "v_head.summary" (trl), and other names.
_NAMED = "(score|score_head|v_head|value_head|reward_head|rm_head|regression_head|regression_layer|classifier)"
_LINEAR = re.compile(rf"(^|\.){_NAMED}(\.[A-Za-z_]\w*)*\.(weight|bias)$")
_LAYERED = re.compile(rf"(^|\.){_NAMED}(\.\w+)*\.\d+(\.\w+)*\.(weight|bias)$")


def read_head(given: object, width: int | None = None, names: Mapping[int, str] | None = None) -> Head:
    """Read a linear head from a vector, matrix, (weight, bias) pair, `nn.Linear` or state dict; a `Head` is kept.

    `names` are the names of several rows. Raises `ModelError` for a width other than `width`, and for a state dict
    without a head.
    """
    if isinstance(given, type) and issubclass(given, Head):
        raise ModelError(f"head: expected a head, got the class {given.__name__}. Pass {given.__name__}(...).")
    if isinstance(given, Head) and isinstance(given.outputs, str):
        raise ModelError(
            f"head: expected the outputs of {type(given).__name__} as names, ({given.outputs!r},), got text."
        )
    head = given if isinstance(given, Head) else _head(*_weight_and_bias(_as_tensors(given)), names)
    if width is not None and isinstance(head, LinearHead) and head.weight.shape[1] != width:
        raise ModelError(
            f"weight: expected {width} numbers, the width of the residual stream, got {head.weight.shape[1]}. Pass the "
            "head that was trained with this model."
        )
    return head


def is_linear_head(name: str, shape: Sequence[int], width: int | None) -> bool:
    """Whether a stored tensor is the weight or bias of a linear head: by its name, or because it has a single row.

    A name with a number in it belongs to one of several layers, so it is no linear head.
    """
    if _LINEAR.search(name) and not is_numbered(name):
        return True
    one_row = len(shape) == 2 and shape[0] == 1 and width in (None, shape[1])
    return one_row and name.endswith(".weight") and not is_numbered(name)


def layered_heads(names: Iterable[str]) -> list[str]:
    """The names that belong to a head of several layers."""
    return sorted(name for name in names if _LAYERED.search(name))


def is_numbered(name: str) -> bool:
    """Whether a parameter's name has a number in it, as the names of repeated layers have."""
    return any(part.isdigit() for part in name.split("."))


def _weight_and_bias(given: object) -> tuple[Any, Any]:
    if isinstance(given, nn.Linear):
        return given.weight, given.bias
    if isinstance(given, Mapping):
        return _of_state_dict(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], given[1]
    if isinstance(given, Tensor):
        return given, None
    raise ModelError(
        "head: expected a weight of d_model numbers, a (weight, bias) pair, an nn.Linear, a state dict or the path of "
        f"a safetensors file, got {type(given).__name__}. A head of several layers is a subclass of "
        "rmtension.heads.Head, whose method read computes the outputs."
    )


def _of_state_dict(state: Mapping[str, Any]) -> tuple[Any, Any]:
    shapes = {str(name): tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    weights = [name for name, shape in shapes.items() if name.endswith("weight") and is_linear_head(name, shape, None)]
    named = [name for name in weights if _LINEAR.search(name)]
    weights = sorted(named or weights)
    if not weights and {"weight"} <= set(state) <= {"weight", "bias"}:
        weights = ["weight"]
    if len(weights) != 1:
        layers = layered_heads(shapes)
        raise ModelError(
            f"head: expected one weight called score, v_head, value_head or reward_head, or of one row, got {weights} "
            f"among {sorted(shapes)[:6]}. "
            + (
                f"{layers} are a head of several layers, which is not a linear map. To read activations only, use "
                "RewardHead.from_language_model."
                if layers
                else "Pass the (weight, bias) pair itself."
            )
        )
    return state[weights[0]], state.get(weights[0].removesuffix("weight") + "bias")


def _head(weight: Any, bias: Any, names: Mapping[int, str] | None) -> LinearHead:
    if not isinstance(weight, Tensor):
        raise ModelError(f"weight: expected a tensor, an array or a list of numbers, got {type(weight).__name__}.")
    rows = weight.detach()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ModelError(
            f"weight: expected shape (d_model,) or (outputs, d_model), got {tuple(weight.shape)}. Reshape it, with "
            "one row per output."
        )
    try:
        constants = torch.as_tensor(0.0 if bias is None else bias, dtype=torch.float64).detach().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"bias: expected one number, got {bias!r:.40}.") from error
    if len(constants) not in (1, len(rows)):
        raise ModelError(
            f"bias: expected one number{f' for each of {len(rows)} outputs' if len(rows) > 1 else ''}, got shape "
            f"{tuple(torch.as_tensor(bias).shape)}. Pass the bias of the same layer as the weight."
        )
    fit = names is not None and len(names) == len(rows) > 1
    return LinearHead(rows, constants, [names[row] for row in sorted(names)] if fit and names is not None else None)


def _as_tensors(given: Any) -> Any:
    """Convert arrays and lists of numbers to tensors: a weight, the weight of a pair, or the values of a state dict."""
    if isinstance(given, Mapping):
        return {name: _as_tensor(value) for name, value in given.items()}
    if isinstance(given, tuple | list) and len(given) == 2 and not isinstance(given[0], Number):
        weight, bias = given
        is_matrix = isinstance(weight, list) and isinstance(bias, list) and len(weight) == len(bias) > 1
        return _as_tensor(given) if is_matrix else (_as_tensor(weight), bias)
    return _as_tensor(given)


def _as_tensor(weight: Any) -> Any:
    """A float tensor for an array or a list (float64 unless the array has a float dtype); other values as they are."""
    if isinstance(weight, Tensor) or not (isinstance(weight, tuple | list) or hasattr(weight, "__array__")):
        return weight
    try:
        values = torch.from_numpy(np.array(weight))
    except (TypeError, ValueError) as error:
        raise ModelError(f"weight: expected numbers, got {weight!r:.60} ({error}).") from error
    return values if values.is_floating_point() else values.double()
