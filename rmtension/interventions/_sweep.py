"""Many ablations of one model on the same pairs, for less than a pass each."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch, running
from rmtension.errors import OptionError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Replacement, Zero
from rmtension.models._replay import Replay
from rmtension.models._residual_writes import written_weights
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._rewards_of_pairs import RewardsOfPairs
from rmtension.store._provenance import digest_of


def score_without(
    head: RewardModel,
    pairs: Iterable[PreferencePair],
    sets: Sequence[NeuronSet],
    replacement: Replacement = Zero(),
    *,
    positions: str = "all",
    work: str | Path | None = None,
    progress: bool | None = None,
) -> list[PairRewards]:
    """The rewards of `pairs` without each of some sets: what `score_pairs` gives under an `AblationContext` of each.

    Every batch runs whole for the set whose lowest neurons are highest, and is kept; each other set then runs what is
    above its lowest neurons. Cost: 1 pass, and for every further set whose lowest layer is l (from 0) of L the blocks
    above it, (L - 1 - l) / L of a pass, where the residual stream takes what the site's projection writes as it is
    (`mlp` of most families, not in half precision); otherwise its block as well, (L - l) / L. To tell the two apart,
    every layer that sets begin in runs once or twice more. Empty sets take one pass together. Models whose blocks do
    not run one by one take a whole pass a set. Memory: one batch's residual stream before every block, and in every
    layer that sets begin in its activations and a copy of the projection's weights.

    Examples:
        >>> sets = [organism.truth[kind] for kind in ("helpful", "harmless", "shared", "decoy")]
        >>> [round(one.accuracy(), 2) for one in score_without(head, pairs["harmless"], sets)]
        [1.0, 0.83, 0.79, 1.0]
    """
    ablations = [AblationContext(head, one, replacement, positions=positions) for one in sets]
    if len({one.site for one in sets}) > 1:
        raise OptionError(f"sets: expected sets of one site, got {sorted({one.site for one in sets})}.")
    pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
    statistic = RewardsOfPairs(
        head,
        pairs,
        _Sweep(head, ablations).rewards,
        n=len(sets),
        name="ablate",
        settings={
            "sets": [[one.site, digest_of(one.mask)] for one in sets],
            "replacement": replacement.key,
            "positions": positions,
        },
        keeps_layers=True,
    )
    return run_pass(head, pairs, statistic, work=work, progress=progress)


class _Sweep:
    """The ablations, and what is known of the layers that they begin in."""

    def __init__(self, head: RewardModel, ablations: Sequence[AblationContext]) -> None:
        self._head = head
        self._ablations = ablations
        # An empty set changes nothing: it begins above the last block.
        self._lowest = [min(one.columns, default=head.n_layers) for one in ablations]
        self._weights: dict[int, Float[Tensor, "channel d_model"] | None] = {}

    @torch.no_grad()
    def rewards(self, batch: TokenBatch) -> list[Float[Tensor, "text"]]:
        """The rewards of a batch under each ablation."""
        head = self._head
        found: dict[int, Tensor] = {}
        empty = [number for number, lowest in enumerate(self._lowest) if lowest == head.n_layers]
        if empty:
            found = dict.fromkeys(empty, head.rewards(batch))
        left = [number for number in range(len(self._lowest)) if number not in found]
        if len(left) == 1 or not head.body.runs_native:
            for number in left:
                with self._ablations[number]:
                    found[number] = head.rewards(batch)
        elif left:
            # Below the highest of all lowest neurons, this run is that of the whole model.
            first = max(left, key=self._lowest.__getitem__)
            start = _Start(head, batch, self._ablations[first], sorted({self._lowest[number] for number in left}))
            found[first] = start.replay.rewards
            for number in set(left) - {first}:
                found[number] = self._above(start, self._ablations[number], self._lowest[number])
        return [found[number] for number in range(len(self._lowest))]

    def _above(self, start: "_Start", ablation: AblationContext, lowest: int) -> Float[Tensor, "text"]:
        """The rewards under an ablation whose lowest neurons are in layer `lowest`, from there on."""
        replay = start.replay
        if not replay.is_partial:
            with ablation:
                return self._head.rewards(replay.batch)
        step = start.step(ablation, lowest)
        if lowest not in self._weights:
            above = start.above(lowest)
            self._weights[lowest] = written_weights(replay, ablation.neurons.site, lowest, step, above)
        weights = self._weights[lowest]
        if weights is None:
            with ablation:
                return replay.rewards_from(lowest)
        moved = start.stream_after(lowest, weights) + _written(ablation, lowest, step, weights)
        with ablation:
            return replay.rewards_from(lowest + 1, moved)


class _Start:
    """A batch run whole under one ablation, and from it what the model was before.

    `layers` are those that ablations begin in; `first` begins in the highest of them.
    """

    def __init__(self, head: RewardModel, batch: TokenBatch, first: AblationContext, layers: Sequence[int]) -> None:
        self._first = first
        self._highest = layers[-1]
        # Hooks run in the order in which they are installed: what is kept is what comes before the ablation.
        kept: dict[int, Tensor] = {}

        def keep(layer: int, activation: Tensor) -> None:
            kept[layer] = activation.reshape(*batch.input_ids.shape, -1)

        with head.hooks(first.neurons.site, keep, layers), first:
            self.replay = Replay(head, batch)
        self._activations = kept

    def step(self, ablation: AblationContext, layer: int) -> Float[Tensor, "row token channel"]:
        """By how much an ablation moves the activation of a layer."""
        with running(self.replay.batch):
            return ablation.ablated(layer, self._activations[layer]) - self._activations[layer]

    def above(self, layer: int) -> Float[Tensor, "row token d_model"]:
        """The stream after a block as it was before any ablation; runs the block where the first ablation is in it."""
        if layer < self._highest:
            return self.replay.stream(layer + 1)
        return self.replay.run_block(layer, self.replay.stream(layer))

    def stream_after(self, layer: int, weights: Float[Tensor, "channel d_model"]) -> Float[Tensor, "row token d_model"]:
        """The same from what neurons write: what the first ablation took away is put back."""
        stream = self.replay.stream(layer + 1)
        if layer < self._highest:
            return stream
        return stream - _written(self._first, layer, self.step(self._first, layer), weights)


def _written(
    ablation: AblationContext,
    layer: int,
    step: Float[Tensor, "row token channel"],
    weights: Float[Tensor, "channel d_model"],
) -> Float[Tensor, "row token d_model"]:
    columns = ablation.columns[layer].to(step.device)
    return step[..., columns] @ weights[columns]
