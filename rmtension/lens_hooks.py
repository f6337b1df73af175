"""Ablations as TransformerLens' own hooks: pairs of a hook name and a function, for `run_with_hooks`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rmtension.ablation import AblationContext
from rmtension.activations import ActivationStatistics
from rmtension.body import BridgeBody
from rmtension.errors import OptionError
from rmtension.neurons import NeuronSet
from rmtension.reward_model import RewardModel
from rmtension.sites import find_site

LensHook = tuple[str, Callable[..., Tensor]]


def fwd_hooks(
    head: RewardModel,
    neurons: NeuronSet,
    *,
    mode: str = "zero",
    reference: ActivationStatistics | None = None,
    alpha: float | None = None,
    positions: str = "all",
) -> list[LensHook]:
    """What `AblationContext(head, neurons, mode=mode, ...)` does, as `fwd_hooks` of `head.model`: one for each layer.

    A hook of TransformerLens gets an activation and no word on which tokens are padding, response or last, so that
    only what is the same at all tokens can be said: other `positions`, and "resample", raise `OptionError`. So does
    what is no hook point: "mean" at `mlp_gate` of a gated MLP, whose factor act(gate) has none ("zero" and "scale" do
    the same to the product). `ModelError` where the bridge of this architecture does not compute what transformers
    does. Other errors are those of `AblationContext`. The functions belong to this head's model.
    """
    if positions != "all":
        raise OptionError(
            f"positions: expected 'all', got {positions!r}: a hook of TransformerLens does not know which tokens are "
            "those of the response, the last one or padding. Use AblationContext with head.score or head.score_pairs."
        )
    if mode == "resample":
        raise OptionError(
            "mode: 'resample' draws donors by the prompt, which a hook of TransformerLens does not know. Use "
            "AblationContext with head.score_pairs, or mode 'zero', 'mean' or 'scale'."
        )
    context = AblationContext(head, neurons, mode=mode, reference=reference, alpha=alpha)
    site = find_site(neurons.site)
    spots = head.body.spots
    if mode == "mean" and site.factor_of is not None:
        product = site.factor_of
        if any(spots(site.name, layer) != spots(product, layer) for layer in context.columns):
            raise OptionError(
                f"mode: 'mean' at site {site.name!r} of a gated MLP has no hook point: TransformerLens' "
                f"{site.hook!r} is the product. Use AblationContext, or neurons and means of site {product!r}."
            )
    if isinstance(head.body, BridgeBody):
        head.body.require_faithful()
    return [(site.hook_name(layer), partial(_ablated, context, layer)) for layer in context.columns]


def _ablated(context: AblationContext, layer: int, activation: Tensor, hook: Any = None) -> Tensor:
    """TransformerLens calls with the activation and, by name, its hook point."""
    return context.ablated(layer, activation)
