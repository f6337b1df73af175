"""Sums of what neurons do over tokens: as products with a row of weights, in pieces that stay in the processor's cache.

A square, a magnitude or a copy in float64 of a whole batch's activations costs more than the sum itself, because all of
it goes through memory again.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.sites import neuron_activations

# Numbers in a piece: half a megabyte in float32, which second-level caches hold. A GPU has no use for small pieces.
_ON_CPU, _ELSEWHERE = 1 << 17, 1 << 26


def weighted_sums(
    channels: Float[Tensor, "row token channel"], weights: Float[Tensor, "row token"], site: str, n_neurons: int
) -> dict[str, Float[Tensor, "sum"]]:
    """Sums over tokens of every neuron's value, absolute, square, and positive (1 where it is), and of every channel.

    A piece is summed in float32 (float64 for such activations), pieces in float64.
    """
    rows, exact_weights = channels.flatten(0, 1), weights.flatten()
    used = exact_weights.nonzero()[:, 0]
    if 2 * len(used) < len(rows):
        return weighted_sums(rows[used][None], exact_weights[used][None], site, n_neurons)
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    exact_weights = exact_weights.to(exact)
    numbers = _ON_CPU if rows.device.type == "cpu" else _ELSEWHERE
    size = max(1, numbers // rows.shape[1])
    same = n_neurons == rows.shape[1] and site != "attn_head"
    names = ("value", "absolute", "square", "positive")
    sums = {name: torch.zeros(n_neurons, dtype=torch.float64, device=rows.device) for name in names}
    sums["channel"] = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    spare = torch.empty(min(size, len(rows)), n_neurons, dtype=exact, device=rows.device)
    for piece, weight in zip(torch.split(rows, size), torch.split(exact_weights, size), strict=True):
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
    if len(used) < len(exact_weights) and not sums["square"].sum().isfinite():
        # A weight of 0 does not take out what is no number: 0 x inf is none either.
        return weighted_sums(rows[used][None], exact_weights[used][None], site, n_neurons)
    return sums
