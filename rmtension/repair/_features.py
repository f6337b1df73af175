"""What edits are fitted to: the states that the reward is read from, margins, and contributions of neurons."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.models._reward_model import RewardModel
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.repair._splits import RepairPairs, exchanged_labels
from rmtension.reward_head import RewardHead

# The margins of pairs, by objective.
GroupMargins = Mapping[str, Float[Tensor, "pair"]]


@dataclass(frozen=True, eq=False)
class ReadStates:
    """The state that a linear head reads, h, of both responses of every pair, and the margins.

    `difference` is h(chosen) - h(rejected), in float64; `margin` is row @ difference.
    """

    difference: Float[Tensor, "pair d_model"]
    margin: Float[Tensor, "pair"]


class _StatesOfPairs(PairStatistic[ReadStates]):
    """The states that the head reads at the last token of each text, and the rewards."""

    def __init__(self, model: RewardModel, pairs: PreferencePairs) -> None:
        self._model = model
        self._n = len(pairs)
        self._states = torch.zeros(2, len(pairs), model.d_model, dtype=torch.float64)
        self._rewards = torch.zeros(2, len(pairs), dtype=torch.float64)

    @property
    def name(self) -> str:
        """The label of the progress bar."""
        return "states"

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The states and rewards so far."""
        return {"states": self._states, "rewards": self._rewards}

    @torch.no_grad()
    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The states at the tokens that the reward is read from, and the rewards."""
        model = self._model
        places = model.require_head().tokens(batch)
        with model.last_mlp_where_read(batch):
            states = batch.gather(places, model.residual(batch))
        return [states[: len(batch.last)], model.read_places(states, places, batch)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store them at the indices of their pairs."""
        numbers = list(batch.indices[: batch.n_pairs])
        states, rewards = (part.double().cpu() for part in observed)
        self._states[:, numbers] = states.view(2, len(numbers), -1)
        self._rewards[:, numbers] = rewards.view(2, -1)

    def compute(self, record: PassRecord) -> ReadStates:
        """The differences and margins, without the pairs that were skipped."""
        kept = record.kept(self._n)
        chosen, rejected = self._states[:, kept]
        return ReadStates(chosen - rejected, self._rewards[0, kept] - self._rewards[1, kept])


def read_states(model: RewardModel, pairs: PreferencePairs, *, progress: bool | None = None) -> ReadStates:
    """Run the pairs and keep what the head reads. Cost: one forward pass. Memory: 2 x pairs x d_model numbers."""
    model.require_all_pairs()
    return run_pass(model, pairs, _StatesOfPairs(model, pairs), progress=progress)


@dataclass(frozen=True, eq=False)
class SplitStates:
    """The states of the fit and of the development pairs, by objective."""

    fit: Mapping[str, ReadStates]
    development: Mapping[str, ReadStates]

    @classmethod
    def of(cls, model: RewardModel, pairs: RepairPairs, *, progress: bool | None = None) -> "SplitStates":
        """Run the fit and the development pairs. Cost: one forward pass over both."""
        fit, development = (
            {name: read_states(model, part, progress=progress) for name, part in groups.items()}
            for groups in (pairs.fit, pairs.development)
        )
        return cls(fit, development)

    def shuffled(self, weak: str, seed: int) -> "SplitStates":
        """The states of `RepairPairs.shuffled`: an exchanged label only changes the sign of a pair's difference."""
        fit, development = ({**groups, weak: _shuffled(groups[weak], seed)} for groups in (self.fit, self.development))
        return SplitStates(fit, development)

    @property
    def margins(self) -> dict[str, Float[Tensor, "pair"]]:
        """The margins of the development pairs."""
        return {name: states.margin for name, states in self.development.items()}

    def margins_with(self, row: Float[Tensor, "d_model"]) -> dict[str, Float[Tensor, "pair"]]:
        """The margins of the development pairs with something added to the row of the reward head."""
        return {name: states.margin + states.difference @ row for name, states in self.development.items()}


def _shuffled(states: ReadStates, seed: int) -> ReadStates:
    exchanged = torch.from_numpy(exchanged_labels(len(states.margin), seed))
    difference = torch.where(exchanged[:, None], -states.difference, states.difference)
    return ReadStates(difference, torch.where(exchanged, -states.margin, states.margin))


def margins_of(
    head: RewardHead, groups: Mapping[str, PreferencePairs], *, progress: bool | None = None
) -> dict[str, Float[Tensor, "pair"]]:
    """The margins of every group's pairs, in float64. Cost: a forward pass."""
    head.require_all_pairs()
    return {name: head.score_pairs(part, progress=progress).margin.double() for name, part in groups.items()}
