"""The tables of an inspection: groups of pairs, neurons, and maps of every two groups."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from rmtension.evaluation import _metrics as metrics
from rmtension.evaluation._length import length_baseline
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.neurons._conflict_report import ConflictReport
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet

_MAP_COLUMNS = (
    "first", "second", "cosine", "low", "high", "random_signs_low", "random_signs_high", "random_signs_p",
    "same_neurons_low", "same_neurons_p", "support_both", "oppose_both", "first_against_second", "second_against_first",
    "n",
)  # fmt: skip


def groups_table(
    rewards: Mapping[str, PairRewards], notes: Mapping[str, str], *, level: float, seed: int
) -> pd.DataFrame:
    """One row per group and measure: accuracy, margin, the length baseline, and refusing and responding if labelled."""
    rows: list[dict[str, Any]] = []
    for name, scored in rewards.items():
        measures = {
            "accuracy": metrics.accuracy(scored, level=level, seed=seed),
            "margin": metrics.mean_margin(scored, level=level, seed=seed),
            "longer response": length_baseline(scored.pairs, level=level, seed=seed),
            **metrics.balance(scored, level=level, seed=seed),
        }
        rows += [
            {"group": name, "measure": measure, **estimate.to_dict(), "note": notes.get(name, "")}
            for measure, estimate in measures.items()
        ]
    return pd.DataFrame(rows)


def neuron_table(scores: Mapping[str, NeuronScores], sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """One row per neuron: its predicted effect on every group's margin when it is ablated, and its sets."""
    identity = next(iter(scores.values())).to_frame().drop(columns=["score", "stderr", "direction"], errors="ignore")
    columns: dict[str, Any] = {}
    for name, of_group in scores.items():
        columns[f"{name}_effect"] = of_group.as_effects().flatten().numpy()
        columns[f"{name}_stderr"] = of_group.stderr.flatten().numpy()
        columns[f"in_{name}"] = sets[name].mask.flatten().numpy()
    return pd.concat([identity, pd.DataFrame(columns)], axis=1)


def maps_table(maps: Mapping[tuple[str, str], ConflictReport]) -> pd.DataFrame:
    """One row per two groups: the cosine of their attributions, both null distributions, and counts of neurons."""
    rows = []
    for (first, second), report in maps.items():
        counts, cosine = report.counts(), report.cosine
        signs, same = report.chance["coin"], report.chance["shuffle"]
        values = (
            first, second, cosine.value, cosine.low, cosine.high, signs.low, signs.high, signs.p_value, same.low,
            same.p_value, counts["both up"], counts["both down"], counts[f"{first} up, {second} down"],
            counts[f"{first} down, {second} up"], cosine.n,
        )  # fmt: skip
        rows.append(dict(zip(_MAP_COLUMNS, values, strict=True)))
    return pd.DataFrame(rows, columns=list(_MAP_COLUMNS))
