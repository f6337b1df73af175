"""A trainer callback that keeps permanently ablated neurons at 0 while the reward model is trained further."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback

from rmtension.errors import ModelError, OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead


class HoldAblated(TrainerCallback):  # type: ignore[misc]
    """Trainer callback for TRL and transformers that keeps the output weights of `neurons` at 0.

    Without it, an optimiser changes zeros in a projection, and the neurons become active again. With it, the neurons'
    columns of the down projection (for attention heads: of the output projection) get no gradient, and are set to 0
    after every step, whatever momentum or weight decay adds; the checkpoints that the trainer saves have zeros too. All
    other weights are trained: the neurons' incoming weights, which no longer matter, and the projection's bias, which
    holds the contribution of the means after an ablation by `Mean`.

    Start from a checkpoint of `RewardHead.with_ablation(neurons)`. When training begins, the callback opens the model
    once with `RewardHead.from_classifier` to find the weights. It then raises `OptionError` if a column is not 0,
    `ModelError` if parameters are sharded (FSDP, ZeRO-3), and `ProvenanceError` for neurons of another model. Merge
    PEFT adapters first, because they write into the same columns.

    Examples:
        >>> head.with_ablation(neurons).save_pretrained("without")
        >>> callbacks = [HoldAblated(neurons)]  # RewardTrainer(model="without", ..., callbacks=callbacks)
    """

    def __init__(self, *neurons: NeuronSet) -> None:
        if not neurons or not all(isinstance(neuron_set, NeuronSet) for neuron_set in neurons):
            raise OptionError(f"neurons: expected one NeuronSet or several, got {neurons!r}.")
        self.neurons = neurons
        self._held: list[tuple[nn.Parameter, bool, Int[Tensor, "channel"]]] = []
        self._handles: list[Any] = []

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **given: Any) -> None:
        """Find the columns, and stop their gradients."""
        self._release()
        head = RewardHead.from_classifier(given["model"], tokenizer=given.get("processing_class"))
        held = [entry for neurons in self.neurons for entry in _columns(head, neurons)]
        for weight, is_row, columns in held:
            if _part(weight, is_row, columns).any():
                raise OptionError(
                    "neurons: their weights in this model are not 0, so HoldAblated cannot hold them. Train a "
                    "checkpoint that head.with_ablation(neurons) wrote, or "
                    "head.with_ablation(neurons, Mean(statistics))."
                )
        self._held = held
        for weight, is_row, columns in held:
            if weight.requires_grad:
                tensor: Any = weight  # register_hook is untyped
                self._handles.append(tensor.register_hook(_without(is_row, columns)))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Set the columns to 0 again."""
        with torch.no_grad():
            for weight, is_row, columns in self._held:
                _clear(weight, is_row, columns)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the hooks of the gradients."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._held, self._handles = [], []


def _columns(head: RewardHead, neurons: NeuronSet) -> list[tuple[nn.Parameter, bool, Int[Tensor, "channel"]]]:
    """(weight, whether a neuron is a row of it, indices of the neurons) for every layer with neurons of the set."""
    held = []
    for layer, columns in AblationContext(head, neurons).columns.items():
        assert head.body.native is not None
        projection: Any = head.body.native.get_submodule(head.body.projection_names[neurons.site, layer])
        # nn.Linear holds [out, in], GPT-2's Conv1D [in, out].
        is_row = not isinstance(projection, nn.Linear)
        weight = projection.weight
        parameters = {name for name, _ in projection.named_parameters()}
        if not parameters <= {"weight", "bias"} or not weight.is_floating_point():
            raise ModelError(
                f"HoldAblated: layer {layer} writes through {type(projection).__name__} with the parameters "
                f"{sorted(parameters)}, not through one matrix of weights. Merge adapters and parametrisations first."
            )
        if weight.ndim != 2 or weight.shape[0 if is_row else 1] != head.n_channels(neurons.site):
            raise ModelError(
                f"HoldAblated: expected the whole matrix of weights in layer {layer}, got a part of shape "
                f"{tuple(weight.shape)}. Train in one process or with DDP, without FSDP and ZeRO-3."
            )
        held.append((weight, is_row, columns.to(weight.device)))
    return held


def _part(weight: Tensor, is_row: bool, columns: Int[Tensor, "channel"]) -> Float[Tensor, "..."]:
    return weight[columns] if is_row else weight[:, columns]


def _clear(weight: Tensor, is_row: bool, columns: Int[Tensor, "channel"]) -> None:
    weight.index_fill_(0 if is_row else 1, columns, 0.0)


def _without(is_row: bool, columns: Int[Tensor, "channel"]) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        _clear(kept, is_row, columns)
        return kept

    return hook
