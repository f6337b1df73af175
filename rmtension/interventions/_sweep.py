"""Score the same pairs under many ablations, each for less than a whole pass."""

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
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
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
    """The rewards of `pairs` under ablation of each of several neuron sets.

    The results are those of `score_pairs` inside an `AblationContext` of each set, in the order of `sets`. Every batch
    runs once through all layers, under the ablation that begins in the highest layer. Every other ablation runs only
    the layers from the lowest one that it changes. `replacement` and `positions` are those of `AblationContext`, `work`
    and `progress` those of `run_pass`.

    Cost: one pass, and for every further set with lowest layer l (from 0) of L layers:

    - (L - 1 - l) / L of a pass if the site's projection writes directly to the residual stream (`mlp` of most families,
      except in half precision),
    - (L - l) / L of a pass otherwise,
    - one pass if the model's blocks cannot run one by one.

    A test for the first case runs every lowest layer once or twice more. All empty sets together take one pass. Memory:
    the residual stream of a batch before every block, and the activations and a copy of the projection's weights in
    every lowest layer.

    Raises `OptionError` for sets of different sites, and the errors of `AblationContext`.

    Examples:
        >>> sets = [organism.truth[kind] for kind in ("helpful", "harmless", "shared", "decoy")]
        >>> [round(rewards.accuracy(), 2) for rewards in score_without(head, pairs["harmless"], sets)]
        [1.0, 0.83, 0.79, 1.0]
    """
    ablations = [AblationContext(head, neurons, replacement, positions=positions) for neurons in sets]
    sites = sorted({neurons.site for neurons in sets})
    if len(sites) > 1:
        raise OptionError(f"sets: expected sets of the same site, got {sites}. Call score_without once per site.")
    pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
    statistic = RewardsOfPairs(
        head,
        pairs,
        _Sweep(head, ablations).rewards,
        n=len(sets),
        name="ablate",
        settings={
            "sets": [[neurons.site, digest_of(neurons.mask)] for neurons in sets],
            "replacement": replacement.key,
            "positions": positions,
        },
        keeps_layers=True,
    )
    return run_pass(head, pairs, statistic, work=work, progress=progress)


class _Sweep:
    """The ablations, and for their lowest layers the weights that write directly to the residual stream, if any."""

    def __init__(self, head: RewardModel, ablations: Sequence[AblationContext]) -> None:
        self._head = head
        self._ablations = ablations
        # An empty set changes nothing, so its lowest layer is above the last block.
        self._lowest = [min(ablation.columns, default=head.n_layers) for ablation in ablations]
        self._weights: dict[int, Float[Tensor, "channel d_model"] | None] = {}

    @torch.no_grad()
    def rewards(self, batch: TokenBatch) -> list[Float[Tensor, "text"]]:
        """The rewards of a batch under each ablation."""
        head = self._head
        rewards: dict[int, Tensor] = {}
        empty = [number for number, lowest in enumerate(self._lowest) if lowest == head.n_layers]
        if empty:
            rewards = dict.fromkeys(empty, head.rewards(batch))
        left = [number for number in range(len(self._lowest)) if number not in rewards]
        if len(left) == 1 or not head.body.runs_native:
            for number in left:
                with self._ablations[number]:
                    rewards[number] = head.rewards(batch)
        elif left:
            # Below the highest of all lowest layers, this run equals that of the model without ablation.
            first = max(left, key=self._lowest.__getitem__)
            start = _Start(head, batch, self._ablations[first], sorted({self._lowest[number] for number in left}))
            rewards[first] = start.replay.rewards
            for number in set(left) - {first}:
                rewards[number] = self._above(start, self._ablations[number], self._lowest[number])
        return [rewards[number] for number in range(len(self._lowest))]

    def _above(self, start: "_Start", ablation: AblationContext, lowest: int) -> Float[Tensor, "text"]:
        """The rewards under an ablation whose lowest layer is `lowest`, running only the layers from there on."""
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
    """A full run of a batch under an ablation, from which the streams without ablation are reconstructed.

    `layers` are the lowest layers of all ablations; the lowest layer of `first` is the highest of them.
    """

    def __init__(self, head: RewardModel, batch: TokenBatch, first: AblationContext, layers: Sequence[int]) -> None:
        self._first = first
        self._highest = layers[-1]
        # Hooks run in the order in which they are installed, so the activations are kept before they are ablated.
        kept: dict[int, Tensor] = {}

        def keep(layer: int, activation: Tensor) -> None:
            kept[layer] = activation.reshape(*batch.input_ids.shape, -1)

        with head.hooks(first.neurons.site, keep, layers), first:
            self.replay = Replay(head, batch)
        self._activations = kept

    def step(self, ablation: AblationContext, layer: int) -> Float[Tensor, "row token channel"]:
        """The change that an ablation makes to the activation of a layer."""
        with running(self.replay.batch):
            return ablation.ablated(layer, self._activations[layer]) - self._activations[layer]

    def above(self, layer: int) -> Float[Tensor, "row token d_model"]:
        """The stream after a block without ablation; runs the block if the first ablation changes it."""
        if layer < self._highest:
            return self.replay.stream(layer + 1)
        return self.replay.run_block(layer, self.replay.stream(layer))

    def stream_after(self, layer: int, weights: Float[Tensor, "channel d_model"]) -> Float[Tensor, "row token d_model"]:
        """The same without running the block: what the first ablation removed is added again."""
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
