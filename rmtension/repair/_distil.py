"""Distil the ensemble of two specialists into the reward row, in closed form."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.repair._ceiling import SpecialistEnsemble
from rmtension.repair._choice import require_values
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import SplitStates
from rmtension.repair._row_edits import RIDGES, best_row
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead


def distil_ensemble(
    head: RewardHead,
    pairs: RepairPairs,
    specialists: Mapping[str, RewardHead],
    *,
    ridges: Sequence[float] = RIDGES,
    states: SplitStates | None = None,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The change of the reward row whose margins are nearest to those of the specialists' ensemble, and a table of all.

    The ensemble's margins are scaled to the size of the model's own on the fit pairs. Cost: a forward pass of the model
    and of both specialists over the fit pairs, and of the model over the development pairs; none of the model if its
    `states` are given.
    """
    reward_row(head)
    require_values("ridges", ridges)
    ensemble = SpecialistEnsemble(specialists, pairs, progress=progress)
    known = states or SplitStates.of(head, pairs, progress=progress)
    own = torch.cat([part.margin for part in known.fit.values()])
    wanted = torch.cat([ensemble.margins(pairs.fit[name]) for name in known.fit])
    wanted = wanted * (own.square().mean() / wanted.square().mean()).sqrt()
    features = torch.cat([part.difference for part in known.fit.values()])
    rows = [({"ridge": ridge}, distilled_row(features, wanted - own, ridge)) for ridge in ridges]
    return best_row("distilled ensemble", head, pairs, known, rows)


def distilled_row(
    features: Float[Tensor, "pair d_model"], change: Float[Tensor, "pair"], ridge: float
) -> Float[Tensor, "d_model"]:
    """The v that minimises the mean of (features @ v - change)^2 + ridge x size x |v|^2.

    `size` is the mean square of the features.
    """
    moments = features.T @ features / len(features)
    size = moments.diagonal().mean()
    solution: Float[Tensor, "d_model"] = torch.linalg.solve(
        moments + ridge * size * torch.eye(len(moments), dtype=moments.dtype), features.T @ change / len(features)
    )
    return solution
