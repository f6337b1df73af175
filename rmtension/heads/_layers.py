"""Linear layers of a head, read from a checkpoint in which they are numbered."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.errors import ModelError

Activation = Callable[[Tensor], Tensor]
# torch's default, which no published head changes.
_BATCH_NORM_EPS = 1e-5


class Layers(nn.Module):
    """Linear layers and batch norms by number; an activation follows each linear layer but the last.

    Args:
        tensors: "0.weight", "0.bias", "2.weight", ...: a matrix is a linear layer, and a number with a "running_mean"
            a batch norm in eval mode. Numbers without tensors are activations and dropout.
        activation: what follows every linear layer except the last.
        what: the name of the layers in error messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], activation: Activation = torch.relu, what: str = "head") -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList()
        width: int | None = None
        for number in sorted({int(name.partition(".")[0]) for name in tensors}):
            own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
            layer = _Scaled(own) if "running_mean" in own else _linear(own, f"{what}.{number}")
            if isinstance(layer, nn.Linear):
                if width not in (None, layer.in_features):
                    raise ModelError(
                        f"{what}.{number}: expected a weight with {width} columns, the outputs of the layer before it, "
                        f"got shape {tuple(layer.weight.shape)}. Open a checkpoint whose head is complete."
                    )
                width = layer.out_features
            self.layers.append(layer)

    @property
    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def n_outputs(self) -> int:
        """The rows of the last layer."""
        return self._linear_layers[-1].out_features

    def forward(self, states: Float[Tensor, "text d_model"]) -> Float[Tensor, "text output"]:
        """The outputs of the last layer."""
        last = self._linear_layers[-1]
        for layer in self.layers:
            states = layer(states)
            if isinstance(layer, nn.Linear) and layer is not last:
                states = self.activation(states)
        return states


class _Scaled(nn.Module):
    """A batch norm in eval mode, which multiplies and adds constants."""

    scale: Float[Tensor, "channel"]
    shift: Float[Tensor, "channel"]

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        mean, variance = (tensors[name].double() for name in ("running_mean", "running_var"))
        scale = tensors.get("weight", torch.ones_like(mean)).double() / (variance + _BATCH_NORM_EPS).sqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", tensors.get("bias", torch.zeros_like(mean)).double() - mean * scale)

    def forward(self, states: Float[Tensor, "text channel"]) -> Float[Tensor, "text channel"]:
        return states * self.scale + self.shift


def _linear(tensors: Mapping[str, Tensor], what: str) -> nn.Linear:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or set(tensors) - {"weight", "bias"}:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ModelError(f"{what}: expected the weight of a linear layer and its bias, got {shapes}. Pass head=...")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
