"""Many ablations of one model on the same pairs, for less than a pass each."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.ablation import AblationContext
from rmtension.activations import ActivationSample, ActivationStatistics
from rmtension.errors import OptionError
from rmtension.neurons import NeuronSet
from rmtension.pair import PreferencePair
from rmtension.pairs import PreferencePairs
from rmtension.replay import Replay
from rmtension.reward_head import RewardHead
from rmtension.scored import ScoredPairs, require_finite
from rmtension.tokens import TokenBatch, running
from rmtension.writes import written_weights


def score_without(
    head: RewardHead,
    pairs: Iterable[PreferencePair],
    sets: Sequence[NeuronSet],
    *,
    mode: str = "zero",
    reference: ActivationStatistics | ActivationSample | None = None,
    alpha: float | None = None,
    positions: str = "all",
    seed: int = 0,
    truncate_response: bool = False,
    progress: bool = False,
) -> list[ScoredPairs]:
    """The rewards of `pairs` without each of some sets: what `score_pairs` gives under an `AblationContext` of each.

    Every batch runs once whole and is kept; an ablation then runs what is above its lowest neurons. Cost: 1 pass, and
    for a set whose lowest layer is l (from 0) of L the blocks above it, (L - 1 - l) / L of a pass, where the residual
    stream takes what the site's projection writes as it is (`mlp` of most families, not in half precision); otherwise
    its block as well, (L - l) / L. Models whose blocks do not run one by one take a whole pass a set. Memory: one
    batch's residual stream before every block, and its activations in the sets' lowest layers.
    """
    if len({one.site for one in sets}) > 1:
        raise OptionError(f"sets: expected sets of one site, got {sorted({one.site for one in sets})}.")
    ablations = [
        AblationContext(head, one, mode=mode, reference=reference, alpha=alpha, positions=positions, seed=seed)
        for one in sets
    ]
    pairs = pairs if isinstance(pairs, PreferencePairs) else PreferencePairs(pairs)
    rewards = torch.zeros(len(sets), 2, len(pairs), dtype=head.reward_dtype)
    stream = head.stream(
        pairs, desc="ablate", progress=progress, truncate_response=truncate_response, keeps_layers=True
    )
    sweep = _Sweep(head, ablations)
    for batch in stream:
        places = list(batch.places[: batch.n_pairs])
        for number, found in enumerate(sweep.rewards(batch)):
            rewards[number, :, places] = found.cpu().view(2, -1)
    stream.add_up(rewards)
    provenance = stream.provenance(stream.n_tokens, site="residual", positions="last", method="reward")
    cut = stream.n_prompts_cut, stream.n_responses_cut
    return [
        ScoredPairs(require_finite(chosen.clone()), require_finite(rejected.clone()), pairs, provenance, *cut)
        for chosen, rejected in rewards
    ]


class _Sweep:
    """The ablations, and what is known of the layers that they begin in."""

    def __init__(self, head: RewardHead, ablations: Sequence[AblationContext]) -> None:
        self._head = head
        self._ablations = ablations
        self._site = ablations[0].neurons.site if ablations else "mlp"
        # An empty set changes nothing: it begins above the last block.
        self._lowest = [min(one.columns, default=head.n_layers) for one in ablations]
        self._weights: dict[int, Float[Tensor, "channel d_model"] | None] = {}

    @torch.no_grad()
    def rewards(self, batch: TokenBatch) -> list[Float[Tensor, "text"]]:
        """The rewards of a batch under each ablation."""
        head = self._head
        replay = Replay(head, batch, [self._site], layers=sorted(set(self._lowest) - {head.n_layers}))
        found = []
        for ablation, lowest in zip(self._ablations, self._lowest, strict=True):
            if lowest == head.n_layers:
                found.append(replay.rewards)
                continue
            moved = self._moved(replay, ablation, lowest) if replay.is_partial else None
            with ablation:
                found.append(replay.rewards_from(lowest if moved is None else lowest + 1, moved))
        return found

    def _moved(
        self, replay: Replay, ablation: AblationContext, lowest: int
    ) -> Float[Tensor, "row token d_model"] | None:
        """The stream after the block of `lowest` without its neurons; None where the block has to run to tell."""
        columns = ablation.columns[lowest]
        activation = replay.activations[self._site, lowest]
        with running(replay.batch):
            step = ablation.ablated(lowest, activation) - activation
        if lowest not in self._weights:
            self._weights[lowest] = written_weights(replay, self._site, lowest, step)
        weights = self._weights[lowest]
        return None if weights is None else replay.stream(lowest + 1) + step[..., columns] @ weights[columns]
