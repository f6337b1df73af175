"""Comparable rewards and margins of several models: centred, and on the pairs that all of them rank correctly."""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.errors import DataError
from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.evaluation._pair_rewards import PairRewards


def centred_rewards(scored: Mapping[str, PairRewards]) -> pd.DataFrame:
    """Centre the rewards of each model, so that rewards of several models can be compared.

    One row per model and pair: chosen and rejected reward minus the model's mean over all of them, and the margin. A
    Bradley-Terry reward is fixed only up to a constant per model, so uncentred rewards of two models cannot be
    compared. `spread` is the standard deviation of the model's rewards on these pairs: margins in units of it compare
    models whose rewards differ in scale. `all_correct` marks pairs that every model ranks correctly (a tie is not
    correct).

    Raises `DataError` unless all models were scored on the same pairs in the same order.

    Examples:
        >>> table = centred_rewards({"one": scored, "other": scored})
        >>> abs(float(table[["chosen", "rejected"]].mean(axis=None))) < 1e-3
        True
    """
    _require_same_pairs(scored)
    all_correct = torch.stack([rewards.correct for rewards in scored.values()]).all(dim=0)
    frames = []
    for model, rewards in scored.items():
        mean, spread = _location_and_scale(rewards)
        frames.append(
            rewards.to_frame().assign(
                model=model,
                chosen=(rewards.chosen.double() - mean).numpy(),
                rejected=(rewards.rejected.double() - mean).numpy(),
                margin=rewards.margin.double().numpy(),
                spread=float(spread),
                all_correct=all_correct.numpy(),
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    return frame[["model", *(column for column in frame.columns if column != "model")]]


def confidence(scored: Mapping[str, PairRewards], *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """How strongly each model prefers the chosen responses, on all pairs and on those that every model ranks correctly.

    One row per model, selection of pairs and quantity. `margin` is the mean margin in reward units,
    `margin_in_spreads` the mean margin divided by the standard deviation of the model's rewards on all pairs,
    `probability` the mean of 1 / (1 + exp(-margin)), the model's own probability that the chosen response is preferred
    (Bradley and Terry). Intervals are over prompts; without any pair, values are NaN and n is 0.

    Examples:
        >>> confidence({"helpful": scored, "harmless": scored, "mixed": scored}).columns.tolist()
        ['model', 'pairs', 'quantity', 'value', 'low', 'high', 'n', 'n_prompts']
    """
    _require_same_pairs(scored)
    all_correct = torch.stack([rewards.correct for rewards in scored.values()]).all(dim=0).nonzero()[:, 0].tolist()
    rows = []
    for pairs, kept in (("all", None), ("all models correct", all_correct)):
        for model, rewards in scored.items():
            _, spread = _location_and_scale(rewards)
            part = rewards if kept is None else rewards.take(kept)
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
        raise DataError("scored: expected the rewards of at least one model, got an empty dict.")
    first, *others = scored.values()
    if any(other.pairs != first.pairs for other in others):
        raise DataError(
            "scored: expected rewards of the same pairs in the same order from every model. Score all models on one "
            "data set."
        )
