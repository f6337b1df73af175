"""The best of several changes of the reward row, by the development pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension.repair._choice import Candidate, best_candidate, compare_candidates
from rmtension.repair._edit import Edit
from rmtension.repair._features import SplitStates
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# The penalties that are tried, from weak to strong.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def best_row(
    kind: str,
    head: RewardHead,
    pairs: RepairPairs,
    states: SplitStates,
    rows: Sequence[tuple[Mapping[str, Any], Float[Tensor, "d_model"]]],
) -> tuple[Edit | None, pd.DataFrame]:
    """The edit that adds the best of some rows, or None, and the table of all; each row comes with its settings.

    Nothing runs: the margins with another row follow from the states that it reads.
    """
    candidates = [Candidate(settings, states.margins_with(row)) for settings, row in rows]
    table = compare_candidates(pairs, states.margins, candidates)
    best = best_candidate(pairs, table)
    if best is None:
        return None, table
    return Edit(kind, head.fingerprint, head.architecture, row=rows[best][1]), table
