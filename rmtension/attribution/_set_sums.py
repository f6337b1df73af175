"""Sums over sets of the scores of their neurons, pair by pair: what predictions of their effects are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.attribution._batch_scores import BatchScorer, run_batch
from rmtension.attribution._methods import METHODS
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch, margins
from rmtension.errors import OptionError
from rmtension.interventions._replacement import SingleTextReplacement
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.store._provenance import Provenance, digest_of

# The methods whose scores are summed.
SCORES = ("attribution_patching", "relp")
# A part of the magnitudes of single scores in the scale of an effect, so that scores that cancel do not make it 0.
_FLOOR = 0.05
# Effects below this share of the margin are not told from each other.
_LEAST = 1e-3


@dataclass(frozen=True, eq=False)
class SetSums:
    """Sums over sets of the scores of every pair, signed and as magnitudes, and the margins."""

    signed: Float[np.ndarray, "score pair set"]
    absolute: Float[np.ndarray, "score pair set"]
    margin: Float[np.ndarray, "pair"]
    provenance: Provenance

    @cached_property
    def scales(self) -> Float[np.ndarray, "pair set"]:
        """The size of the scores of a set, the unit in which its effects are learned."""
        squares = (self.signed**2 + _FLOOR * self.absolute**2).sum(axis=0)
        scales: Float[np.ndarray, "pair set"] = np.sqrt(squares + (_LEAST * self._typical_margin) ** 2)
        return scales

    @cached_property
    def features(self) -> Float[np.ndarray, "pair set feature"]:
        """What the ratio of an effect to its scale depends on: both sums and the scale, and the margin."""
        whole = self._typical_margin
        parts = [part / self.scales for part in self.signed] + [np.log(self.scales / whole)]
        parts.append(np.broadcast_to(self.margin[:, None] / whole, self.scales.shape))
        return np.stack(parts, axis=-1)

    @property
    def _typical_margin(self) -> float:
        return float(np.sqrt(np.mean(self.margin**2))) + np.finfo(np.float64).tiny


class SumsOverSets(PairStatistic[SetSums]):
    """The sums over sets of both scores of every pair: one forward and one backward pass each."""

    keeps_layers = True
    name = "scores of sets"

    def __init__(
        self,
        head: RewardModel,
        pairs: PreferencePairs,
        sets: Sequence[NeuronSet],
        replacement: SingleTextReplacement,
        positions: str,
    ) -> None:
        site = sets[0].site
        self._scorers = [
            BatchScorer(head, METHODS[name], site, positions, "signed", replacement, 1, graddrop=False)
            for name in SCORES
        ]
        self._masks = torch.stack([neurons.mask.flatten() for neurons in sets], dim=1).double()
        self._values = torch.zeros(len(pairs), 1 + 2 * len(SCORES) * len(sets), dtype=torch.float64)
        self.sharing = "pair" if replacement.shares_tokens else "none"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the scorers, and the sets."""
        return {"attributions": [scorer.settings for scorer in self._scorers], "sets": digest_of(self._masks)}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The margins and sums so far, [pair, value]."""
        return {"values": self._values}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The margin of every pair, and its sums over the sets."""
        run = run_batch(self._scorers, batch)
        assert run.rewards is not None
        parts = [margins(run.rewards).double().cpu()[:, None]]
        for scorer in self._scorers:
            scores = scorer.signed_of_pairs(run)[0].flatten(1).double().cpu()
            parts += [scores @ self._masks, scores.abs() @ self._masks]
        return [torch.cat(parts, dim=1)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store the values at the indices of their pairs."""
        self._values[list(batch.indices[: batch.n_pairs])] = observed[0]

    def compute(self, record: PassRecord) -> SetSums:
        """All values; a pair that was skipped has none, so it raises."""
        record.require_pairs()
        if record.skipped:
            raise OptionError(
                f"pairs: {len(record.skipped)} pairs gave NaN or infinite scores and were skipped. Leave them out: "
                f"{list(record.skipped.values())[:3]}."
            )
        values = self._values.numpy()
        shape = (len(values), len(SCORES), 2, self._masks.shape[1])
        sums = values[:, 1:].reshape(shape).transpose(2, 1, 0, 3)
        scorer = self._scorers[0]
        provenance = record.provenance(scorer.head, site=scorer.site, positions=scorer.positions, method=self.name)
        return SetSums(sums[0], sums[1], values[:, 0], provenance)
