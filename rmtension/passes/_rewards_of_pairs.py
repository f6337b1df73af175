"""The statistic of scoring: the rewards of both responses of every pair, once or under several ablations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.models._reward_model import RewardModel
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord


class RewardsOfPairs(PairStatistic[list[PairRewards]]):
    """The rewards of every pair under each of `n` conditions, for example `n` ablations.

    Args:
        model: the reward model.
        pairs: the pairs to score, in the order of the result.
        rewards: computes the rewards of a batch's texts, under each condition.
        n: the number of conditions.
        name: the label of the progress bar.
        settings: what the rewards depend on besides model and pairs.
        keeps_layers: see `PairStatistic`.
    """

    def __init__(
        self,
        model: RewardModel,
        pairs: PreferencePairs,
        rewards: Callable[[TokenBatch], Sequence[Float[Tensor, "text"]]],
        *,
        n: int = 1,
        name: str = "score",
        settings: Mapping[str, Any] | None = None,
        keeps_layers: bool = False,
    ) -> None:
        self._model = model
        self._pairs = pairs
        self._rewards_of = rewards
        self._name = name
        self._settings = dict(settings or {})
        self.keeps_layers = keeps_layers
        self._rewards = torch.zeros(n, 2, len(pairs), dtype=model.reward_dtype)

    @property
    def name(self) -> str:
        """The label of the progress bar."""
        return self._name

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the rewards depend on besides model and pairs."""
        return self._settings

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The rewards computed so far, [condition, 2, pair]."""
        return {"rewards": self._rewards}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The rewards of the batch's texts, under each condition."""
        return list(self._rewards_of(batch))

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store the rewards at the indices of their pairs."""
        numbers = list(batch.indices[: batch.n_pairs])
        for rewards, of_texts in zip(self._rewards, observed, strict=True):
            rewards[:, numbers] = of_texts.view(2, -1).cpu()

    def compute(self, record: PassRecord) -> list[PairRewards]:
        """One result per condition, without the pairs that were skipped."""
        kept = record.kept(len(self._pairs))
        pairs = PreferencePairs(self._pairs[number] for number in kept) if record.skipped else self._pairs
        # The reward is read at some tokens, and depends on all of them.
        provenance = record.provenance(self._model, site="residual", positions="all", method="reward")
        provenance = replace(provenance, positions=self._model.require_head().reads_at)
        return [
            PairRewards(chosen, rejected, pairs, provenance, record.n_prompts_cut, record.n_responses_cut)
            for chosen, rejected in self._rewards[:, :, kept]
        ]
