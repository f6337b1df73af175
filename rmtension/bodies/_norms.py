"""Gain, bias and kind of a layer norm, measured from its outputs, because every family implements norms differently."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.errors import ModelError

# Large compared with any epsilon inside the square root, and small enough for its square in half precision.
_SCALE = {torch.float16: 1e2, torch.bfloat16: 1e2}


@dataclass(frozen=True)
class NormLayer:
    """gain * (x - mean(x) if centred else x) / sigma(x) + bias, as a norm of width d computes it.

    If `divides` is False, sigma is 1, as in a model without norms.
    """

    gain: Float[Tensor, "d"]
    bias: Float[Tensor, "d"]
    centred: bool
    divides: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether gain is 1 and bias 0: a norm without parameters, or one whose parameters were folded elsewhere."""
        tolerance = 1e-3 if self.gain.dtype in (torch.float16, torch.bfloat16) else 1e-5
        return bool(((self.gain - 1).abs() < tolerance).all() and (self.bias.abs() < tolerance).all())

    def pull_back(self, direction: Float[Tensor, "*text d"], sigma: Float[Tensor, "*text"]) -> Float[Tensor, "*text d"]:
        """The vector u with `direction @ (output - bias) == u @ input`, for the scale frozen at `sigma`."""
        scaled = self.gain * direction / sigma[..., None]
        return scaled - scaled.mean(dim=-1, keepdim=True) if self.centred else scaled

    def sigma(self, x: Float[Tensor, "*text d"], y: Float[Tensor, "*text d"]) -> Float[Tensor, "*text"]:
        """The scale that the norm divided by when it computed `y` from `x`, by least squares over its d outputs.

        In float32 for half precision, in which a square may overflow.
        """
        x, y = x.to(_wide(x.dtype)), y.to(_wide(y.dtype))
        if not self.divides:
            return torch.ones_like(x[..., 0])
        unscaled = self.gain * (x - x.mean(dim=-1, keepdim=True) if self.centred else x)
        size = unscaled.square().sum(dim=-1)
        # A stream of 0, as at a pad token without an embedding, has no defined scale; 1 avoids 1 / 0.
        return torch.where(size == 0, torch.ones_like(size), size / (unscaled * (y - self.bias)).sum(dim=-1))

    def apply(self, x: Float[Tensor, "*text d"], sigma: Float[Tensor, "*text"]) -> Float[Tensor, "*text d"]:
        """The norm's output for `x` with the scale frozen at `sigma`."""
        centred = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return self.gain * (centred / sigma[..., None]) + self.bias

    def to(self, like: Tensor) -> "NormLayer":
        """The layer in the dtype and on the device of `like`."""
        return NormLayer(self.gain.to(like), self.bias.to(like), self.centred, self.divides)


def read_norm(norm: nn.Module, width: int) -> NormLayer:
    """Measure `norm` with inputs v and -v that have entries +-1 and mean zero.

    For such v, norm(v) = gain * v + bias and norm(-v) = bias - gain * v, both for layer norm and for RMS norm. An input
    with another mean then shows whether the norm subtracts the mean. An identity has `divides=False`. Raises
    `ModelError` for any other norm.
    """
    parameter = next(norm.parameters(), torch.empty(0))
    with torch.no_grad():
        signs = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
        signs[1::2] = -1
        if width % 2:
            signs[-1] = 0
        scale = _SCALE.get(parameter.dtype, 1e3)
        # If the width is odd, mean zero leaves an entry 0; a rolled pattern measures the gain of that entry.
        gains, biases = [], []
        for v in (signs, signs.roll(1)):
            ups, downs = (_apply(norm, sign * scale * v).to(_wide(v.dtype)) for sign in (1, -1))
            unit = v.abs().mean().sqrt()
            gains.append((ups - downs) / 2 * unit * v)
            biases.append((ups + downs) / 2)
        gain = torch.where(signs != 0, gains[0], gains[1])
        bias = biases[0]
        probe = torch.linspace(-1, 2, width, dtype=signs.dtype, device=gain.device) * scale
        out = _apply(norm, probe)
        if torch.equal(out, probe):
            return NormLayer(torch.ones_like(gain), torch.zeros_like(gain), centred=False, divides=False)
        layers = [NormLayer(gain, bias, centred) for centred in (True, False)]
        probe, out = probe.to(gain), out.to(gain)
        errors = [float((layer.apply(probe, layer.sigma(probe, out)) - out).abs().max()) for layer in layers]
    layer = layers[min(range(2), key=errors.__getitem__)]
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(parameter.dtype, 1e-3)
    if not min(errors) <= tolerance * max(1.0, float(out.abs().max())):
        raise ModelError(
            f"norm: expected a layer norm or an RMS norm, got {type(norm).__name__}, which computes something else "
            f"(off by {min(errors):.1e}). Use a method that does not split the reward, such as attribution_patching."
        )
    return layer.to(signs)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms are computed here: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def _apply(norm: Any, x: Tensor) -> Tensor:
    # Some norms require the shape [text, token, d].
    output: Tensor = norm(x[None, None])[0, 0]
    return output
