"""The statistics of attribution passes: mean scores of several attributions, and the scores of every pair."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rmtension.attribution._batch_scores import BatchScorer, run_batch, sharing_of
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._pair_attributions import PairAttributions
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.passes._running_scores import RunningScores


class MeanScores(PairStatistic[list[NeuronScores]]):
    """The mean score of every neuron over pairs, by several scorers of one model."""

    keeps_layers = True
    layer_dim = 1

    def __init__(self, scorers: Sequence[BatchScorer]) -> None:
        head = scorers[0].head
        self._scorers = scorers
        self._scores = [
            RunningScores(head.n_layers, head.n_neurons(scorer.site), gap=scorer.method.needs_path)
            for scorer in scorers
        ]
        self.sharing = sharing_of(scorers)

    @property
    def name(self) -> str:
        """The names of the methods."""
        return ", ".join(dict.fromkeys(scorer.method.name for scorer in self._scorers))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of every scorer."""
        return {"attributions": [scorer.settings for scorer in self._scorers]}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The running sums of every scorer."""
        return {
            f"{number}/{name}": tensor
            for number, scores in enumerate(self._scores)
            for name, tensor in scores.state.items()
        }

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The scores of the batch's pairs by each scorer, each followed by their gaps if the method has gaps."""
        run = run_batch(self._scorers, batch)
        return [tensor for scorer in self._scorers for tensor in scorer.of_pairs(run) if tensor is not None]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Add the scores of a batch."""
        tensors = iter(observed)
        for scores in self._scores:
            values = next(tensors)
            scores.update(values, batch.keys[: batch.n_pairs], next(tensors) if scores.has_gap else None)

    def merge_processes(self, add_up: Callable[..., None]) -> None:
        """Combine the sums of several processes."""
        for scores in self._scores:
            scores.merge_processes(add_up)

    def compute(self, record: PassRecord) -> list[NeuronScores]:
        """The mean scores by each scorer, in their order."""
        record.require_pairs()
        return [
            scores.compute(scorer.provenance(record, scorer.aggregate))
            for scorer, scores in zip(self._scorers, self._scores, strict=True)
        ]


class ScoresOfPairs(PairStatistic[PairAttributions]):
    """The signed scores of every pair by one scorer."""

    keeps_layers = True
    layer_dim = 1

    def __init__(self, scorer: BatchScorer, pairs: PreferencePairs) -> None:
        head = scorer.head
        shape = (len(pairs), head.n_layers, head.n_neurons(scorer.site))
        self._scorer = scorer
        self._pairs = pairs
        self._values = torch.zeros(shape, dtype=head.reward_dtype)
        self.sharing = sharing_of([scorer])

    @property
    def name(self) -> str:
        """The name of the method."""
        return self._scorer.method.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the scorer."""
        return self._scorer.settings

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The scores computed so far, [pair, layer, neuron]."""
        return {"values": self._values}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """The signed scores of the batch's pairs."""
        values, _ = self._scorer.signed_of_pairs(run_batch([self._scorer], batch))
        return [values.to(self._values.dtype)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store the scores at the indices of their pairs."""
        self._values[list(batch.indices[: batch.n_pairs])] = observed[0].cpu()

    def compute(self, record: PassRecord) -> PairAttributions:
        """The scores of all pairs that were not skipped."""
        record.require_pairs()
        scores = PairAttributions(self._values, self._pairs, self._scorer.provenance(record, "signed"))
        return scores.take(record.kept(len(self._pairs))) if record.skipped else scores
