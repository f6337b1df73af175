"""What the neurons of a layer write into the residual stream, where their block makes nothing else of it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import find_site
from rmtension.models._replay import Replay

# Relative rounding beyond which trying a block says nothing: that of half precision.
_COARSE = 1e-4


def written_weights(
    replay: Replay,
    site: str,
    layer: int,
    step: Float[Tensor, "row token channel"],
    above: Float[Tensor, "row token d_model"],
) -> Float[Tensor, "channel d_model"] | None:
    """What one unit of each channel adds to the stream after the block; None where the block does more with it.

    A norm behind the projection (Gemma-2), or an MLP behind attention, makes it depend on the rest. Decided by trying:
    the block runs once with all of `step`, as large as the stream, and its output has to move by what the projection
    says. `above` is what the block made of the stream before. Half precision is too coarse to tell.
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
    # Through `forward`, because a user's hook has nothing to do with the weights.
    unit = torch.eye(n_channels, dtype=parameter.dtype, device=parameter.device)
    weights: Tensor = projection.forward(unit) - projection.forward(torch.zeros_like(unit[:1]))

    size = above.abs().max()
    expected = step @ weights
    factor = size / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    if not factor.isfinite():
        return None  # nothing is written, or next to nothing
    expected = expected * factor
    with head.hooks(site, moving(step * factor), [layer]):
        moved = replay.run_block(layer, replay.stream(layer)) - above
    # Roundings of the stream and of the step; another path is off by a share of the step itself.
    return weights if (moved - expected).abs().max() <= 64 * precision * size else None


def moving(step: Float[Tensor, "row token channel"]) -> Callable[[int, Tensor], Tensor]:
    """A visit that adds `step` to the activation."""

    def move(_layer: int, activation: Tensor) -> Tensor:
        return activation + step.reshape(activation.shape)

    return move
