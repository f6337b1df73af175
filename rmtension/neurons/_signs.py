"""What the sign of a score says about a neuron: whether it supports the margin or opposes it."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.errors import OptionError
from rmtension.store._provenance import Provenance

# The ways to rank a top set.
RANK_BY = ("magnitude", "supports", "opposes", "score")
_DIRECTIONS = pd.Index(["opposes", "neither", "supports"])


def check_rank_by(rank_by: str, sign: int | None, scores: str) -> None:
    """Raise `OptionError` unless scores of this sign can be ranked by `rank_by`; `scores` names them in the message."""
    require_choice("rank_by", rank_by, RANK_BY)
    if rank_by in ("supports", "opposes") and sign is None:
        raise OptionError(
            f"rank_by: {rank_by!r} needs scores whose sign says whether a neuron supports the margin, but the sign of "
            f"{scores} does not. Use rank_by='magnitude', or score with aggregate='signed' by a method that needs the "
            "reward, such as 'gradient_x_activation'."
        )
    if rank_by == "score" and sign == -1:
        raise OptionError(
            f"rank_by: 'score' takes the highest scores, but a neuron with a positive score of {scores} opposes the "
            "margin. Use rank_by='supports' or rank_by='opposes'."
        )


def ranked(
    values: Float[Tensor, "*rest layer neuron"], rank_by: str, provenance: Provenance
) -> Float[Tensor, "*rest layer neuron"]:
    """The values by which a top set is ranked, largest first; raises `OptionError` if `rank_by` does not apply.

    "supports": how far the neuron raises the margin; "opposes": how far it lowers it; "magnitude": |score|; "score":
    the score itself.
    """
    check_rank_by(rank_by, provenance.sign, f"{provenance.label!r}")
    if rank_by == "magnitude":
        return values.abs()
    if rank_by == "score":
        return values
    assert provenance.sign is not None
    return values * (provenance.sign if rank_by == "supports" else -provenance.sign)


def effect_sign(provenance: Provenance) -> int:
    """The factor that turns scores into predicted changes of the margin without the neuron; 1 for magnitudes."""
    return 1 if provenance.sign is None else -provenance.sign


def directions(values: Float[Tensor, "*rest"], sign: int) -> Any:
    """Whether each neuron "supports" or "opposes" the margin, or "neither" (0, NaN), as a flat `pandas.Categorical`."""
    codes = np.nan_to_num(np.sign(values.flatten().numpy() * sign)).astype(np.int8) + 1
    return pd.Categorical.from_codes(codes, categories=_DIRECTIONS)


def with_direction(frame: pd.DataFrame, values: Float[Tensor, "*rest"], provenance: Provenance) -> pd.DataFrame:
    """The frame of scores with an added column `direction`, if their sign has a meaning."""
    if provenance.sign is None:
        return frame
    return frame.assign(direction=directions(values, provenance.sign))
