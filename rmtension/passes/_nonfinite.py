"""Find the layer or weight that produced a NaN or infinite value."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.models._reward_model import RewardModel


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every value is finite."""
    # A sum reads the values once and allocates nothing; where the sum itself overflows, the values are tested.
    return all(bool(one.sum().isfinite()) or bool(one.isfinite().all()) for one in tensors)


def require_finite(
    head: RewardModel, rewards: Float[Tensor, "text"], alone: Callable[[int], TokenBatch]
) -> Float[Tensor, "text"]:
    """The rewards, if all are finite; otherwise raises `ModelError` that names the first text whose reward is not.

    `alone` makes the batch of one text.
    """
    bad = (~rewards.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        what = where_not_finite(head, alone(bad[0]), [rewards[bad]], None)
        raise ModelError(f"texts: text {bad[0]} got the reward {float(rewards[bad[0]])}: {what}.")
    return rewards


def where_not_finite(head: RewardModel, batch: TokenBatch, found: Sequence[Tensor], layer_dim: int | None) -> str:
    """What in a batch of one text or pair is not finite, why if that can be told, and what to try.

    `found` is what was made of the batch; along `layer_dim` lie layers, None where there are none. Costs a pass.
    """
    place = _first_activation(head, batch) or _found(found, layer_dim)
    weight = _first_weight(head)
    place = f"{place}; {weight}" if weight else place
    return f"{place}. {_advice(head)}"


def _first_activation(head: RewardModel, batch: TokenBatch) -> str | None:
    """The first activation, in the order in which the model computes them, that is not finite at a real token."""
    real = batch.sum_over_texts(batch.mask.float()) > 0
    first: list[str] = []

    def look(site: str, layer: int, activation: Tensor) -> None:
        seen = activation[real.to(activation.device)]
        bad = ~seen.isfinite()
        if not first and bad.any():
            first.append(
                f"layer {layer} of {head.n_layers}: {int(bad.sum())} of {seen.numel()} activations at {site!r} are not "
                f"finite ({float(seen[bad][0])})"
            )

    head.observe(batch, head.sites, look)
    return first[0] if first else None


def _first_weight(head: RewardModel) -> str | None:
    weights: list[tuple[str, Tensor]] = [*head.body.module.named_parameters()]
    weights += [("the reward head", head.weight)] if head.weight is not None else []
    for name, parameter in weights:
        bad = int((~parameter.isfinite()).sum())
        if bad:
            return f"{bad} of {parameter.numel()} weights in {name} are not finite"
    return None


def _found(found: Sequence[Tensor], layer_dim: int | None) -> str:
    """The layer of what was made of the activations, where these are finite: a gradient, or a sum."""
    for one in found:
        bad = ~one.isfinite()
        if not bad.any():
            continue
        value = float(one[bad][0])
        if layer_dim is None:
            return f"the reward is {value}, though activations are finite"
        # Gradients come from above: the highest layer is where it began.
        layers = bad.nonzero()[:, layer_dim]
        return f"layer {int(layers.max())}: what follows from its activations, which are finite, is {value}"
    return "activations that are not finite at one time, and finite at another"


def _advice(head: RewardModel) -> str:
    if head.dtype == torch.float16:
        return "float16 ends at 65,504, which is overflow: open the model with dtype=torch.float32 or torch.bfloat16"
    return "Check the weights and the text, or open the model with dtype=torch.float32 if half precision overflows"
