"""Which of several candidate edits to take, by the development pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.special import log_expit
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import Estimate, bootstrap_mean, exact_ends, resampled_sums
from rmtension.repair._splits import LEVEL, RepairPairs


@dataclass(frozen=True, eq=False)
class Candidate:
    """One edit that could be made: its settings, and the development pairs' margins with it, by objective."""

    settings: Mapping[str, Any]
    margins: Mapping[str, Float[Tensor, "pair"]]


def compare_candidates(
    pairs: RepairPairs, before: Mapping[str, Float[Tensor, "pair"]], candidates: Sequence[Candidate], *, seed: int = 0
) -> pd.DataFrame:
    """One row per candidate: its settings, and for each objective accuracy, loss, and the change with its bound.

    The bounds are lower ends of one-sided 95% intervals over prompts (`change_of_accuracy`). Those of the weak
    objective hold for all candidates together, because the best of them is taken: with labels at random, one candidate
    in many would gain by chance. `allowed` says that the strong objective's bound is at least -`pairs.most_lost`.
    """
    weak, strong = pairs.weak, pairs.strong
    changes = {
        name: torch.stack([correct(candidate.margins[name]) - correct(before[name]) for candidate in candidates])
        for name in (weak, strong)
    }
    spread = changes[weak].std(dim=1, correction=0).numpy() / len(pairs.development[weak]) ** 0.5
    part = pairs.development[strong]
    lows: dict[str, Sequence[float] | Float[np.ndarray, "candidate"]] = {
        weak: _bounds_of_all(changes[weak], pairs.development[weak], seed),
        strong: [change_of_accuracy(change, part, level=LEVEL, seed=seed).low for change in changes[strong]],
    }
    rows = []
    for number, candidate in enumerate(candidates):
        row: dict[str, Any] = dict(candidate.settings)
        for name in (weak, strong):
            after = candidate.margins[name]
            row |= {
                f"{name}_accuracy": float(correct(after).mean()),
                f"{name}_loss": float(-log_expit(after.numpy()).mean()),
                f"{name}_change": float(changes[name][number].mean()),
                f"{name}_low": float(lows[name][number]),
            }
        row |= {f"{weak}_error": float(spread[number]), "allowed": row[f"{strong}_low"] >= -pairs.most_lost}
        rows.append(row)
    return pd.DataFrame(rows)


def best_candidate(pairs: RepairPairs, table: pd.DataFrame) -> int | None:
    """The row of the candidate to take: the smallest edit among those that gain nearly as much as the best one.

    Only candidates that are `allowed` and whose gain on the weak objective is beyond chance are considered; None if
    there are none. "Nearly as much" is within one standard error of the largest gain (Breiman et al. 1984). Edits of
    equal size are ordered by the gain, then by the loss.
    """
    gains = table[table["allowed"] & (table[f"{pairs.weak}_low"] > 0)]
    if gains.empty:
        return None
    weak = f"{pairs.weak}_change"
    largest = gains.sort_values(weak, ascending=False, kind="stable").to_dict("records")[0]
    near = gains[gains[weak] >= largest[weak] - largest[f"{pairs.weak}_error"]]
    near = near.assign(numbers=near.get("numbers", 0))
    order = near.sort_values(["numbers", weak, f"{pairs.weak}_loss"], ascending=[True, False, True], kind="stable")
    return int(order.index[0])


def change_of_accuracy(
    change: Float[Tensor, "pair"], part: PreferencePairs, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean change of `correct` with its interval over prompts, which is not too narrow if few pairs change.

    If no pair is lost, the bootstrap has no losses to draw, however few pairs there are. The lower end is therefore at
    most the gains minus Clopper and Pearson's upper bound of the losses, and the upper end at least their upper bound
    of the gains minus the losses, with one trial per prompt.
    """
    estimate = bootstrap_mean(change, part, level=level, seed=seed)
    gains, losses = (float(side.clamp(min=0).mean()) for side in (change, -change))
    most_gained, most_lost = (exact_ends(share, estimate.n_prompts, level)[1] for share in (gains, losses))
    low, high = min(estimate.low, gains - most_lost), max(estimate.high, most_gained - losses)
    return replace(estimate, low=low, high=high)


def require_shares(shares: Sequence[float]) -> None:
    """Raise `OptionError` unless these are weights of the weak objective: numbers from 0 to 1."""
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise OptionError(f"shares: expected weights of the weak objective, from 0 to 1, got {list(shares)}.")


def require_values(name: str, values: Sequence[float], *, least: float | None = None, most: float = math.inf) -> None:
    """Raise `OptionError` unless `values` are one or several numbers above 0, or from `least`, up to `most`."""
    is_small = [value <= 0 if least is None else value < least for value in values]
    if not len(values) or any(is_small) or not all(value <= most for value in values):
        limits = "all above 0" if least is None else f"all from {least:g}"
        limits += "" if most == math.inf else f", up to {most:g}"
        raise OptionError(f"{name}: expected at least one number, {limits}, got {list(values)}.")


def correct(margins: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
    """1 for a pair in the right order, 0.5 for a tie, 0 otherwise."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


# -- inside ------------------------------------------------------------------------------------------------------------


def _bounds_of_all(
    changes: Float[Tensor, "candidate pair"], part: PreferencePairs, seed: int
) -> Float[np.ndarray, "candidate"]:
    """Lower bounds of the mean changes, of which all hold together in 95% of draws of the prompts.

    By the bootstrap distribution of the largest studentised deviation of any candidate (Romano and Wolf 2005).
    """
    columns = torch.cat([changes.double(), torch.ones(1, changes.shape[1], dtype=torch.float64)])
    sums = resampled_sums(columns.T, part, seed=seed)
    means = sums[:, :-1] / sums[:, -1:]
    values = changes.double().mean(dim=1).numpy()
    errors = means.std(axis=0)
    deviations = np.divide(means - values, errors, out=np.zeros_like(means), where=errors > 0)
    bounds: Float[np.ndarray, "candidate"] = values - np.quantile(deviations.max(axis=1), (1 + LEVEL) / 2) * errors
    return bounds
