"""The Bradley-Terry loss on packed batches, as a subclass of transformers' `Trainer`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Trainer

from rmtension.bodies._native_run import run_base
from rmtension.bodies._run_modes import eager_eval
from rmtension.data._tokens import TokenBatch
from rmtension.training._frozen_layers import FrozenLayers


class RewardTrainer(Trainer):  # type: ignore[misc]
    """Trains a sequence classifier on batches of pairs, in which a shared prompt runs once.

    Args:
        model: a classifier of transformers with a linear head `score` of one output.
        args: the trainer's arguments. An item of the data set is a number, of a pair or of a whole batch.
        n_items: how many items there are.
        collate: the batch of some items.
        weights: a weight for every training pair.
        validation: batches of held-out pairs, if any.
        validation_weights: a weight for every held-out pair.
        frozen: the layers that are not trained, if any.
        options: other arguments of `Trainer`.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        n_items: int,
        collate: Callable[[Sequence[int]], TokenBatch],
        weights: Float[Tensor, "pair"],
        validation: Sequence[TokenBatch] = (),
        validation_weights: Float[Tensor, "held_out"] | None = None,
        frozen: FrozenLayers | None = None,
        **options: Any,
    ) -> None:
        self._weights = weights
        self._validation, self._validation_weights = validation, validation_weights
        self._frozen = frozen
        super().__init__(
            model=model,
            args=args,
            train_dataset=range(n_items),
            eval_dataset=range(len(validation)) if validation else None,
            data_collator=lambda numbers: {"batch": collate(numbers)},
            **options,
        )

    def margins(self, batch: TokenBatch) -> Float[Tensor, "pair"]:
        """The reward of the chosen minus that of the rejected response of every pair of a batch, on any device."""
        batch = batch.to(self.args.device)
        entered: AbstractContextManager[None] = nullcontext() if self._frozen is None else self._frozen.enter(batch)
        with entered, self.accelerator.autocast():
            states = batch.gather_last(run_base(self.model.base_model, batch))
            rewards: Tensor = self.model.score(states)[:, 0].float()
        return rewards[: batch.n_pairs] - rewards[batch.n_pairs :]

    def compute_loss(self, model: Any, inputs: Mapping[str, TokenBatch], *_: Any, **__: Any) -> Float[Tensor, ""]:
        """The weighted mean of -log sigmoid(margin) over the pairs of a batch."""
        batch = inputs["batch"]
        margins = self.margins(batch)
        weights = self._weights[list(batch.indices[: batch.n_pairs])].to(margins)
        return -(weights * logsigmoid(margins)).mean()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The weighted loss and accuracy on all held-out pairs."""
        assert self._validation_weights is not None
        weights = self._validation_weights.double()
        margins = torch.zeros(len(weights), dtype=torch.float64)
        with torch.no_grad(), eager_eval(self.model.modules()):
            for batch in self._validation:
                margins[list(batch.indices[: batch.n_pairs])] = self.margins(batch).double().cpu()
        right = (margins > 0).double() + (margins == 0).double() / 2
        metrics = {
            "eval_loss": float(-(weights * logsigmoid(margins)).sum() / weights.sum()),
            "eval_accuracy": float((weights * right).sum() / weights.sum()),
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
