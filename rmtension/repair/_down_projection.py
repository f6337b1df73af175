"""An edit of one down projection in closed form: least squares on the states of weak pairs, little change on strong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import log_expit
from torch import Tensor

from rmtension.bodies._hooks import Hook, HookSite, InstalledHooks
from rmtension.data._pairs import PreferencePairs
from rmtension.data._tokens import TokenBatch
from rmtension.errors import OptionError
from rmtension.models._reward_model import RewardModel
from rmtension.passes._pair_pass import run_pass
from rmtension.passes._pair_statistic import PairStatistic
from rmtension.passes._pass_record import PassRecord
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import margins_of
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# How much the reward of each response is moved, in standard deviations of the margins; and the weight of strong texts.
STEPS = (0.5, 1.0, 2.0, 4.0)
WEIGHTS = (0.01, 0.1, 1.0)
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class ProjectionInputs:
    """What the down projections read at the token that the reward is read from, and how the reward depends on it.

    `inputs` are the activations that every layer's down projection reads, chosen responses first; `slopes` the
    gradients of the reward with respect to its output (none if they were not asked for), and `margins` those of the
    pairs.
    """

    inputs: Float[Tensor, "layer text channel"]
    slopes: Float[Tensor, "layer text d_model"]
    margins: Float[Tensor, "pair"]

    def predicted_margins(self, number: int, change: Float[Tensor, "d_model channel"]) -> Float[Tensor, "pair"]:
        """The margins with something added to the projection of one layer, to first order at the last tokens."""
        moved = ((self.inputs[number] @ change.T) * self.slopes[number]).sum(dim=1)
        chosen, rejected = moved.chunk(2)
        return self.margins + chosen - rejected


class _InputsOfPairs(PairStatistic[ProjectionInputs]):
    """The inputs and slopes of some layers, for every text of the pairs."""

    sharing = "pair"
    keeps_layers = True

    def __init__(self, model: RewardModel, pairs: PreferencePairs, layers: Sequence[int], slopes: bool) -> None:
        self._model, self._layers, self._n, self._with_slopes = model, list(layers), len(pairs), slopes
        sizes = (len(self._layers), 2, len(pairs))
        self._inputs = torch.zeros(*sizes, model.n_channels(SITE), dtype=torch.float64)
        self._slopes = torch.zeros(*sizes, model.d_model if slopes else 0, dtype=torch.float64)
        self._rewards = torch.zeros(2, len(pairs), dtype=torch.float64)

    @property
    def name(self) -> str:
        """The label of the progress bar."""
        return "projections"

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The inputs, slopes and rewards so far."""
        return {"inputs": self._inputs, "slopes": self._slopes, "rewards": self._rewards}

    def observe(self, batch: TokenBatch) -> list[Tensor]:
        """A forward pass, and with slopes a backward pass."""
        inputs: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}

        def keep(layer: int, activation: Tensor) -> None:
            inputs[layer] = activation.detach()

        def put(layer: int, written: Tensor) -> Tensor:
            if not self._with_slopes:
                return written
            leaves[layer] = torch.zeros_like(written).requires_grad_(True)
            return written + leaves[layer]

        hooks = list(_hooks(self._model, self._layers, keep, put))
        with torch.set_grad_enabled(self._with_slopes), InstalledHooks(hooks):
            rewards = self._model.forward(batch)
            found: list[Sequence[Tensor]] = [[inputs[layer] for layer in self._layers]]
            if self._with_slopes:
                found.append(torch.autograd.grad(rewards.sum(), [leaves[layer] for layer in self._layers]))
        where = batch.last_places

        def at_last(tensors: Sequence[Tensor]) -> Tensor:
            shape = (*batch.input_ids.shape, -1)
            return torch.stack([batch.gather(where, tensor.reshape(shape)) for tensor in tensors])

        return [rewards.detach(), *map(at_last, found)]

    def update(self, batch: TokenBatch, observed: list[Tensor]) -> None:
        """Store them at the indices of their pairs."""
        numbers = list(batch.indices[: batch.n_pairs])
        rewards, inputs, *slopes = (part.double().cpu() for part in observed)
        shape = len(self._layers), 2, len(numbers), -1
        self._inputs[:, :, numbers] = inputs.view(shape)
        self._rewards[:, numbers] = rewards.view(2, -1)
        for of_layers in slopes:
            self._slopes[:, :, numbers] = of_layers.view(shape)

    def compute(self, record: PassRecord) -> ProjectionInputs:
        """The result, without the pairs that were skipped."""
        kept = record.kept(self._n)
        inputs, slopes = (part[:, :, kept].flatten(1, 2) for part in (self._inputs, self._slopes))
        return ProjectionInputs(inputs, slopes, self._rewards[0, kept] - self._rewards[1, kept])


def projection_inputs(
    model: RewardModel,
    pairs: PreferencePairs,
    layers: Sequence[int],
    *,
    slopes: bool = True,
    progress: bool | None = None,
) -> ProjectionInputs:
    """Run the pairs and keep what some layers' down projections read.

    With `slopes`, also the gradients of the reward with respect to what they write, by a backward pass.
    """
    return run_pass(model, pairs, _InputsOfPairs(model, pairs, layers, slopes), progress=progress)


