"""What activations are replaced by, where a number says what replacing them does or would do."""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from rmtension.activations import ActivationSample, ActivationStatistics
from rmtension.errors import OptionError, ProvenanceError
from rmtension.provenance import Provenance
from rmtension.reward_model import RewardModel

# Zero, the means of given statistics, or the mean of the pair's other response.
Reference = str | ActivationStatistics


def check_reference(head: RewardModel, site: str, reference: object) -> None:
    """Raise unless `reference` is "zero", "other", or statistics of this model at `site`."""
    if isinstance(reference, ActivationStatistics):
        require_made_from(head, site, reference.provenance)
    elif reference not in ("zero", "other"):
        raise OptionError(
            f"reference: expected 'zero', 'other' (the other response's mean) or ActivationStatistics, got "
            f"{reference!r}. Statistics are made with ActivationCollector(head, site=...).collect(pairs)."
        )


def require_made_from(head: RewardModel, site: str, found: Provenance) -> None:
    """Raise `ProvenanceError` where a reference was made from another model or at another site."""
    if found.model != head.fingerprint:
        raise ProvenanceError(
            f"reference: its activations are those of model {found.model}, this one is {head.fingerprint}. Collect "
            "them from the model that is ablated."
        )
    if found.site != site:
        raise ProvenanceError(
            f"reference: its activations are those of site {found.site!r}, the neurons are of {site!r}. Collect "
            "them at the neurons' site."
        )


def key_of(reference: Reference | ActivationSample | None) -> str | None:
    """What tells references apart in a work folder."""
    return reference if isinstance(reference, str | None) else reference.digest


def name_of(reference: Reference) -> str:
    """How provenance names it."""
    return "mean" if isinstance(reference, ActivationStatistics) else reference


def can_share(reference: Reference) -> bool:
    """Whether a token that two texts share is replaced by the same in both: not by the mean of the other text."""
    return isinstance(reference, ActivationStatistics) or reference != "other"


def step_to(
    reference: Reference,
    layer: int,
    activation: Float[Tensor, "row token channel"],
    select: Bool[Tensor, "row token"],
) -> Float[Tensor, "row token channel"]:
    """a_ref(t) - a(t) at the selected tokens, 0 at others. "other" needs a text a row."""
    weights = select.to(activation)
    if isinstance(reference, ActivationStatistics):
        target = reference.channel_mean[layer].to(activation).expand_as(activation)
    elif reference == "zero":
        target = torch.zeros_like(activation)
    else:
        share = weights / weights.sum(dim=1, keepdim=True)
        means = torch.einsum("xt,xtc->xc", share, activation)
        # The first half of a batch of pairs are the chosen texts, the second the rejected ones.
        other = rearrange(means, "(side pair) channel -> side pair channel", side=2).flip(0)
        target = repeat(other, "side pair channel -> (side pair) token channel", token=activation.shape[1])
    return (target - activation) * weights[..., None]
