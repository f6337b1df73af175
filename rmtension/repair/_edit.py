"""An edit of a reward model: what it adds to the reward row, multiplies neurons by, and adds to down projections."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from rmtension.errors import ModelError, OptionError, ProvenanceError
from rmtension.heads._head import LinearHead
from rmtension.interventions._edit_weights import edit_weights
from rmtension.interventions._projection_change import ProjectionChange
from rmtension.models._reward_model import RewardModel
from rmtension.reward_head import RewardHead
from rmtension.store._storage import read_result, write_result

SITE = "mlp"
# The names in a file of what is added to a parameter, by its number of dimensions.
_PREFIXES = {1: "vector_", 2: "matrix_", 3: "stack_"}


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one reward model's weights.

    - `kind`: the method that found it.
    - `row`: what is added to the row of the reward head.
    - `gains`: the factor of every MLP neuron, which multiplies its column of the down projection; 1 changes nothing.
    - `constants`: the activation that neurons with a gain of 0 are set to; it goes into the projection's bias.
    - `added`: layer -> what is added to the down projection.
    - `parameters`: name -> what is added to a parameter of the checkpoint's base.
    - `model`, `architecture`: the fingerprint and the shape of the model that it is made for.

    Examples:
        >>> import torch
        >>> gains = torch.ones(head.n_layers, head.n_neurons("mlp"))
        >>> gains[0, 3] = 0.5
        >>> edit = Edit("halved", head.fingerprint, head.architecture, gains=gains)
        >>> edit
        Edit(halved: 1 number for gpt2-2x24-heads2x12-d24)
        >>> edit.apply(head).score_pairs(pairs["helpful"]).accuracy()
        1.0
    """

    kind: str
    model: str
    architecture: str
    row: Float[Tensor, "d_model"] | None = None
    gains: Float[Tensor, "layer neuron"] | None = None
    constants: Float[Tensor, "layer neuron"] | None = None
    added: Mapping[int, Float[Tensor, "d_model channel"]] = field(default_factory=dict)
    parameters: Mapping[str, Float[Tensor, "..."]] = field(default_factory=dict)

    def __repr__(self) -> str:
        n = self.n_numbers
        return f"Edit({self.kind}: {n:,} {'number' if n == 1 else 'numbers'} for {self.architecture})"

    @property
    def n_numbers(self) -> int:
        """How many numbers describe the edit: those of the row, gains other than 1, and what is not 0 elsewhere."""
        in_row = 0 if self.row is None else self.row.numel()
        n_gains = 0 if self.gains is None else int((self.gains != 1).sum())
        others = [
            *self.added.values(),
            *self.parameters.values(),
            *([] if self.constants is None else [self.constants]),
        ]
        return in_row + n_gains + sum(int(tensor.count_nonzero()) for tensor in others)

    def apply(self, head: RewardHead) -> RewardHead:
        """An edited copy of the model; `head` itself is not changed. Memory: the model a second time.

        Raises `ProvenanceError` for another model than the edit's.
        """
        if head.fingerprint != self.model:
            raise ProvenanceError(
                f"edit: it is for model {self.model} ({self.architecture}), got model {head.fingerprint} "
                f"({head.architecture}). Pass the model that it was made from, unedited and in the same dtype."
            )
        self._require_shapes(head)
        changed: dict[int, ProjectionChange] = {}
        for layer in range(head.n_layers):
            factors = None if self.gains is None or bool((self.gains[layer] == 1).all()) else self.gains[layer]
            constants = None if self.constants is None or not self.constants[layer].any() else self.constants[layer]
            if not (factors is None and constants is None and layer not in self.added):
                changed[layer] = ProjectionChange(factors, constants, self.added.get(layer))
        new_head = None if self.row is None else with_added(head, self.row)
        return edit_weights(head, SITE, changed, self.parameters, new_head, f"{self.kind} edit")

    def _require_shapes(self, head: RewardHead) -> None:
        """Raise `OptionError` for a part of the edit that does not fit the model."""
        layers, neurons, width = head.n_layers, head.n_neurons(SITE), head.d_model
        expected = {"row": (width,), "gains": (layers, neurons), "constants": (layers, neurons)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise OptionError(f"{name}: expected the shape {shape} for this model, got {tuple(tensor.shape)}.")
        for layer, tensor in self.added.items():
            if layer not in range(layers) or tuple(tensor.shape) != (width, neurons):
                raise OptionError(
                    f"added: expected layers below {layers} and the shape {(width, neurons)}, got layer {layer} and "
                    f"{tuple(tensor.shape)}."
                )

    def save(self, path: str | Path) -> None:
        """Write the edit to one safetensors file, which has what the edit changes, not the model."""
        tensors = {f"added_{layer}": tensor for layer, tensor in self.added.items()}
        tensors |= {f"{_PREFIXES[tensor.ndim]}{name}": tensor for name, tensor in self.parameters.items()}
        alone = {"row": self.row, "gains": self.gains, "constants": self.constants}
        tensors |= {name: tensor for name, tensor in alone.items() if tensor is not None}
        values = {"kind_of_edit": self.kind, "model": self.model, "architecture": self.architecture}
        write_result(path, "Edit", tensors, values)

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read an edit that `save` wrote; raises `StorageError` for any other file."""
        optional = {
            "row": "float d_model",
            "gains": "float layer neuron",
            "constants": "float layer neuron",
            "added_*": "float d_model channel",
            **{f"{prefix}*": f"float{' _' * ndim}" for ndim, prefix in _PREFIXES.items()},
        }
        values = {"kind_of_edit": str, "model": str, "architecture": str}
        tensors, given = read_result(path, "Edit", tensors={}, values=values, optional=optional)
        added = {
            int(name.removeprefix("added_")): value for name, value in tensors.items() if name.startswith("added_")
        }
        parameters = {
            name.removeprefix(prefix): value
            for prefix in _PREFIXES.values()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        return cls(
            given["kind_of_edit"],
            given["model"],
            given["architecture"],
            row=tensors.get("row"),
            gains=tensors.get("gains"),
            constants=tensors.get("constants"),
            added=dict(sorted(added.items())),
            parameters=parameters,
        )


def has_reward_row(head: RewardModel) -> bool:
    """Whether the reward is one row of a linear head."""
    linear = head.require_head()
    is_plain = isinstance(linear, LinearHead) and type(linear).read is LinearHead.read
    return is_plain and len(head.choice or (0,)) == 1


def reward_row(head: RewardModel) -> tuple[LinearHead, int]:
    """The linear head and the number of the row that is the reward; raises `ModelError` if it is not one row."""
    linear = head.require_head()
    choice = head.choice
    if not isinstance(linear, LinearHead) or not has_reward_row(head):
        raise ModelError(
            f"head: an edit of the reward row needs a reward that is one row of a linear head, got "
            f"{type(linear).__name__} with output {choice}. Use an edit of neurons."
        )
    return linear, (choice or (0,))[0]


def with_added(head: RewardModel, row: Float[Tensor, "d_model"]) -> LinearHead:
    """The linear head with something added to the row that is the reward."""
    linear, number = reward_row(head)
    # In float64, because the sum is rounded only once.
    weight = linear.weight.detach().cpu().double().clone()
    weight[number] += row.double()
    return LinearHead(weight.to(linear.weight.dtype), linear.bias, linear.outputs)
