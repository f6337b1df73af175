"""Sums of activations over tokens, as products with token weights, in chunks that stay in the processor's cache.

A square, a magnitude or a float64 copy of a whole batch's activations would cost more than the sum itself, because all
of it would go through memory again.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._sites import neuron_activations

# Numbers per chunk: a megabyte in float32, and three of terms. A GPU needs no small chunks.
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 24


class TokenWeights:
    """The weight of every token of a batch, which is the same for the activations of all layers."""

    def __init__(self, weights: Float[Tensor, "row token"]) -> None:
        self._all = weights.flatten()
        # Computed once, because on a GPU this waits for the device.
        self._used = self._all.nonzero()[:, 0]

    def on(self, device: torch.device) -> tuple[Float[Tensor, "token"], Int[Tensor, "used"]]:
        """All weights, and the indices of those that are not 0."""
        return self._all.to(device), self._used.to(device)


def weighted_sums(
    channels: Float[Tensor, "row token channel"], weights: TokenWeights, site: str, n_neurons: int
) -> dict[str, Float[Tensor, "sum"]]:
    """Sums over tokens of every neuron's value, magnitude, square and sign (1 if positive), and of every channel.

    Each chunk is summed in float32 (float64 for float64 activations), and the sums of chunks are added in float64.
    """
    rows = channels.flatten(0, 1)
    counts, used = weights.on(rows.device)
    all_count = len(used) == len(rows)
    # On a CPU a copy of most rows costs more than the rest.
    if not all_count and (rows.device.type != "cpu" or 2 * len(used) < len(rows)):
        return _sums(rows[used], counts[used], site, n_neurons)
    sums = _sums(rows, counts, site, n_neurons)
    if not all_count and not sums["square"].sum().isfinite():
        # A weight of 0 does not remove NaN or infinity: 0 x inf is NaN.
        return _sums(rows[used], counts[used], site, n_neurons)
    return sums


def _sums(
    rows: Float[Tensor, "token channel"], weights: Float[Tensor, "token"], site: str, n_neurons: int
) -> dict[str, Float[Tensor, "sum"]]:
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    numbers = _ON_CPU if rows.device.type == "cpu" else _ELSEWHERE
    size = max(1, numbers // rows.shape[1])
    same = n_neurons == rows.shape[1] and site != "attn_head"
    names = ("absolute", "square", "positive") if same else ("absolute", "square", "positive", "value")
    of_channels = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    # All names in one product: many small operations would cost more than what they compute.
    of_neurons = torch.zeros(len(names), n_neurons, dtype=torch.float64, device=rows.device)
    spare = torch.empty(min(size, len(rows)), len(names), n_neurons, dtype=exact, device=rows.device)
    for chunk, weight in zip(torch.split(rows, size), torch.split(weights.to(exact), size), strict=True):
        values = chunk.to(exact)
        terms = spare[: len(values)]
        neurons = values
        if not same:
            neurons = neuron_activations(values[None], site, n_neurons)[0]
            terms[:, 3] = neurons
        torch.abs(neurons, out=terms[:, 0])
        torch.mul(neurons, neurons, out=terms[:, 1])
        torch.gt(neurons, 0, out=terms[:, 2])
        of_channels += weight @ values
        of_neurons += (weight @ terms.flatten(1)).view_as(of_neurons)
    sums = dict(zip(names, of_neurons, strict=True))
    return {"value": of_channels.clone(), **sums, "channel": of_channels}
