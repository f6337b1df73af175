"""The weights by which neurons write to the residual stream, if their block adds that output without changing it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import find_site
from rmtension.models._replay import Replay

# Relative rounding (that of half precision) beyond which a trial run of a block cannot decide.
_COARSE = 1e-4


def written_weights(
    replay: Replay,
    site: str,
    layer: int,
    step: Float[Tensor, "row token channel"],
    above: Float[Tensor, "row token d_model"],
) -> Float[Tensor, "channel d_model"] | None:
    """What a unit of each channel adds to the stream after the block; None if the block processes it further.

    A norm behind the projection (Gemma-2), or an MLP behind attention, processes it further. This is determined by a
    trial run: the block runs with `step` added, scaled to the size of the stream, and its output must change by what
    the projection computes. `above` is the output of the block without the step. In half precision the result is None,
    because rounding is too coarse.
    """
    head = replay.head
    name = head.body.projection_names.get((site, layer))
    assert head.body.native is not None
    if name is None or find_site(site).factor_of is not None:
        return None
    projection = head.body.native.get_submodule(name)
    n_channels = head.n_channels(site)
    parameter = next(projection.parameters())
    precision = torch.finfo(parameter.dtype).eps
    if precision > _COARSE:
        return None
    # `forward`, so that hooks of the user do not run.
    unit = torch.eye(n_channels, dtype=parameter.dtype, device=parameter.device)
    weights: Tensor = projection.forward(unit) - projection.forward(torch.zeros_like(unit[:1]))

    size = above.abs().max()
    expected = step @ weights
    factor = size / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    if not factor.isfinite():
        return None  # the step writes nothing, or almost nothing
    expected = expected * factor
    with head.hooks(site, moving(step * factor), [layer]):
        moved = replay.run_block(layer, replay.stream(layer)) - above
    # Allows for rounding of the stream and of the step; further processing is off by a share of the step.
    return weights if (moved - expected).abs().max() <= 64 * precision * size else None


def moving(step: Float[Tensor, "row token channel"]) -> Callable[[int, Tensor], Tensor]:
    """A hook that adds `step` to the activation."""

    def move(_layer: int, activation: Tensor) -> Tensor:
        return activation + step.reshape(activation.shape)

    return move
