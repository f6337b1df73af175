"""Ablations as TransformerLens' own hooks: pairs of a hook name and a function, for `run_with_hooks`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rmtension._sites import find_site
from rmtension.bodies._bodies import BridgeBody
from rmtension.bodies._native_body import NativeBody
from rmtension.errors import OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet

LensHook = tuple[str, Callable[..., Tensor]]


def fwd_hooks(head: RewardModel, neurons: NeuronSet, replacement: Replacement = Zero()) -> list[LensHook]:
    """The ablation of `AblationContext(head, neurons, replacement)` as `fwd_hooks` of `head.model`: one per layer.

    A hook of TransformerLens gets an activation, without knowing which tokens are padding, response or last. So the
    hooks replace at all tokens, and work only with this model.

    Raises `OptionError` for a replacement that depends on the text (`Resample`, `OtherResponse`), and for `Mean` at
    `mlp_gate` of a gated MLP, whose factor act(gate) has no hook point (`Zero` and `Scale` act on the product). Raises
    `ModelError` if the bridge of this architecture does not compute what transformers computes. Other errors are those
    of `AblationContext`.
    """
    context = AblationContext(head, neurons, replacement)
    if isinstance(head.body, NativeBody):
        raise OptionError(
            f"fwd_hooks: expected a model with TransformerLens' hook points, got a {type(head.model).__name__} without "
            f"a TransformerBridge ({head.body.reason}). Use AblationContext, or head.hooks(site, visit) for hooks of "
            "your own."
        )
    if not replacement.is_affine:
        raise OptionError(
            "replacement: expected Zero(), a constant such as Mean(statistics), or Scale(alpha), got "
            f"{type(replacement).__name__}, which depends on the text; a TransformerLens hook sees only activations. "
            "Use AblationContext with head.score_pairs."
        )
    site = find_site(neurons.site)
    if site.name == "expert":
        raise OptionError(
            "neurons: TransformerLens has no hook point on the neurons of experts (site 'expert'). Use AblationContext "
            "with head.score_pairs."
        )
    hook_sites = head.body.hook_sites
    product = site.factor_of
    if product is not None and any(
        replacement.constant(layer) is not None and hook_sites(site.name, layer) != hook_sites(product, layer)
        for layer in context.columns
    ):
        raise OptionError(
            f"replacement: {type(replacement).__name__} at site {site.name!r} of a gated MLP has no hook point: "
            f"TransformerLens' {site.hook!r} is the product of both factors. Use AblationContext, or neurons and "
            f"statistics of site {product!r}."
        )
    if isinstance(head.body, BridgeBody):
        head.body.require_faithful()
    return [(site.hook_name(layer), partial(_ablated, context, layer)) for layer in context.columns]


def _ablated(context: AblationContext, layer: int, activation: Tensor, hook: Any = None) -> Tensor:
    """A hook function: TransformerLens passes the activation and, as the keyword `hook`, its hook point."""
    return context.ablated(layer, activation)
