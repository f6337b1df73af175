"""Sums of what neurons do over tokens: as products with a row of weights, in pieces that stay in the processor's cache.

A square, a magnitude or a copy in float64 of a whole batch's activations costs more than the sum itself, because all of
it goes through memory again.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rmtension._sites import neuron_activations

# Numbers in a piece: half a megabyte in float32, which second-level caches hold. A GPU has no use for small pieces.
_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 26


class TokenWeights:
    """How often every token of a batch counts, for activations of all its layers."""

    def __init__(self, weights: Float[Tensor, "row token"]) -> None:
        self._all = weights.flatten()
        # Found out once: on a GPU it has to be waited for.
        self._used = self._all.nonzero()[:, 0]

    def on(self, device: torch.device) -> tuple[Float[Tensor, "token"], Int[Tensor, "used"]]:
        """All weights, and which are not 0."""
        return self._all.to(device), self._used.to(device)


def weighted_sums(
    channels: Float[Tensor, "row token channel"], weights: TokenWeights, site: str, n_neurons: int
) -> dict[str, Float[Tensor, "sum"]]:
    """Sums over tokens of every neuron's value, absolute, square, and positive (1 where it is), and of every channel.

    A piece is summed in float32 (float64 for such activations), pieces in float64.
    """
    rows = channels.flatten(0, 1)
    counts, used = weights.on(rows.device)
    all_count = len(used) == len(rows)
    # On a CPU a copy of most rows costs more than the rest.
    if not all_count and (rows.device.type != "cpu" or 2 * len(used) < len(rows)):
        return _sums(rows[used], counts[used], site, n_neurons)
    sums = _sums(rows, counts, site, n_neurons)
    if not all_count and not sums["square"].sum().isfinite():
        # A weight of 0 does not take out what is no number: 0 x inf is none either.
        return _sums(rows[used], counts[used], site, n_neurons)
    return sums


def _sums(
    rows: Float[Tensor, "token channel"], weights: Float[Tensor, "token"], site: str, n_neurons: int
) -> dict[str, Float[Tensor, "sum"]]:
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    numbers = _ON_CPU if rows.device.type == "cpu" else _ELSEWHERE
    size = max(1, numbers // rows.shape[1])
    same = n_neurons == rows.shape[1] and site != "attn_head"
    names = ("value", "absolute", "square", "positive")
    sums = {name: torch.zeros(n_neurons, dtype=torch.float64, device=rows.device) for name in names}
    sums["channel"] = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    spare = torch.empty(min(size, len(rows)), n_neurons, dtype=exact, device=rows.device)
    for piece, weight in zip(torch.split(rows, size), torch.split(weights.to(exact), size), strict=True):
        values = piece.to(exact)
        sums["channel"] += weight @ values
        neurons = values
        if not same:
            neurons = neuron_activations(values[None], site, n_neurons)[0]
            sums["value"] += weight @ neurons
        room = spare[: len(neurons)]
        sums["absolute"] += weight @ torch.abs(neurons, out=room)
        sums["square"] += weight @ torch.mul(neurons, neurons, out=room)
        sums["positive"] += weight @ torch.gt(neurons, 0, out=room)
    if same:
        sums["value"] = sums["channel"].clone()
    return sums
