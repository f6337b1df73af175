"""Edits that take directions out of the reward row: published recipes against style biases, on the same test."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._chat import n_characters
from rmtension.data._pair import PreferencePair
from rmtension.errors import DataError
from rmtension.repair._choice import Candidate, best_candidate, compare_candidates
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import ReadStates, read_states
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# A direction of fewer pairs than this says nothing; singular values below this share of the largest are noise.
_FEWEST_PAIRS, _SMALLEST = 3, 1e-6


def shape_reward(
    head: RewardHead,
    pairs: RepairPairs,
    feature: Callable[[PreferencePair], float] | None = None,
    *,
    alphas: Sequence[float] = (0.5, 1.0, 1.5),
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """Take the direction of a surface feature out of the state that the row reads: h - alpha (u @ h) u.

    `feature` is how much more of it the chosen response has than the rejected one; by default its length. u is the mean
    of h(more) - h(less) over the fit pairs of both objectives, divided by its norm. Cost: a forward pass over the fit
    and development pairs.
    """
    more_of = feature or _longer
    differences = []
    for name in (pairs.weak, pairs.strong):
        part = pairs.fit[name]
        sign = torch.tensor([more_of(pair) for pair in part], dtype=torch.float64).sign()
        differences.append(read_states(head, part, progress=progress).difference * sign[:, None])
    mean = torch.cat(differences).mean(dim=0)
    if not bool(mean.abs().max() > 0):
        raise DataError("feature: the chosen and the rejected responses of all fit pairs have equally much of it.")
    return _without_directions(head, pairs, (mean / mean.norm())[None], alphas, "reward shaping", progress)


def remove_subspace(
    head: RewardHead,
    pairs: RepairPairs,
    *,
    alphas: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """Take out of the row what it shares with the pairs that it orders wrongly: row - alpha U U' row.

    U is an orthonormal basis of one direction per subset of the weak fit pairs: the mean difference of states over the
    pairs that the model gets wrong, at least three, divided by its norm. Raises `DataError` if there are none. Cost: a
    forward pass over the weak fit pairs and the development pairs.
    """
    part = pairs.fit[pairs.weak]
    states = read_states(head, part, progress=progress)
    directions = wrong_directions(states, [pair.subset for pair in part])
    if not len(directions):
        raise DataError(
            f"pairs: no subset of the {pairs.weak} fit pairs has {_FEWEST_PAIRS} that the model orders wrongly. There "
            "is no subspace to remove."
        )
    return _without_directions(head, pairs, directions, alphas, "head subspace removed", progress)


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
    directions: Float[Tensor, "direction d_model"],
    alphas: Sequence[float],
    kind: str,
    progress: bool | None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best of some strengths at which orthonormal directions are taken out of the row."""
    linear, number = reward_row(head)
    row = linear.weight[number].detach().cpu().double()
    share = directions.T @ (directions @ row)
    held: Mapping[str, ReadStates] = {
        name: read_states(head, part, progress=progress) for name, part in pairs.development.items()
    }
    candidates = [
        Candidate(
            {"alpha": alpha}, {name: states.margin - alpha * states.difference @ share for name, states in held.items()}
        )
        for alpha in alphas
    ]
    table = compare_candidates(pairs, {name: states.margin for name, states in held.items()}, candidates)
    best = best_candidate(pairs, table)
    if best is None:
        return None, table
    return Edit(kind, head.fingerprint, head.architecture, row=-alphas[best] * share), table


def _longer(pair: PreferencePair) -> float:
    """How many more characters the chosen response has."""
    return float(n_characters(pair.chosen) - n_characters(pair.rejected))
