"""Ablation curves: accuracy and margin as more and more neurons are ablated."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from rmtension.evaluation._metrics import QUANTITIES, accuracy, chance, mean_margin
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.study._causality import Ablations


def ablation_curves(
    ablations: Ablations,
    scores: Mapping[str, NeuronScores],
    fractions: Sequence[float],
    *,
    rank_by: str = "magnitude",
    rank_within: str = "model",
    cut_rule: str = "exact",
    clamp: bool = False,
    n_draws: int = 3,
) -> pd.DataFrame:
    """Accuracy and margin without the top fractions of neurons by each score, and in `n_draws` random orders.

    The table has one row per score, draw, fraction and objective. `drop` is 1 - accuracy / accuracy before;
    `normalised` is the accuracy above chance divided by that before (NaN if it was at chance); `clamp` keeps both
    within [0, 1]. `change` and `margin_change` have paired intervals over prompts. `rank_by`, `rank_within` and
    `cut_rule` are those of `NeuronScores.top`.

    Cost: one pass over the pairs per fraction and score, and per fraction and random order.

    Examples:
        >>> from rmtension.study import ModelRuns
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> curve = ablation_curves(ablations, {"gradient": scores}, (0.02, 0.05), n_draws=1)
        >>> rows = curve.query("score == 'gradient' and objective == 'helpful'")
        >>> rows[["fraction", "accuracy", "margin_change"]].round(2)
           fraction  accuracy  margin_change
        0      0.02       1.0          -1.12
        2      0.05       1.0          -3.17
    """
    before = ablations.rewards()
    first = next(iter(scores.values()))
    rankings = [(name, 0, ranking, rank_by) for name, ranking in scores.items()]
    for draw in range(n_draws):
        rankings.append(("random", draw, _random_scores(first, ablations.seed, draw), "magnitude"))
    rows = []
    for name, draw, ranking, order in rankings:
        exact = "exact" if name == "random" else cut_rule
        sets = [ranking.top(fraction, rank_by=order, rank_within=rank_within, cut_rule=exact) for fraction in fractions]
        ablations.prepare(sets)
        for fraction, neurons in zip(fractions, sets, strict=True):
            after = ablations.rewards(neurons)
            for objective, scored in after.items():
                row = {"score": name, "draw": draw, "fraction": fraction, "size": len(neurons), "objective": objective}
                rows.append(row | _curve_point(ablations, scored, before[objective], objective, clamp))
    return pd.DataFrame(rows)


def _curve_point(
    ablations: Ablations, after: PairRewards, before: PairRewards, objective: str, clamp: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"level": ablations.level, "seed": ablations.seed}
    now = accuracy(after, tie_value=ablations.tie_value, **options)
    was = before.accuracy(tie_value=ablations.tie_value)
    level_of_chance = float(chance(after.pairs).mean())
    changes = {
        quantity: ablations.estimate(ablations.change(after, before, quantity), objective) for quantity in QUANTITIES
    }
    drop = 1 - now.value / was if was else math.nan
    normalised = (now.value - level_of_chance) / (was - level_of_chance) if was != level_of_chance else math.nan
    if clamp:
        # np.clip keeps NaN.
        drop, normalised = (float(np.clip(value, 0, 1)) for value in (drop, normalised))
    return {
        "accuracy": now.value, "low": now.low, "high": now.high, "before": was, "drop": drop,
        "normalised": normalised, "change": changes["accuracy"].value, "change_low": changes["accuracy"].low,
        "change_high": changes["accuracy"].high, "margin": mean_margin(after, **options).value,
        "margin_change": changes["margin"].value, "margin_change_low": changes["margin"].low,
        "margin_change_high": changes["margin"].high, "n": now.n,
    }  # fmt: skip


def _random_scores(like: NeuronScores, seed: int, draw: int) -> NeuronScores:
    """A random order of a model's neurons; each random set then contains all smaller ones."""
    model = int(hashlib.sha256(like.provenance.model.encode()).hexdigest()[:8], 16)
    values = torch.from_numpy(np.random.default_rng([seed, draw, model]).random(tuple(like.stderr.shape)))
    return NeuronScores(values, torch.full_like(values, math.nan), like.provenance)
