"""Rewards and margins of several models made comparable: centred, and on the items that all of them rank correctly."""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.errors import DataError
from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.evaluation._pair_rewards import PairRewards


def centred_rewards(scored: Mapping[str, PairRewards]) -> pd.DataFrame:
    """One row per model and pair: chosen and rejected reward minus the model's mean over all of them, and the margin.

    A Bradley-Terry reward is fixed only up to a constant per model, so uncentred rewards of two models say nothing
    beside each other. `spread` is the standard deviation of the model's rewards here: margins in units of it compare
    models whose rewards differ in scale. `all_correct` marks pairs that every model ranks correctly (strictly).

    Examples:
        >>> table = centred_rewards({"one": scored, "other": scored})
        >>> abs(float(table[["chosen", "rejected"]].mean(axis=None))) < 1e-3
        True
    """
    _require_same_pairs(scored)
    everyone = torch.stack([one.correct for one in scored.values()]).all(dim=0)
    frames = []
    for model, one in scored.items():
        mean, spread = _location_and_scale(one)
        frames.append(
            one.to_frame().assign(
                model=model,
                chosen=(one.chosen.double() - mean).numpy(),
                rejected=(one.rejected.double() - mean).numpy(),
                margin=one.margin.double().numpy(),
                spread=float(spread),
                all_correct=everyone.numpy(),
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    return frame[["model", *(column for column in frame.columns if column != "model")]]


def confidence(scored: Mapping[str, PairRewards], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """One row per model and quantity, on the pairs that every model ranks correctly and on all pairs.

    `margin` is the mean margin in reward units, `margin_in_spreads` the same over the standard deviation of the
    model's rewards on all pairs, `probability` the mean of 1 / (1 + exp(-margin)), the model's own probability that the
    chosen response is preferred (Bradley and Terry). Intervals over prompts; NaN and n = 0 where no pair is left.

    Examples:
        >>> confidence({"helpful": scored, "harmless": scored, "mixed": scored}).columns.tolist()
        ['model', 'pairs', 'quantity', 'value', 'low', 'high', 'n', 'n_prompts']
    """
    _require_same_pairs(scored)
    everyone = torch.stack([one.correct for one in scored.values()]).all(dim=0).nonzero()[:, 0].tolist()
    rows = []
    for pairs, kept in (("all", None), ("all models correct", everyone)):
        for model, one in scored.items():
            _, spread = _location_and_scale(one)
            part = one if kept is None else one.take(kept)
            margin = part.margin.double()
            quantities = {
                "margin": margin,
                "margin_in_spreads": margin / spread,
                "probability": torch.sigmoid(margin),
            }
            for quantity, values in quantities.items():
                row: dict[str, object] = {"model": model, "pairs": pairs, "quantity": quantity}
                if len(part):
                    row |= bootstrap_mean(values, part.pairs, level=level, seed=seed).to_dict()
                else:
                    row |= {"value": torch.nan, "low": torch.nan, "high": torch.nan, "n": 0, "n_prompts": 0}
                rows.append(row)
    return pd.DataFrame(rows)[["model", "pairs", "quantity", "value", "low", "high", "n", "n_prompts"]]


def _location_and_scale(scored: PairRewards) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    rewards = torch.cat([scored.chosen, scored.rejected]).double()
    return rewards.mean(), rewards.std()


def _require_same_pairs(scored: Mapping[str, PairRewards]) -> None:
    if not scored:
        raise DataError("scored: expected the rewards of at least one model, got none.")
    first, *others = scored.values()
    if any(other.pairs != first.pairs for other in others):
        raise DataError("scored: expected rewards of the same pairs in the same order from every model.")
