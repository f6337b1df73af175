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
    # A sum reads the values once and allocates nothing; if the sum is not finite, it may have overflowed: test values.
    return all(bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()) for tensor in tensors)


def require_finite(
    head: RewardModel, rewards: Float[Tensor, "text"], alone: Callable[[int], TokenBatch]
) -> Float[Tensor, "text"]:
    """Return the rewards if all are finite; otherwise raise `ModelError` that names the first text whose reward is not.

    `alone` makes a batch of a single text from its index.
    """
    bad = (~rewards.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        what = where_not_finite(head, alone(bad[0]), [rewards[bad]], None)
        raise ModelError(f"texts: text {bad[0]} got the reward {float(rewards[bad[0]])}: {what}.")
    return rewards


def where_not_finite(head: RewardModel, batch: TokenBatch, observed: Sequence[Tensor], layer_dim: int | None) -> str:
    """Say which layer or weight makes a batch of one text or pair not finite, and what to try. Cost: one pass.

    `observed` are the tensors computed from the batch; their dimension `layer_dim` counts layers, unless it is None.
    """
    cause = _first_activation(head, batch) or _first_observed(observed, layer_dim)
    weight = _first_weight(head)
    cause = f"{cause}; {weight}" if weight else cause
    return f"{cause}. {_advice(head)}"


def _first_activation(head: RewardModel, batch: TokenBatch) -> str | None:
    """The first activation, in the order in which the model computes them, that is not finite at a real token."""
    real = batch.sum_over_texts(batch.mask.float()) > 0
    first: list[str] = []

    def visit(site: str, layer: int, activation: Tensor) -> None:
        values = activation[real.to(activation.device)]
        bad = ~values.isfinite()
        if not first and bad.any():
            first.append(
                f"layer {layer} of {head.n_layers}: {int(bad.sum())} of {values.numel()} activations at {site!r} are "
                f"not finite ({float(values[bad][0])})"
            )

    head.observe(batch, head.sites, visit)
    return first[0] if first else None


def _first_weight(head: RewardModel) -> str | None:
    weights: list[tuple[str, Tensor]] = [*head.body.module.named_parameters()]
    if head.head is not None:
        weights += [("the reward head", tensor) for tensor in (*head.head.parameters(), *head.head.buffers())]
    for name, parameter in weights:
        bad = int((~parameter.isfinite()).sum())
        if bad:
            return f"{bad} of {parameter.numel()} weights in {name} are not finite"
    return None


def _first_observed(observed: Sequence[Tensor], layer_dim: int | None) -> str:
    """The layer of a gradient or sum that is not finite although the activations are."""
    for tensor in observed:
        bad = ~tensor.isfinite()
        if not bad.any():
            continue
        value = float(tensor[bad][0])
        if layer_dim is None:
            return f"the reward is {value}, though all activations are finite"
        # Gradients flow from the top: the highest layer is the first that was not finite.
        layers = bad.nonzero()[:, layer_dim]
        return f"layer {int(layers.max())}: its activations are finite, but a gradient or sum of them is {value}"
    return "the values were not finite in the first run, and finite in a second run on the same text"


def _advice(head: RewardModel) -> str:
    if head.dtype == torch.float16:
        return "float16 overflows above 65,504: open the model with dtype=torch.float32 or dtype=torch.bfloat16"
    return "Check the weights and the text, or open the model with dtype=torch.float32 if half precision overflows"
