"""What a neuron writes, read from the weights: its direct weight on the reward, and on the logit of every token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._sites import find_site
from rmtension.bodies._hooks import InstalledHooks
from rmtension.bodies._norms import NormLayer, read_norm
from rmtension.data._tokens import TokenBatch
from rmtension.errors import ModelError
from rmtension.models._direct_path import DirectPaths
from rmtension.models._head_files import stored_tensor
from rmtension.models._loading import find_checkpoint
from rmtension.models._reward_model import RewardModel

# A product of two vectors below this share of their lengths is rounding of float32: they are at right angles.
ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class DirectWeights:
    """The direct weights of some neurons; `reason` says why `on_reward` is NaN and `read` is None, or is empty.

    The output column w of a neuron (its column of the down projection) passes the final norm as
    z = gain * (w - mean(w)) for a layer norm and z = gain * w for an RMS norm. `read` has z, and `on_reward` has
    z @ (row of the reward head), or 0 where that is rounding. At the token that the reward is read from, the neuron
    adds activation * weight / sigma to the reward directly, where sigma is what the final norm divides by
    (`direct_contributions`). Effects through later blocks are not part of it.
    """

    on_reward: Float[Tensor, "wanted"]
    read: Float[Tensor, "wanted d_model"] | None
    reason: str = ""


def direct_weights(head: RewardModel, batch: TokenBatch, site: str, wanted: Sequence[tuple[int, int]]) -> DirectWeights:
    """The direct weights of the neurons `wanted`, (layer, neuron), on the CPU in float64.

    The weights do not depend on `batch`: they are compared with `direct_contributions` on it. They are NaN, with a
    reason, for attention heads (one direction per channel), for `mlp_gate` (one factor of what the neuron writes), for
    `expert` (the routing weight differs per token), for a head that is not linear, and where a block processes what its
    neurons write (a norm behind the projection, as in Gemma-2 and OLMo-2). Cost: one forward pass over the batch and a
    product with each projection.

    Examples:
        >>> from rmtension.data._tokens import TokenBatch
        >>> tokens = head.tokenizer(["Human: a Assistant: helpful-0 end"], return_tensors="pt")
        >>> batch = TokenBatch.from_rows(tokens["input_ids"], tokens["attention_mask"].bool())
        >>> bool((direct_weights(head, batch, "mlp", list(neurons)).on_reward > 0).all())
        True
    """
    if find_site(site).name == "attn_head":
        return _without(wanted, "an attention head writes one direction for each of its channels, not a single one")
    if site == "expert":
        return _without(wanted, "what a neuron of an expert writes is multiplied by the routing weight of each token")
    if find_site(site).factor_of is not None:
        return _without(wanted, f"an activation at site {site!r} is one factor of what the neuron writes; use 'mlp'")
    try:
        row = head.require_weight()
        paths = DirectPaths(head, batch)
        with InstalledHooks(paths.hooks), torch.no_grad():
            head.residual(batch)
        parts = paths.contributions().neurons[site]
        norm = read_norm(head.body.final_norm, head.d_model)
    except ModelError as error:
        return _without(wanted, str(error))
    last_in, last_out = paths.final_norm_seen
    sigma = norm.to(last_in).sigma(last_in, last_out)
    direction = norm.to(row).pull_back(row, torch.ones_like(row[0]))
    # If no neuron contributes anything, only the rounding of the reward remains.
    rounding = float(((last_in * direction.to(last_in)).abs().sum(dim=1) / sigma).max()) * ROUNDING
    room = max(1e-4, torch.finfo(head.dtype).eps ** 0.5) * float(parts.abs().max()) + rounding
    on_reward = torch.full((len(wanted),), torch.nan, dtype=torch.float64)
    read = torch.zeros(len(wanted), head.d_model, dtype=torch.float64)
    for layer in sorted({layer for layer, _ in wanted}):
        activation = paths.seen[head.body.projection(site, layer).read]
        slope = _slope(head, site, layer, direction.to(activation.device))
        computed = (activation * slope.to(activation) / sigma[:, None].to(activation)).cpu()
        if not float((computed - parts[:, layer]).abs().max()) <= room:
            return _without(wanted, "a block normalises or scales what its neurons write, by another factor per text")
        rows = [number for number, (own, _) in enumerate(wanted) if own == layer]
        columns = [wanted[number][1] for number in rows]
        on_reward[rows] = slope[columns].double().cpu()
        read[rows] = _read_vectors(head, site, layer, columns, norm, activation.device)
    at_right_angles = on_reward.abs() <= ROUNDING * read.norm(dim=1) * float(row.double().norm())
    return DirectWeights(torch.where(at_right_angles, 0.0, on_reward), read)


def unembedding(head: RewardModel) -> Float[Tensor, "token d_model"] | None:
    """The unembedding, [token, d_model], of the model with the final norm that `head` has; None if there is none.

    That of a language model, in memory or in the files that it was opened from; or, in a classifier whose config says
    that a language model with these weights ties its embeddings (`tie_word_embeddings`), the embedding.
    """
    model: Any = head.model
    source: Any = getattr(model, "original_model", None)
    if not hasattr(source, "get_output_embeddings"):
        weight = getattr(getattr(model, "unembed", None), "W_U", None)
        return _unless_zero(None if weight is None else weight.detach().T)
    if head.body.final_norm_folded:
        return None
    if getattr(source.config.get_text_config(), "tie_word_embeddings", False):
        return _unless_zero(source.get_input_embeddings().weight.detach())
    module = source.get_output_embeddings()
    weight = _unless_zero(None if module is None else module.weight.detach())
    if weight is None and head.checkpoint is not None and head.checkpoint.source is not None:
        opened_from = head.checkpoint.source
        location = find_checkpoint(opened_from.name, opened_from.options, local_files_only=True)
        stored = None if location.adapters else stored_tensor(location.weights, ("lm_head.weight", "embed_out.weight"))
        weight = stored if stored is not None and tuple(stored.shape[1:]) == (head.d_model,) else None
    return weight


def _unless_zero(weight: Tensor | None) -> Tensor | None:
    """The weight; None for the zeros that a bridge around a classifier has as its unembedding."""
    return None if weight is None or not bool(weight.any()) else weight


def token_weights(
    read: Float[Tensor, "wanted d_model"], rows: Float[Tensor, "token d_model"]
) -> Float[Tensor, "wanted token"]:
    """What a unit of activation adds to the logit of every token, times sigma, minus the mean over the tokens.

    The mean changes no probability. `rows` is the unembedding; biases and factors of the logits are left out.
    """
    weights = read.to(rows.device) @ rows.to(read.dtype).T
    return (weights - weights.mean(dim=1, keepdim=True)).cpu()


# -- parts -------------------------------------------------------------------------------------------------------------


def _without(wanted: Sequence[tuple[int, int]], reason: str) -> DirectWeights:
    return DirectWeights(torch.full((len(wanted),), torch.nan, dtype=torch.float64), None, reason)


def _slope(head: RewardModel, site: str, layer: int, direction: Float[Tensor, "d_model"]) -> Float[Tensor, "channel"]:
    """The product of every output column of a layer with `direction`, however its module stores the weights."""
    projection = head.body.projection(site, layer)
    inputs = torch.zeros(1, head.n_channels(site), dtype=projection.dtype, device=direction.device, requires_grad=True)
    with torch.enable_grad():
        written = projection.apply(inputs)
        (slope,) = torch.autograd.grad((written.to(direction) * direction).sum(), inputs)
    return slope[0].to(direction.dtype)


def _read_vectors(
    head: RewardModel, site: str, layer: int, columns: list[int], norm: NormLayer, device: torch.device
) -> Float[Tensor, "wanted d_model"]:
    """The output columns of some neurons as they come out of the final norm, for a scale of 1, in float64."""
    projection = head.body.projection(site, layer)
    unit = torch.zeros(len(columns), head.n_channels(site), dtype=projection.dtype, device=device)
    unit[range(len(columns)), columns] = 1
    with torch.no_grad():
        written = (projection.apply(unit) - projection.apply(torch.zeros_like(unit))).double()
    exact = norm.to(written)
    return (exact.apply(written, torch.ones_like(written[:, 0])) - exact.bias).cpu()
