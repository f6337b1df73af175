"""Which of several candidate edits to take, by the development pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from scipy.special import log_expit
from torch import Tensor

from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.repair._splits import RepairPairs

# The strong objective may lose this much accuracy at most, by the lower end of its interval.
MOST_LOST = 0.01
# A one-sided bound of 95% is the lower end of an interval of 90%.
_LEVEL = 0.90


@dataclass(frozen=True, eq=False)
class Candidate:
    """One edit that could be made: its settings, and the development pairs' margins with it, by objective."""

    settings: Mapping[str, Any]
    margins: Mapping[str, Float[Tensor, "pair"]]


def compare_candidates(
    pairs: RepairPairs, before: Mapping[str, Float[Tensor, "pair"]], candidates: Sequence[Candidate], *, seed: int = 0
) -> pd.DataFrame:
    """One row per candidate: its settings, and for each objective accuracy, loss, and the change with its interval.

    `<objective>_low` is the one-sided 95% bound of the change of accuracy. `allowed` says that the strong objective's
    bound is at least -1 point.
    """
    rows = []
    for candidate in candidates:
        row: dict[str, Any] = dict(candidate.settings)
        for name in (pairs.weak, pairs.strong):
            after = candidate.margins[name]
            change = correct(after) - correct(before[name])
            estimate = bootstrap_mean(change, pairs.development[name], level=_LEVEL, seed=seed)
            row |= {
                f"{name}_accuracy": float(correct(after).mean()),
                f"{name}_loss": float(-log_expit(after.numpy()).mean()),
                f"{name}_change": estimate.value,
                f"{name}_low": estimate.low,
            }
        row["allowed"] = row[f"{pairs.strong}_low"] >= -MOST_LOST
        rows.append(row)
    return pd.DataFrame(rows)


def best_candidate(pairs: RepairPairs, table: pd.DataFrame) -> int | None:
    """The row with the largest gain of the weak objective among the allowed ones whose gain is beyond chance.

    None if there is no such row: if the one-sided 95% bound of every gain is 0 or less. Equal gains are ordered by the
    loss.
    """
    gains = table[table["allowed"] & (table[f"{pairs.weak}_low"] > 0)]
    if gains.empty:
        return None
    order = gains.sort_values([f"{pairs.weak}_change", f"{pairs.weak}_loss"], ascending=[False, True], kind="stable")
    return int(order.index[0])


def correct(margins: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
    """1 for a pair in the right order, 0.5 for a tie, 0 otherwise."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()
