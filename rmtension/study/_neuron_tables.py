"""Tables of neurons: scores, top sets, their depth and their overlap in the models of a family."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._overlap import Overlap, depth_thirds, jaccard_intervals
from rmtension.neurons._signs import ranked
from rmtension.passes._activation_profile import SCORES as ACTIVATION_SCORES
from rmtension.study._family_runs import MODELS, FamilyRuns
from rmtension.study._options import base_has
from rmtension.study._result import Tables
from rmtension.study._stability import stability


def scores(family: FamilyRuns) -> Tables:
    """Table `neurons`: every activation score of every neuron in every model, and its sets. Analysis 4."""
    options = family.options
    identity = (
        family.scores_of(options.scores[0], "mixed")
        .to_frame()
        .drop(columns=["score", "stderr", "direction"], errors="ignore")
    )
    columns: dict[str, np.ndarray] = {}
    named = [name for name in (*ACTIVATION_SCORES, "selectivity") if name != "change" or "base" in family.runs]
    for score in dict.fromkeys([*options.scores, *named]):
        for model in family.runs:
            if model == "base" and not base_has(score):
                continue
            frame = family.scores_of(score, model).to_frame()
            columns[f"{score}_{model}"] = frame["score"].to_numpy()
            columns[f"{score}_{model}_stderr"] = frame["stderr"].to_numpy()
    for name, neurons in family.ablated_sets().items():
        columns[f"in_{name.replace(' ', '_')}"] = neurons.mask.flatten().numpy()
    return {"neurons": pd.concat([identity, pd.DataFrame(columns)], axis=1)}


def sets(family: FamilyRuns) -> Tables:
    """Table `sets`: size, score at the cut and number of ties of every model's top set by every score. Analysis 5.

    Table `stability`: how much of each of these sets comes back with other prompts, scores and settings.
    """
    rows = []
    tops = {}
    for score in family.options.scores:
        for model in family.models_with(score):
            scored = family.scores_of(score, model)
            neurons = tops[score, model] = family.top(scored)
            order = ranked(scored.values, family.options.rank_by, scored.provenance)
            cut = float(order[neurons.mask].min())
            rows.append(
                {
                    "score": score,
                    "model": model,
                    "size": len(neurons),
                    "fraction": len(neurons) / order.numel(),
                    "cut": cut,
                    "n_tied": int((order == cut).sum()),
                    "n_pairs": scored.n,
                }
            )
    return {"sets": pd.DataFrame(rows), "stability": stability(family, tops)}


def depth(family: FamilyRuns) -> Tables:
    """Table `depth`: the share of every set in the early, middle and late third of the layers. Analysis 6."""
    rows = []
    for score in family.options.scores:
        tops = {model: family.top(family.scores_of(score, model)) for model in family.models_with(score)}
        named = {**tops, **family.shared_sets(score), "all neurons": tops["mixed"] | ~tops["mixed"]}
        for name, neurons in named.items():
            rows.append({"score": score, "set": name, "size": len(neurons), **depth_thirds(neurons)})
    return {"depth": pd.DataFrame(rows)}


def overlap(family: FamilyRuns) -> Tables:
    """Table `overlap`: top sets of every two models, and of both specialists with the mixed one. Analysis 7.

    With a base, the overlap is also computed without the base's own top set. Every Jaccard index has an interval over
    prompts (`neurons.jaccard_intervals`), the value that chance gives, and an interval of the difference
    (`neurons.Overlap`).
    """
    rows: list[dict[str, Any]] = []
    for score in family.options.scores:
        scores = {model: family.scores_of(score, model) for model in MODELS}
        rows += _overlap_rows(family, score, "models", scores, family.base_scores(score))
        tops = {model: family.top(scored) for model, scored in scores.items()}
        floor = family.base_scores(score)
        for without in (None, None if floor is None else family.top(floor)):
            either = tops["helpful"] | tops["harmless"]
            measured = Overlap.of(either, tops["mixed"], exclude=without, level=family.options.level)
            row = {"score": score, "kind": "three-way", "a": "helpful or harmless", "b": "mixed"}
            rows.append(row | {"without_base": without is not None} | asdict(measured))
            if floor is None:
                break
    return {"overlap": pd.DataFrame(rows)}


def overlap_with(family: FamilyRuns, other: FamilyRuns) -> pd.DataFrame:
    """The seed ceiling: overlap of every model's top set with that of the same objective from another seed."""
    rows: list[dict[str, Any]] = []
    for score in family.options.scores:
        for model in MODELS:
            names = [f"{model} (seed {runs.family.seed})" for runs in (family, other)]
            scores = dict(zip(names, (runs.scores_of(score, model) for runs in (family, other)), strict=True))
            rows += _overlap_rows(family, score, "seeds", scores, family.base_scores(score))
    return pd.DataFrame(rows)


def _overlap_rows(
    family: FamilyRuns, score: str, kind: str, scores: Mapping[str, NeuronScores], base: NeuronScores | None
) -> list[dict[str, Any]]:
    """Compare every two top sets, with and without the base's own top set."""
    options = family.options
    sets = {name: family.top(scored) for name, scored in scores.items()}
    rows = []
    for floor in (None, *([base] if base is not None else [])):
        intervals = jaccard_intervals(
            scores,
            fraction=options.fraction,
            rank_by=options.rank_by,
            rank_within=options.rank_within,
            cut_rule=options.cut_rule,
            base=floor,
            level=options.level,
            seed=options.seed,
        )
        for (a, b), (low, high) in intervals.items():
            measured = Overlap.of(
                sets[a], sets[b], exclude=None if floor is None else family.top(floor), level=options.level
            )
            row = {"score": score, "kind": kind, "a": a, "b": b, "without_base": floor is not None}
            rows.append(row | asdict(measured) | {"jaccard_low": low, "jaccard_high": high})
    return rows
