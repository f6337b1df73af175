"""Edits that take directions out of the reward row: published recipes against style biases, on the same test."""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pair import PreferencePair
from rmtension.errors import DataError
from rmtension.repair._choice import require_values
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import ReadStates, SplitStates
from rmtension.repair._medians import response_length
from rmtension.repair._row_edits import best_row
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# A direction of fewer pairs than this says nothing; singular values below this share of the largest are noise.
_FEWEST_PAIRS, _SMALLEST = 3, 1e-6


def shape_reward(
    head: RewardHead,
    pairs: RepairPairs,
    feature: Callable[[PreferencePair, str], float] | None = None,
    *,
    alphas: Sequence[float] = (0.5, 1.0, 1.5),
    states: SplitStates | None = None,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """Take the direction of a surface feature out of the state that the row reads: h - alpha (u @ h) u.

    `feature` is a number for a response, `feature(pair, "chosen")`; by default its length. u is the mean of
    h(more) - h(less) over the fit pairs of both objectives, divided by its norm. Cost: a forward pass over the fit and
    development pairs, unless their `states` are given.
    """
    require_values("alphas", alphas)
    measured = feature or response_length
    known = states or SplitStates.of(head, pairs, progress=progress)
    differences = []
    for name, of_part in known.fit.items():
        sign = torch.tensor(
            [measured(pair, "chosen") - measured(pair, "rejected") for pair in pairs.fit[name]], dtype=torch.float64
        ).sign()
        differences.append(of_part.difference * sign[:, None])
    mean = torch.cat(differences).mean(dim=0)
    if not bool(mean.abs().max() > 0):
        raise DataError("feature: both responses of every fit pair have equally much of it. Pass another feature.")
    return _without_directions(head, pairs, known, (mean / mean.norm())[None], alphas, "reward shaping")


def remove_subspace(
    head: RewardHead,
    pairs: RepairPairs,
    *,
    alphas: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
    states: SplitStates | None = None,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """Remove from the row its components along the errors of the weak pairs: row - alpha U U' row.

    U is an orthonormal basis of one direction per subset of the weak fit pairs: the mean difference of states over the
    pairs that the model gets wrong, at least three, divided by its norm. Raises `DataError` if there are none. Cost: a
    forward pass over the fit and development pairs, unless their `states` are given.
    """
    require_values("alphas", alphas)
    known = states or SplitStates.of(head, pairs, progress=progress)
    directions = wrong_directions(known.fit[pairs.weak], [pair.subset for pair in pairs.fit[pairs.weak]])
    if not len(directions):
        raise DataError(
            f"pairs: no subset of the {pairs.weak} fit pairs has {_FEWEST_PAIRS} that the model orders wrongly. There "
            "is no subspace to remove."
        )
    return _without_directions(head, pairs, known, directions, alphas, "head subspace removed")


def wrong_directions(states: ReadStates, subsets: Sequence[object]) -> Float[Tensor, "direction d_model"]:
    """An orthonormal basis of the unit mean differences of wrongly ordered pairs, by subset."""
    wrong = states.margin < 0
    means = []
    for subset in dict.fromkeys(subsets):
        rows = wrong & torch.tensor([other == subset for other in subsets])
        if int(rows.sum()) >= _FEWEST_PAIRS:
            mean = states.difference[rows].mean(dim=0)
            means.append(mean / mean.norm())
    if not means:
        return torch.zeros(0, states.difference.shape[1], dtype=torch.float64)
    _, sizes, basis = torch.linalg.svd(torch.stack(means), full_matrices=False)
    kept: Float[Tensor, "direction d_model"] = basis[sizes > _SMALLEST * sizes[0]]
    return kept


# -- inside ------------------------------------------------------------------------------------------------------------


def _without_directions(
    head: RewardHead,
    pairs: RepairPairs,
    states: SplitStates,
    directions: Float[Tensor, "direction d_model"],
    alphas: Sequence[float],
    kind: str,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best of some strengths at which orthonormal directions are taken out of the row."""
    linear, number = reward_row(head)
    row = linear.weight[number].detach().cpu().double()
    share = directions.T @ (directions @ row)
    rows = [({"alpha": alpha}, -alpha * share) for alpha in alphas]
    return best_row(kind, head, pairs, states, rows)
