"""Taking neurons out of a running model, and putting them back."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from rmtension.activations import ActivationSample, ActivationStatistics
from rmtension.arguments import require_arguments
from rmtension.errors import DataError, OptionError, ProvenanceError
from rmtension.neurons import NeuronSet
from rmtension.replacing import require_made_from
from rmtension.reward_model import RewardModel
from rmtension.sites import check_positions
from rmtension.tokens import TokenBatch, running_batch

Mode = Literal["zero", "mean", "resample", "scale"]
Replacement = Callable[[int, Float[Tensor, "row channel"]], Float[Tensor, "row channel"]]


class AblationContext:
    """Context manager: while it is entered, the neurons of a set have other activations.

    `zero` sets them to 0; `mean` to their mean in `reference` (an `ActivationStatistics` of this model); `resample`
    to their values at one token of a pair with another prompt, drawn from `reference` (an `ActivationSample`), the
    same donor in all layers and at equal positions of texts with one prompt, whatever the batch; `scale` multiplies
    them by `alpha`. `positions` chooses the tokens: "all", "response" or "last".

    Leaving it, or an exception inside, removes the hooks; nothing else of the model is touched. Contexts of several
    sets nest. Cost: a copy of the site's activations per layer that the set has neurons in.

    Raises `ProvenanceError` for a set of another architecture or site, or a reference of another model or site, and
    `OptionError` for wrong options; both at construction.

    Examples:
        >>> with AblationContext(head, neurons, mode="mean", reference=means):
        ...     inside = head.score_pairs(pairs["helpful"]).margin.mean()
        >>> bool(inside < scored.margin.mean())
        True
    """

    def __init__(
        self,
        head: RewardModel,
        neurons: NeuronSet,
        *,
        mode: str = "zero",
        reference: ActivationStatistics | ActivationSample | None = None,
        alpha: float | None = None,
        positions: str = "all",
        seed: int = 0,
    ) -> None:
        check_positions(positions)
        check_set(head, neurons)
        _check_mode(mode, reference, alpha)
        if reference is not None:
            require_made_from(head, neurons.site, reference.provenance)
        self.head = head
        self.neurons = neurons
        self.mode = mode
        self.reference = reference
        self.alpha = alpha
        self._positions = positions
        self._seed = seed
        per_neuron = head.n_channels(neurons.site) // head.n_neurons(neurons.site)
        columns = repeat(neurons.mask, "layer neuron -> layer (neuron channel)", channel=per_neuron)
        # layer -> the columns of its projection's input that the set's neurons are; layers without any are left out.
        self.columns = {layer: row.nonzero()[:, 0].to(head.device) for layer, row in enumerate(columns) if row.any()}
        # At all tokens the same is done to each, whichever there are.
        any_tokens = positions == "all" and mode != "resample"
        self._hooks = head.hooks(neurons.site, self.ablated, self.columns, any_tokens=any_tokens)

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
        ablated = self._replacement(layer, columns, block)
        # "all" needs no mask: what becomes of padding reaches no real token.
        if self._positions != "all":
            ablated = torch.where(
                _require_batch().touched(self._positions).to(block.device).reshape(-1, 1), ablated, block
            )
        rows = rows.clone()
        rows[:, columns] = ablated
        return rows.reshape(activation.shape)

    def _replacement(
        self, layer: int, columns: Int[Tensor, "channel"], block: Float[Tensor, "row channel"]
    ) -> Float[Tensor, "row channel"]:
        if self.mode == "zero":
            return torch.zeros_like(block)
        if self.mode == "scale":
            assert self.alpha is not None
            return block * self.alpha
        if isinstance(self.reference, ActivationStatistics):
            return self.reference.channel_mean[layer].to(block)[columns].expand_as(block)
        assert isinstance(self.reference, ActivationSample)
        donors = draw_donors(_require_batch(), self.reference.keys, self._seed).flatten()
        return self.reference.values[donors.cpu(), layer].to(block)[:, columns]


def draw_donors(batch: TokenBatch, donor_keys: Int[Tensor, "donor"], seed: int) -> Int[Tensor, "row token"]:
    """Which donor every token takes its activations from: one with another prompt than its own.

    The draw is a hash of (seed, prompt, place in the text), not a random stream, so that it does not depend on the
    batch.
    """
    donors = torch.empty_like(batch.input_ids)
    places = torch.arange(batch.input_ids.shape[1], device=donors.device).expand_as(donors)
    if batch.position_ids is not None:
        places = batch.position_ids
    start = _mix(torch.tensor(seed))
    for row, key in enumerate(batch.row_keys.tolist()):
        others = (donor_keys != key).nonzero()[:, 0].to(donors.device)
        if not len(others):
            raise DataError(
                "resample: all donors come from the prompt that is scored. Sample the reference from more prompts."
            )
        donors[row] = others[_mix(_mix(places[row]) ^ _mix(start ^ key).to(places)) % len(others)]
    return donors


def _mix(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Spread integers over [0, 2^31): the finaliser of MurmurHash3, 32 bits wide."""
    low = 0xFFFFFFFF
    mixed = (numbers ^ (numbers >> 32)) & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & low
    return (mixed ^ (mixed >> 16)) >> 1


def _require_batch() -> TokenBatch:
    batch = running_batch()
    if batch is None:
        raise OptionError(
            "AblationContext: choosing tokens or donors needs a text that this library tokenised. Run the model "
            'through RewardHead.score or score_pairs, or use positions="all" with mode zero, mean or scale.'
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


def _check_mode(mode: str, reference: object, alpha: float | None) -> None:
    if mode not in get_args(Mode):
        raise OptionError(f"mode: expected one of {list(get_args(Mode))}, got {mode!r}.")
    needed = {"mean": ActivationStatistics, "resample": ActivationSample}.get(mode)
    if needed is not None and not isinstance(reference, needed):
        make = "collect" if needed is ActivationStatistics else "sample"
        raise OptionError(
            f"reference: mode {mode!r} needs {needed.__name__}, got {type(reference).__name__}. Make it with "
            f"ActivationCollector(head, site=...).{make}(pairs)."
        )
    if needed is None and reference is not None:
        raise OptionError(f"reference: mode {mode!r} uses none. Leave it out, or use mode='mean' or 'resample'.")
    if (mode == "scale") != (alpha is not None):
        raise OptionError(f"alpha: expected a factor with mode 'scale' and none otherwise, got {alpha} with {mode!r}.")
