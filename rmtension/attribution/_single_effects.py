"""The ground truth for attribution: the effect of ablating each single neuron on the margin."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension._progress import progress_bar
from rmtension._sites import find_site
from rmtension.data._pair import PreferencePair
from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import OptionError
from rmtension.interventions._ablation import check_set
from rmtension.interventions._check_replacement import check_replacement
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.models._replay import Replay
from rmtension.models._residual_writes import moving, written_weights
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.passes._running_scores import RunningScores
from rmtension.store._provenance import digest_of

# The method's name in provenance.
EFFECT = "effect of ablation"
# Numbers in the residual streams of one step over the last layer's neurons: 64 MB in float32.
_AT_A_TIME = 16_000_000


def single_neuron_effects(
    head: RewardModel,
    pairs: Iterable[PreferencePair],
    replacement: Replacement = Zero(),
    *,
    site: str = "mlp",
    positions: str = "all",
    neurons: NeuronSet | None = None,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> NeuronScores:
    """The effect of ablating each neuron alone: the mean over pairs of the margin without it minus the margin with it.

    A neuron with a negative effect supports the margin, one with a positive effect opposes it (`provenance.sign` -1).

    Exact: the model runs again for every neuron, as it does under an `AblationContext` of that neuron with the same
    `replacement`. `OtherResponse()`, which `AblationContext` does not take, works too. Neurons outside `neurons` get
    NaN. `stderr` is over pairs; intervals over prompts use `without_block`.

    Cost: one forward pass over the pairs, and per neuron of layer l (from 0) of L the blocks above it, which are
    (L - 1 - l) / L of a forward pass, if the site's projection is added to the residual stream unchanged (`mlp` of most
    families). Otherwise (heads before an MLP, half precision) its own block runs again too, (L - l) / L of a pass. In
    the first case N neurons in every layer cost N (L - 1) / 2 passes instead of N L. One more block runs for every
    layer with a wanted neuron, to tell the two cases apart, and the last block runs once more. Models whose blocks do
    not run one by one cost a whole pass per neuron.

    In half precision, effects near the rounding error of the reward are rounding; open the model in float32 for exact
    effects. `work` and `progress` are those of `run_pass`.
    Raises `OptionError` for an invalid site, position or replacement, `ProvenanceError` for neurons or a replacement of
    another model.

    Examples:
        >>> effects = single_neuron_effects(head, pairs["helpful"], neurons=neurons)
        >>> bool((effects.values[neurons.mask] < 0).all())
        True
    """
    require_arguments("single_neuron_effects(head, pairs)", head=(head, RewardModel), pairs=(pairs, Iterable))
    head.require_positions(positions)
    site = find_site(site).name
    check_replacement(replacement, head, site)
    head.require_choice()
    shape = (head.n_layers, head.n_neurons(site))
    if neurons is None:
        neurons = NeuronSet(torch.ones(shape, dtype=torch.bool), site, head.architecture)
    if tuple(neurons.mask.shape) != shape or neurons.site != site:
        raise OptionError(
            f"neurons: expected a set of {shape} at site {site!r}, got {tuple(neurons.mask.shape)} at {neurons.site!r}."
        )
    check_set(head, neurons)
    total = len(pairs) * len(neurons) if isinstance(pairs, Sized) else None
    # The bar counts ablations: one per pair and neuron.
    with progress_bar(progress=progress, total=total, desc="ablate", unit="pair") as bar:
        statistic = _SingleEffects(head, neurons, replacement, positions, bar.update)
        return run_pass(head, pairs, statistic, work=work, progress=False)


class _SingleEffects(PairStatistic[NeuronScores]):
    """The change of every pair's margin when each neuron of a set is ablated; calls `advance` after every ablation."""

    keeps_layers = True
    name = "ablate"

    def __init__(
        self,
        head: RewardModel,
        neurons: NeuronSet,
        replacement: Replacement,
        positions: str,
        advance: Callable[[int], object],
    ) -> None:
        self._head = head
        self._neurons = neurons
        self._replacement = replacement
        self._positions = positions
        self._advance = advance
        self._per_layer = [columns.nonzero()[:, 0].tolist() for columns in neurons.mask]
        self._scores = RunningScores(*neurons.mask.shape)
        self.sharing = "prompt" if replacement.shares_tokens else "none"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {
            "site": self._neurons.site,
            "positions": self._positions,
            "replacement": self._replacement.key,
            "neurons": digest_of(self._neurons.mask),
        }

    @property
    def state(self) -> Mapping[str, Tensor]:
        return self._scores.state

    @torch.no_grad()
    def observe(self, batch: TokenBatch) -> list[Tensor]:
        site = self._neurons.site
        replay = Replay(self._head, batch, [site])
        effects = []
        for layer, wanted in enumerate(self._per_layer):
            if not wanted:
                continue
            activation = replay.activations[site, layer]
            select = batch.position_mask(self._positions).to(activation.device)
            step = self._replacement.step(layer, activation, select, batch)
            for change in _changes(replay, site, layer, step, wanted):
                effects.append(margins(change).double())
                self._advance(batch.n_pairs)
        return [torch.stack(effects, dim=1)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        effects = torch.full((batch.n_pairs, *self._neurons.mask.shape), torch.nan, dtype=torch.float64)
        effects[:, self._neurons.mask] = observed[0].cpu()
        self._scores.update(effects, batch.keys[: batch.n_pairs])

    def merge_processes(self, add_up: Callable[..., None]) -> None:
        self._scores.merge_processes(add_up)

    def compute(self, record: PassRecord) -> NeuronScores:
        record.require_pairs()
        provenance = record.provenance(self._head, site=self._neurons.site, positions=self._positions, method=EFFECT)
        # The score is the change of the margin without the neuron: if it is positive, the neuron opposes the margin.
        provenance = replace(provenance, sign=-1, aggregate="signed", replacement=self._replacement.label)
        return self._scores.compute(provenance)


def _changes(
    replay: Replay, site: str, layer: int, step: Float[Tensor, "row token channel"], wanted: list[int]
) -> Iterator[Float[Tensor, "text"]]:
    """The change of every text's reward when each wanted neuron of a layer is ablated, in order."""
    head = replay.head
    steps = rearrange(step, "row token (neuron channel) -> row token neuron channel", neuron=head.n_neurons(site))
    written = written_weights(replay, site, layer, step, replay.stream(layer + 1)) if replay.is_partial else None
    if written is None:
        for number in wanted:
            only = torch.zeros_like(steps)
            only[:, :, number] = steps[:, :, number]
            yield _with_step(replay, site, layer, only.flatten(2)) - replay.base
        return
    # The vector that each channel writes into the residual stream after the block, [neuron, channel, d_model].
    weights = rearrange(written, "(neuron channel) d_model -> neuron channel d_model", neuron=head.n_neurons(site))
    above = replay.stream(layer + 1)
    if layer == head.n_layers - 1:
        places = replay.places
        read, read_steps = replay.batch.gather(places, above), replay.batch.gather(places, steps)
        base = replay.read(read)
        at_a_time = max(1, _AT_A_TIME // read.numel())
        for start in range(0, len(wanted), at_a_time):
            numbers = wanted[start : start + at_a_time]
            moves = torch.einsum("xnc,ncd->nxd", read_steps[:, numbers], weights[numbers])
            yield from replay.read_many(read + moves) - base
        return
    for number in wanted:
        yield replay.rewards_from(layer + 1, above + steps[:, :, number] @ weights[number]) - replay.base


def _with_step(
    replay: Replay, site: str, layer: int, step: Float[Tensor, "row token channel"]
) -> Float[Tensor, "text"]:
    """The rewards when the activation at the site moves by `step`."""
    with replay.head.hooks(site, moving(step), [layer]):
        return replay.rewards_from(layer)
