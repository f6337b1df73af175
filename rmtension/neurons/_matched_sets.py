"""Random sets of neurons that match a set: the control for ablating it."""

import hashlib
import warnings
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from rmtension.errors import OptionError, RMTensionWarning
from rmtension.neurons._neuron_set import NeuronSet


def matched_sets(
    neurons: NeuronSet,
    n_draws: int,
    *,
    match: str = "layer",
    exclude: NeuronSet | None = None,
    magnitude: Float[Tensor, "layer neuron"] | None = None,
    seed: int = 0,
) -> list[NeuronSet]:
    """Draw several sets by `NeuronSet.matched_random`; an empty list, with a warning, if too few neurons are left."""
    options: dict[str, Any] = {"match": match, "exclude": exclude}
    if match == "magnitude":
        options["magnitude"] = magnitude
    try:
        seeds = [draw_seed(seed, draw, match, neurons.mask) for draw in range(n_draws)]
        return [neurons.matched_random(seed=draw, **options) for draw in seeds]
    except OptionError as error:
        message = f"No matched random sets for {neurons!r}, so its control is NaN: {error}"
        warnings.warn(message, RMTensionWarning, stacklevel=3)
        return []


def draw_seed(seed: int, draw: int, purpose: str, mask: Bool[Tensor, "layer neuron"]) -> int:
    """A seed of its own per set, purpose and draw: with equal seeds, sets of equal size would draw equal neurons."""
    named = f"{seed}/{draw}/{purpose}/".encode() + mask.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest()) >> 1
