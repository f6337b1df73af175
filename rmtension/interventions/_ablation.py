"""Ablate neurons of a model while it runs."""

import torch
from einops import repeat
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.data._tokens import TokenBatch, running_batch
from rmtension.errors import OptionError, ProvenanceError
from rmtension.interventions._check_replacement import check_replacement
from rmtension.interventions._replacement import Replacement, SingleTextReplacement
from rmtension.interventions._replacements import Zero
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet


class AblationContext:
    """Context manager that replaces the activations of a set of neurons.

    Leaving the context, also by an exception, removes the hooks; the weights are never changed. Contexts of several
    sets can be nested.

    Args:
        head: the model to ablate.
        neurons: the neurons to ablate.
        replacement: what their activations are replaced by: `Zero()`, `Mean(statistics)`, `Median(sample)`, an
            `Optimal`, `Resample(sample)` or `Scale(alpha)`.
        positions: the tokens at which they are replaced: "all", "response" or "last".

    Raises `ProvenanceError` for a set of another architecture or site, or a replacement from another model or site, and
    `OptionError` for other arguments, both at construction. Cost: a copy of the site's activations in every layer that
    has neurons of the set.

    Examples:
        >>> with AblationContext(head, neurons, Mean(means)):
        ...     inside = head.score_pairs(pairs["helpful"]).margin.mean()
        >>> bool(inside < scored.margin.mean())
        True
    """

    def __init__(
        self,
        head: RewardModel,
        neurons: NeuronSet,
        replacement: Replacement = Zero(),
        *,
        positions: str = "all",
    ) -> None:
        check_set(head, neurons)
        head.require_positions(positions)
        check_replacement(replacement, head, neurons.site)
        if not isinstance(replacement, SingleTextReplacement):
            raise OptionError(
                f"replacement: {replacement!r} needs both texts of a pair, but an AblationContext sees one text at a "
                "time. Use Zero(), Mean(statistics), Resample(sample) or Scale(alpha) here; NeuronAttribution and "
                "single_neuron_effects accept it."
            )
        self.head = head
        self.neurons = neurons
        self.replacement = replacement
        self._positions = positions
        per_neuron = head.n_channels(neurons.site) // head.n_neurons(neurons.site)
        columns = repeat(neurons.mask, "layer neuron -> layer (neuron channel)", channel=per_neuron)
        # layer -> the channels of the set's neurons in the input of its projection, for layers with neurons.
        self.columns = {layer: row.nonzero()[:, 0].to(head.device) for layer, row in enumerate(columns) if row.any()}
        # A factor and a constant at all tokens can be applied without knowing the tokens.
        self._needs_batch = positions != "all" or not replacement.is_affine
        self._hooks = head.hooks(neurons.site, self.ablated, self.columns, any_tokens=not self._needs_batch)

    def __enter__(self) -> "AblationContext":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def ablated(self, layer: int, activation: Tensor) -> Tensor:
        """The activation of a layer, with the set's neurons replaced."""
        columns = self.columns[layer].to(activation.device)
        # Rows here are tokens of all texts: some models flatten the two before the MLP, some do not.
        rows = activation.reshape(-1, self.head.n_channels(self.neurons.site))
        block = rows[:, columns]
        batch = _require_batch() if self._needs_batch else None
        ablated = self.replacement.values(layer, columns, block, batch)
        # "all" needs no mask, because padding does not influence real tokens.
        if batch is not None and self._positions != "all":
            ablated = torch.where(batch.position_mask(self._positions).to(block.device).reshape(-1, 1), ablated, block)
        rows = rows.clone()
        rows[:, columns] = ablated
        return rows.reshape(activation.shape)


def _require_batch() -> TokenBatch:
    batch = running_batch()
    if batch is None:
        raise OptionError(
            "AblationContext: these positions or donors depend on the text, which is known only in runs of this "
            "library. Run the model with RewardHead.score or score_pairs, or use positions='all' with Zero(), "
            "Mean(statistics) or Scale(alpha)."
        )
    return batch


def check_set(head: RewardModel, neurons: NeuronSet) -> None:
    """Raise `ProvenanceError` for a set of another architecture, `OptionError` for what is not a `NeuronSet`."""
    require_arguments("AblationContext(head, neurons)", head=(head, RewardModel), neurons=(neurons, NeuronSet))
    shape = (head.n_layers, head.n_neurons(neurons.site))
    if neurons.architecture != head.architecture:
        raise ProvenanceError(
            f"neurons: the set indexes neurons of {neurons.architecture!r}, but the model is {head.architecture!r}. "
            "Make the set with scores of this model."
        )
    if tuple(neurons.mask.shape) != shape:
        raise ProvenanceError(
            f"neurons: expected a mask of shape {shape} for site {neurons.site!r}, got {tuple(neurons.mask.shape)}. "
            "Make the set with scores of this model."
        )
