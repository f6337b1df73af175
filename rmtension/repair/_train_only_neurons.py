"""A trainer callback that trains some MLP neurons only, in directions that the inputs of other pairs do not have."""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import ModelError, OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.models._run_options import RunOptions
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.repair._edit import SITE
from rmtension.repair._input_moments import input_moments, is_linear_map, matrix_of
from rmtension.reward_head import RewardHead

# Directions with a smaller share of the largest eigenvalue count as unused (the code of NSPO).
TAU = 5e-5


@dataclass(eq=False)
class _Part:
    """The weight of one linear map, of which the rows or the columns of some neurons are trained.

    `name` is the map's. A row is what a neuron reads with, a column what it writes. `free` is the projector onto the
    directions in which these rows or columns may change, applied from the right; None allows all.
    """

    name: str
    weight: nn.Parameter
    is_transposed: bool
    are_rows: bool
    neurons: Int[Tensor, "chosen"]
    reference: Tensor
    free: Float[Tensor, "input input"] | None = None

    def allowed(self, change: Float[Tensor, "first second"]) -> Float[Tensor, "first second"]:
        """A change of the weight, restricted to the trained neurons and to the directions in `free`."""
        matrix = change.T if self.is_transposed else change
        chosen = matrix[self.neurons] if self.are_rows else matrix[:, self.neurons]
        if self.free is not None:
            chosen = (chosen.to(self.free) @ self.free).to(change)
        result = torch.zeros_like(matrix)
        if self.are_rows:
            result[self.neurons] = chosen
        else:
            result[:, self.neurons] = chosen
        return result.T if self.is_transposed else result

    def change(self) -> Tensor:
        """How far the weight is from where it was at the beginning."""
        return self.weight.detach() - self.reference


class TrainOnlyNeurons(TrainerCallback):  # type: ignore[misc]
    """Trainer callback for TRL and transformers that trains the weights of some MLP neurons, and nothing else.

    Trained are the neurons' rows of the maps into the MLP (gate and up, or c_fc) and their columns of the down
    projection. All other weights, and all biases, keep their values bit by bit, whatever momentum or weight decay adds.

    With `keep`, the change of every row is projected onto the directions that the map's inputs do not have in these
    pairs: eigenvectors of the inputs' second moment whose eigenvalue is below `tau` x the largest, with every input
    measured in units of its root mean square (null-space projection as in NSPO, after every step). The change of the
    columns is projected in the same way, by the moment of the chosen neurons only. If the directions are exactly
    unused, every activation of these pairs stays as it was.

    When training begins, the callback opens the model with `RewardHead.from_classifier` and `options`, and runs the
    pairs of `keep` once. It raises `OptionError` for neurons of another site or an empty set, `ProvenanceError` for
    those of another model, and `ModelError` where an MLP is not made of whole matrices of one row or column per neuron
    (adapters, fused gate and up maps, sharded parameters). Memory: the trained matrices twice, and inputs^2 numbers for
    each. Runs in one process.

    Examples:
        >>> callbacks = [TrainOnlyNeurons(neurons, keep=pairs["helpful"])]  # RewardTrainer(..., callbacks=callbacks)
    """

    def __init__(
        self,
        neurons: NeuronSet,
        *,
        keep: PreferencePairs | None = None,
        tau: float = TAU,
        progress: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        if neurons.site != SITE or not neurons.mask.any():
            raise OptionError(f"neurons: expected at least one neuron of site {SITE!r}, got {neurons!r}.")
        if not 0 <= tau < 1:
            raise OptionError(f"tau: expected a share from 0 to below 1, got {tau}.")
        self.neurons, self.keep, self.tau = neurons, keep, tau
        self._progress, self._options = progress, options
        self._parts: list[_Part] = []
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **given: Any) -> None:
        """Find the weights, stop all other gradients, and find the directions in which the weights may change."""
        self._release()
        model = given["model"]
        head = RewardHead.from_classifier(model, tokenizer=given.get("processing_class"), **self._options)
        parts = _parts(head, self.neurons)
        if self.keep is not None:
            columns = {part.name: part.neurons for part in parts if not part.are_rows}
            moments = input_moments(
                head, self.keep, [part.name for part in parts], columns=columns, progress=self._progress
            )
            for part in parts:
                exact = torch.promote_types(part.weight.dtype, torch.float32)
                part.free = free_directions(moments[part.name], self.tau).to(part.weight.device, exact)
        self._parts = parts
        trained = {id(part.weight) for part in parts}
        self._frozen = [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in trained]
        for weight in self._frozen:
            weight.requires_grad_(False)
        for part in parts:
            tensor: Any = part.weight  # register_hook is untyped
            self._handles.append(tensor.register_hook(part.allowed))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Take back what the optimiser changed and should not have."""
        with torch.no_grad():
            for part in self._parts:
                part.weight.copy_(part.reference + part.allowed(part.change()))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let all weights get gradients again."""
        self._release()

    def changes(self) -> dict[str, Float[Tensor, "first second"]]:
        """What the training has added so far to each trained parameter, by its name in the base model."""
        return {f"{part.name}.weight": part.change().cpu() for part in self._parts}

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._handles, self._frozen = [], []


def free_directions(moment: Float[Tensor, "input input"], tau: float) -> Float[Tensor, "input input"]:
    """The projector onto the directions w in which w @ x is nearly 0 for the inputs x of a second moment.

    Every input is measured in units of its root mean square, so that one with large values does not make all others
    look unused. In these units, directions count whose eigenvalue is at most tau x the largest.
    """
    sizes = moment.diagonal().sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    values, vectors = torch.linalg.eigh(moment / torch.outer(sizes, sizes))
    basis, _ = torch.linalg.qr(vectors[:, values <= tau * values[-1]] / sizes[:, None])
    projector: Tensor = basis @ basis.T
    return projector


# -- inside ------------------------------------------------------------------------------------------------------------


def _parts(head: RewardHead, neurons: NeuronSet) -> list[_Part]:
    """The maps into and out of the MLP of every layer with neurons of the set."""
    found = []
    for layer, chosen in AblationContext(head, neurons).columns.items():
        assert head.body.native is not None
        down = head.body.projection_names[SITE, layer]
        place, _, own = down.rpartition(".")
        children = head.body.native.get_submodule(place).named_children()
        n_neurons = head.n_neurons(SITE)
        into = [
            f"{place}.{key}"
            for key, child in children
            if key != own and is_linear_map(child) and matrix_of(child).shape[0] == n_neurons
        ]
        if not into:
            raise ModelError(
                f"TrainOnlyNeurons: {place} has no Linear or Conv1D layer with one output for each of its {n_neurons} "
                "neurons. Merge adapters first; gate and up maps in one matrix are not supported."
            )
        for name in (*into, down):
            module: Any = head.body.native.get_submodule(name)
            weight = getattr(module, "weight", None)
            if not is_linear_map(module) or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
                raise ModelError(
                    f"TrainOnlyNeurons: {name} ({type(module).__name__}) is not one whole matrix of weights. Merge "
                    "adapters and parametrisations first, and train without FSDP and ZeRO-3."
                )
            if not weight.requires_grad:
                raise ModelError(
                    f"TrainOnlyNeurons: {name}.weight has requires_grad False, so no optimiser trains it. Call "
                    "model.requires_grad_(True) before the trainer is made."
                )
            is_transposed = not isinstance(module, nn.Linear)
            found.append(
                _Part(name, weight, is_transposed, name != down, chosen.to(weight.device), weight.detach().clone())
            )
    return found
