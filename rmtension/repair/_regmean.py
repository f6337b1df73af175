"""Merge two specialists into one set of weights, in closed form (RegMean, Jin et al. 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtension.bodies._native_weights import plain_copy
from rmtension.errors import OptionError
from rmtension.models._classifiers import current_checkpoint
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates, require_values
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import margins_of, read_states
from rmtension.repair._input_moments import input_moments, linear_maps, matrix_of
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# What off-diagonals of the moments are multiplied by; the paper mostly uses 0.9.
SHRINK = (0.5, 0.9, 1.0)
# Directions that no input has get the mean of the weights.
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Specialist:
    """A model to merge: its base, the moments of its maps' inputs, and its row with the moment of what that reads."""

    base: nn.Module
    moments: Mapping[str, Float[Tensor, "input input"]]
    row: Float[Tensor, "d_model"]
    row_moment: Float[Tensor, "d_model d_model"]

    @classmethod
    def read(cls, model: RewardHead, pairs: RepairPairs, objective: str, *, progress: bool | None) -> "Specialist":
        """Run the fit pairs: those of its objective for moments, all of them for the size of its margins."""
        base = _base(model)
        part = pairs.fit[objective]
        states = {name: read_states(model, some, progress=progress) for name, some in pairs.fit.items()}
        spread = torch.cat([of_objective.margin for of_objective in states.values()]).std()
        moments = input_moments(model, part, list(linear_maps(base)), progress=progress)
        linear, number = reward_row(model)
        # Only differences of states reach a margin.
        d = states[objective].difference
        return cls(base, moments, linear.weight[number].detach().cpu().double() / spread, d.T @ d / len(d))


def merge_specialists(
    head: RewardHead,
    pairs: RepairPairs,
    specialists: Mapping[str, RewardHead],
    *,
    shrink: Sequence[float] = SHRINK,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best merge of a specialist for each objective, as an edit of `head`, and a table with a row per `shrink`.

    Every linear map becomes the W that comes nearest to what each specialist's map writes for its own inputs, on the
    fit pairs of its objective; biases, norms and embeddings are averaged. The reward row is merged in the same way,
    after it was divided by the standard deviation of its margins, and then scaled so that the margins of the fit pairs
    are as large as those of `head` (root mean square). The bias of the reward stays: no margin depends on it.

    Cost: two forward passes of each specialist over fit pairs, of which one is over its own objective's only and keeps
    inputs^2 x 8 bytes per map; a pass of `head` over the fit and development pairs; and for each `shrink`, a copy of
    the model, and a forward pass over the fit and development pairs. Raises `OptionError` for specialists of other
    objectives or of another architecture.
    """
    require_values("shrink", shrink, least=0.0, most=1.0)
    _require_same(head, pairs, specialists)
    row, number = reward_row(head)
    own_row = row.weight[number].detach().cpu().double()
    own = dict(_base(head).named_parameters())
    read = [Specialist.read(specialists[name], pairs, name, progress=progress) for name in (pairs.weak, pairs.strong)]
    wanted = _size(margins_of(head, pairs.fit, progress=progress))

    def merged(value: float, scale: float) -> Edit:
        weights = merged_parameters(read, value)
        changes = {name: weights[name] - parameter.detach().cpu().double() for name, parameter in own.items()}
        new_row = merged_map([part.row[None] for part in read], [part.row_moment for part in read], value)[0]
        return Edit(
            "merged specialists",
            head.fingerprint,
            head.architecture,
            row=scale * new_row - own_row,
            parameters={name: change.to(head.reward_dtype) for name, change in changes.items() if change.any()},
        )

    candidates, scales = [], []
    for value in shrink:
        model = merged(value, 1.0).apply(head)
        scales.append(wanted / _size(margins_of(model, pairs.fit, progress=progress)))
        margins = margins_of(model, pairs.development, progress=progress)
        candidates.append(Candidate({"shrink": value}, {name: scales[-1] * part for name, part in margins.items()}))
    table = compare_candidates(pairs, margins_of(head, pairs.development, progress=progress), candidates)
    best = best_candidate(pairs, table)
    # Merged again, because several sets of all weights need not fit into memory.
    return None if best is None else merged(shrink[best], scales[best]), table


def merged_map(
    weights: Sequence[Float[Tensor, "output input"]],
    moments: Sequence[Float[Tensor, "input input"]],
    shrink: float,
    ridge: float = _RIDGE,
) -> Float[Tensor, "output input"]:
    """The W that minimises sum_i tr((W - W_i) S_i (W - W_i)'), in float64.

    S_i is the moment C_i with its off-diagonals multiplied by `shrink`, plus ridge x the mean of all diagonals on the
    diagonal. With shrink 1 and no ridge, that is the sum over models of the mean over tokens of |W x - W_i x|^2.
    """
    # One size for all models, so that directions without inputs get the mean of the weights.
    size = ridge * torch.stack([moment.diagonal().mean() for moment in moments]).mean().clamp(min=1e-30)
    metrics = [shrink * moment + torch.diag((1 - shrink) * moment.diagonal() + size) for moment in moments]
    mean = torch.stack([weight.double() for weight in weights]).mean(dim=0)
    # As a change of the mean, so that equal weights are merged without rounding.
    pulls = torch.stack([(weight - mean) @ metric for weight, metric in zip(weights, metrics, strict=True)]).sum(dim=0)
    moved: Tensor = torch.linalg.solve(torch.stack(metrics).sum(dim=0), pulls.T).T
    return mean + moved


def merged_parameters(specialists: Sequence[Specialist], shrink: float) -> dict[str, Float[Tensor, "..."]]:
    """Every parameter of the merged base, in float64: maps by `merged_map`, all others averaged."""
    parameters = [dict(specialist.base.named_parameters()) for specialist in specialists]
    merged = {
        name: torch.stack([of_one[name].detach().cpu().double() for of_one in parameters]).mean(dim=0)
        for name in parameters[0]
    }
    for name, module in linear_maps(specialists[0].base).items():
        matrices: list[Any] = [matrix_of(part.base.get_submodule(name)).detach().cpu().double() for part in specialists]
        weight = merged_map(matrices, [part.moments[name] for part in specialists], shrink)
        merged[f"{name}.weight"] = weight if isinstance(module, nn.Linear) else weight.T
    return merged


# -- inside ------------------------------------------------------------------------------------------------------------


def _base(model: RewardHead) -> nn.Module:
    return plain_copy(current_checkpoint(model, "merge_specialists")[1])


def _size(groups: Mapping[str, Float[Tensor, "pair"]]) -> float:
    """The root mean square of all margins."""
    return float(torch.cat(list(groups.values())).square().mean().sqrt())


def _require_same(head: RewardHead, pairs: RepairPairs, specialists: Mapping[str, RewardHead]) -> None:
    if set(specialists) != {pairs.weak, pairs.strong}:
        raise OptionError(
            f"specialists: expected a model for {pairs.weak!r} and one for {pairs.strong!r}, got {sorted(specialists)}."
        )
    expected = {name: parameter.shape for name, parameter in _base(head).named_parameters()}
    for name, specialist in specialists.items():
        shapes = {key: parameter.shape for key, parameter in _base(specialist).named_parameters()}
        other = next((key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key)), None)
        if specialist.architecture != head.architecture or other is not None:
            raise OptionError(
                f"specialists: expected weights of the shapes of {head.architecture}, but {name!r} is "
                f"{specialist.architecture}{'' if other is None else f' and differs in {other}'}. Train the "
                "specialists from the same base, or use 'distilled ensemble', which needs their rewards only."
            )
