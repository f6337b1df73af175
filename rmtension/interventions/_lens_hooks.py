"""Ablations as TransformerLens' own hooks: pairs of a hook name and a function, for `run_with_hooks`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rmtension._sites import find_site
from rmtension.errors import OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Replacement, Zero
from rmtension.models._bodies import BridgeBody
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet

LensHook = tuple[str, Callable[..., Tensor]]


def fwd_hooks(head: RewardModel, neurons: NeuronSet, replacement: Replacement = Zero()) -> list[LensHook]:
    """What `AblationContext(head, neurons, replacement)` does, as `fwd_hooks` of `head.model`: one for each layer.

    A hook of TransformerLens gets an activation, and is not told which tokens are padding, response or last. So the
    hooks replace at all tokens, and a replacement that depends on the token or the text (`Resample`, `OtherResponse`)
    raises `OptionError`. So does `Mean` at `mlp_gate` of a gated MLP: the factor act(gate) has no hook point (`Zero`
    and `Scale` do the same to the product). `ModelError` where the bridge of this architecture does not compute what
    transformers does. Other errors are those of `AblationContext`. The functions belong to this head's model.
    """
    context = AblationContext(head, neurons, replacement)
    if replacement.factor is None:
        raise OptionError(
            f"replacement: {type(replacement).__name__} depends on the text, which a hook of TransformerLens does not "
            "know. Use AblationContext with head.score_pairs, or Zero(), Mean(statistics) or Scale(alpha)."
        )
    site = find_site(neurons.site)
    hook_sites = head.body.hook_sites
    product = site.factor_of
    if product is not None and any(
        replacement.constant(layer) is not None and hook_sites(site.name, layer) != hook_sites(product, layer)
        for layer in context.columns
    ):
        raise OptionError(
            f"replacement: {type(replacement).__name__} at site {site.name!r} of a gated MLP has no hook point: "
            f"TransformerLens' {site.hook!r} is the product. Use AblationContext, or neurons and statistics of site "
            f"{product!r}."
        )
    if isinstance(head.body, BridgeBody):
        head.body.require_faithful()
    return [(site.hook_name(layer), partial(_ablated, context, layer)) for layer in context.columns]


def _ablated(context: AblationContext, layer: int, activation: Tensor, hook: Any = None) -> Tensor:
    """TransformerLens calls with the activation and, by name, its hook point."""
    return context.ablated(layer, activation)
