"""What the sign of a score says of a neuron: whether it supports the margin or opposes it."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.errors import OptionError
from rmtension.store._provenance import Provenance

# What top sets are ranked by.
RANK_BY = ("magnitude", "supports", "opposes", "score")
_DIRECTIONS = pd.Index(["opposes", "neither", "supports"])


def check_rank_by(rank_by: str, sign: int | None, scores: str) -> None:
    """Raise `OptionError` unless scores of this sign can be ranked `rank_by`; `scores` names them in the message."""
    require_choice("rank_by", rank_by, RANK_BY)
    if rank_by in ("supports", "opposes") and sign is None:
        raise OptionError(
            f"rank_by: {rank_by!r} needs scores whose sign says whether a neuron supports the margin, and the sign of "
            f"{scores} does not. Use rank_by='magnitude', or score with aggregate='signed' by a method that needs the "
            "reward, such as 'gradient_x_activation'."
        )
    if rank_by == "score" and sign == -1:
        raise OptionError(
            f"rank_by: 'score' takes the highest scores, and a neuron with a positive score of {scores} opposes the "
            "margin. Use rank_by='supports' or rank_by='opposes'."
        )


def ranked(
    values: Float[Tensor, "*rest layer neuron"], rank_by: str, provenance: Provenance
) -> Float[Tensor, "*rest layer neuron"]:
    """Numbers that are larger the earlier a neuron is in a top set; raises `OptionError` where there is no such order.

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
    """What scores are multiplied by to predict the change of the margin without the neuron; 1 for magnitudes."""
    return 1 if provenance.sign is None else -provenance.sign


def directions(values: Float[Tensor, "*rest"], sign: int) -> Any:
    """What each neuron does to the margin: "supports", "opposes" or "neither" (0, NaN), a flat `pandas.Categorical`."""
    codes = np.nan_to_num(np.sign(values.flatten().numpy() * sign)).astype(np.int8) + 1
    return pd.Categorical.from_codes(codes, categories=_DIRECTIONS)


def with_direction(frame: pd.DataFrame, values: Float[Tensor, "*rest"], provenance: Provenance) -> pd.DataFrame:
    """The frame of some scores with a column `direction`, where their sign says one."""
    if provenance.sign is None:
        return frame
    return frame.assign(direction=directions(values, provenance.sign))