def solve_projection(
    inputs: Float[Tensor, "text channel"],
    slopes: Float[Tensor, "text d_model"],
    wanted: Float[Tensor, "text"],
    kept: Float[Tensor, "kept channel"],
    weight: float,
    ridge: float = _RIDGE,
) -> Float[Tensor, "d_model channel"]:
    """The change D of a projection whose reward changes are, to first order, as wanted on some texts and 0 on others.

    D minimises sum_i |D a_i - r_i|^2 + weight x sum_k |D a_k|^2 + ridge x size x |D|^2, where a_i are the inputs of the
    texts to change, r_i = slope_i wanted_i / |slope_i|^2 the smallest change of the output with the wanted effect, a_k
    the inputs of texts to keep, each sum divided by its number of texts, and size the mean square of the inputs.
    (MEMIT, Meng et al. 2023, for a scalar target.)
    """
    target = slopes * (wanted / slopes.square().sum(dim=1).clamp(min=1e-30))[:, None]
    seen = inputs.T @ inputs / len(inputs)
    moments = seen + weight * kept.T @ kept / len(kept)
    moments = moments + ridge * seen.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    solution: Float[Tensor, "channel d_model"] = torch.linalg.solve(moments, inputs.T @ target / len(inputs))
    return solution.T


def edit_down_projection(
    head: RewardHead,
    pairs: RepairPairs,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[float] = STEPS,
    weights: Sequence[float] = WEIGHTS,
    n_tried: int = 12,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best change of one down projection: over `layers`, sizes of the step, and weights of the strong pairs.

    The rewards of weak fit pairs whose margin is below `step` standard deviations are moved by half of a step each: up
    for the chosen, down for the rejected response. All candidates are compared by the loss that they are predicted to
    have on the development pairs, to first order; the `n_tried` best ones are run. Cost: a forward and a backward pass
    over the fit and development pairs, and a forward pass over the development pairs for each candidate that is run.
    Memory: 2 x (d_mlp + d_model) numbers per pair and layer.
    """
    tried = list(range(head.n_layers) if layers is None else layers)
    if not tried or not all(layer in range(head.n_layers) for layer in tried):
        raise OptionError(f"layers: expected layers from 0 to {head.n_layers - 1}, got {tried}.")
    if not steps or not weights or n_tried < 1:
        raise OptionError(
            f"steps, weights, n_tried: expected at least one of each, got {list(steps)}, {list(weights)} and {n_tried}."
        )
    names = (pairs.weak, pairs.strong)
    fit, development = (
        {name: projection_inputs(head, part[name], tried, progress=progress) for name in names}
        for part in (pairs.fit, pairs.development)
    )
    spread = float(torch.cat([part.margins for part in fit.values()]).std())

    def solve(layer: int, step: float, weight: float) -> Float[Tensor, "d_model channel"]:
        weak, number = fit[pairs.weak], tried.index(layer)
        move = torch.where(weak.margins < step * spread, step * spread / 2, 0.0).double()
        wanted, kept = torch.cat([move, -move]), fit[pairs.strong].inputs[number]
        return solve_projection(weak.inputs[number], weak.slopes[number], wanted, kept, weight)

    def predicted_loss(candidate: tuple[int, float, float]) -> float:
        change, number = solve(*candidate), tried.index(candidate[0])
        margins = [part.predicted_margins(number, change) for part in development.values()]
        return sum(float(-log_expit(margin.numpy()).mean()) for margin in margins)

    everything = [(layer, step, weight) for layer in tried for step in steps for weight in weights]
    # Solved again where they are run, because all solutions together need not fit into memory.
    promising = sorted(everything, key=predicted_loss)[:n_tried]
    candidates = []
    for layer, step, weight in promising:
        with added_to_projection(head, layer, solve(layer, step, weight)):
            margins = margins_of(head, pairs.development, progress=progress)
        candidates.append(Candidate({"layer": layer, "step": step, "weight": weight}, margins))
    table = compare_candidates(pairs, {name: part.margins for name, part in development.items()}, candidates)
    best = best_candidate(pairs, table)
    if best is None:
        return None, table
    added = {promising[best][0]: solve(*promising[best])}
    return Edit("down projection", head.fingerprint, head.architecture, added=added), table


@contextmanager
def added_to_projection(head: RewardModel, layer: int, change: Float[Tensor, "d_model channel"]) -> Iterator[None]:
    """Inside, the layer's down projection writes what it would with `change` added to its weight."""
    read: list[Tensor] = []

    def keep(_: int, activation: Tensor) -> None:
        read[:] = [activation]

    def put(_: int, written: Tensor) -> Tensor:
        added = read[0].double() @ change.T.to(read[0].device)
        return written + added.to(written).reshape(written.shape)

    with InstalledHooks(list(_hooks(head, [layer], keep, put)), any_tokens=True):
        yield


# -- inside ------------------------------------------------------------------------------------------------------------


def _hooks(
    model: RewardModel,
    layers: Sequence[int],
    keep: Callable[[int, Tensor], None],
    put: Callable[[int, Tensor], Tensor],
) -> Iterator[tuple[HookSite, Hook]]:
    """Hooks on what the down projections of some layers read, and on what they write."""
    for layer in layers:
        projection = model.body.projection(SITE, layer)
        yield projection.read, partial(keep, layer)
        yield projection.written, partial(put, layer)
