"""Refit the reward row on the states that it reads (deep feature reweighting, for the Bradley-Terry loss)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.repair._choice import require_shares, require_values
from rmtension.repair._edit import Edit, reward_row
from rmtension.repair._features import ReadStates, SplitStates
from rmtension.repair._row_edits import RIDGES, best_row
from rmtension.repair._solvers import Margins, fit_newton
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Directions that no pair varies in are not moved: the metric gets this share of its mean eigenvalue everywhere.
_FLOOR = 1e-3


def refit_head(
    head: RewardHead,
    pairs: RepairPairs,
    *,
    shares: Sequence[float] = SHARES,
    ridges: Sequence[float] = RIDGES,
    states: SplitStates | None = None,
    progress: bool | None = None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The best change of the reward row, and a table of all changes that were tried, on the development pairs.

    v minimises share x loss(weak) + (1 - share) x loss(strong) + ridge v' S v on the fit pairs, where the losses are
    means of log(1 + exp(-(row + v) @ d)), d is the difference of the states that the row reads, and S is the mean of
    d d'. The edit is None if no change gains on the weak objective and spares the strong one. Cost: a forward pass over
    the fit and development pairs, unless their `states` are given.
    """
    reward_row(head)
    require_shares(shares)
    require_values("ridges", ridges)
    known = states or SplitStates.of(head, pairs, progress=progress)
    rows = [
        (
            {"share": share, "ridge": ridge},
            refit_row(known.fit[pairs.weak], known.fit[pairs.strong], share=share, ridge=ridge),
        )
        for ridge in ridges
        for share in shares
    ]
    return best_row("head refit", head, pairs, known, rows)


def refit_row(weak: ReadStates, strong: ReadStates, *, share: float, ridge: float) -> Float[Tensor, "d_model"]:
    """The v of `refit_head` for one share and ridge."""
    features = np.concatenate([weak.difference.numpy(), strong.difference.numpy()])
    offset = np.concatenate([weak.margin.numpy(), strong.margin.numpy()])
    n_weak, n_strong = len(weak.margin), len(strong.margin)
    weights = np.concatenate([np.full(n_weak, share / n_weak), np.full(n_strong, (1 - share) / n_strong)])
    metric = features.T @ features / len(features)
    metric += _FLOOR * np.trace(metric) / len(metric) * np.eye(len(metric))
    return torch.from_numpy(fit_newton(Margins(features, offset, weights), ridge, metric))
