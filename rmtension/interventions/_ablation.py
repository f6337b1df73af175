"""Taking neurons out of a running model, and putting them back."""

import torch
from einops import repeat
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._sites import check_positions
from rmtension.data._tokens import TokenBatch, running_batch
from rmtension.errors import OptionError, ProvenanceError
from rmtension.interventions._replacements import Replacement, Zero, check_replacement
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet


class AblationContext:
    """Context manager: while it is entered, the neurons of a set have other activations.

    `replacement` says which: `Zero()`, `Mean(statistics)`, `Resample(sample)` or `Scale(alpha)`. `positions` says at
    which tokens: "all", "response" or "last".

    Leaving it, or an exception inside, removes the hooks; nothing else of the model is touched. Contexts of several
    sets nest. Cost: a copy of the site's activations per layer that the set has neurons in.

    Raises `ProvenanceError` for a set of another architecture or site, or a replacement of another model or site, and
    `OptionError` for wrong options; both at construction.

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
        check_positions(positions)
        check_set(head, neurons)
        check_replacement(replacement, head, neurons.site)
        if not replacement.ablates:
            raise OptionError(
                f"replacement: {replacement!r} needs both texts of a pair, and a running model sees one at a time. Use "
                "Zero(), Mean(statistics), Resample(sample) or Scale(alpha); or ask attribution or "
                "single_neuron_effects, which take it."
            )
        self.head = head
        self.neurons = neurons
        self.replacement = replacement
        self._positions = positions
        per_neuron = head.n_channels(neurons.site) // head.n_neurons(neurons.site)
        columns = repeat(neurons.mask, "layer neuron -> layer (neuron channel)", channel=per_neuron)
        # layer -> the columns of its projection's input that the set's neurons are; layers without any are left out.
        self.columns = {layer: row.nonzero()[:, 0].to(head.device) for layer, row in enumerate(columns) if row.any()}
        # At all tokens the same is done to each, whichever there are.
        self._needs_batch = positions != "all" or replacement.factor is None
        self._hooks = head.hooks(neurons.site, self.ablated, self.columns, any_tokens=not self._needs_batch)

    def __enter__(self) -> "AblationContext":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def ablated(self, layer: int, activation: Tensor) -> Tensor:
        """The activation of a layer as it is while this is entered."""
        columns = self.columns[layer].to(activation.device)
        # Rows here are tokens of all texts: some models flatten the two before the MLP, some do not.
        rows = activation.reshape(-1, self.head.n_channels(self.neurons.site))
        block = rows[:, columns]
        batch = _require_batch() if self._needs_batch else None
        ablated = self.replacement.values(layer, columns, block, batch)
        # "all" needs no mask: what becomes of padding reaches no real token.
        if batch is not None and self._positions != "all":
            ablated = torch.where(batch.position_mask(self._positions).to(block.device).reshape(-1, 1), ablated, block)
        rows = rows.clone()
        rows[:, columns] = ablated
        return rows.reshape(activation.shape)


def _require_batch() -> TokenBatch:
    batch = running_batch()
    if batch is None:
        raise OptionError(
            "AblationContext: choosing tokens or donors needs a text that this library tokenised. Run the model "
            'through RewardHead.score or score_pairs, or use positions="all" with Zero(), Mean(...) or Scale(...).'
        )
    return batch


def check_set(head: RewardModel, neurons: NeuronSet) -> None:
    """Raise `ProvenanceError` unless the set indexes neurons of a model of this architecture, `OptionError` if none."""
    require_arguments("AblationContext(head, neurons)", head=(head, RewardModel), neurons=(neurons, NeuronSet))
    shape = (head.n_layers, head.n_neurons(neurons.site))
    if neurons.architecture != head.architecture:
        raise ProvenanceError(
            f"neurons: the set indexes neurons of {neurons.architecture!r}, the model is {head.architecture!r}. Use a "
            "set made with a model of this architecture."
        )
    if tuple(neurons.mask.shape) != shape:
        raise ProvenanceError(
            f"neurons: expected a mask of {shape} for site {neurons.site!r}, got {tuple(neurons.mask.shape)}."
        )
