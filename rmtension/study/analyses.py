"""The ten analyses of a family of reward models: each takes a `FamilyRuns` and returns tables by name.

Examples:
    >>> from rmtension.study import FamilyRuns, ModelFamily
    >>> halves = {name: part.split(0.5) for name, part in pairs.items()}
    >>> scoring, evaluating = ({name: half[i] for name, half in halves.items()} for i in (0, 1))
    >>> family = FamilyRuns(ModelFamily(head, head, head), scoring, evaluating)
    >>> list(accuracy(family))
    ['accuracy', 'subsets', 'comparisons']
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from rmtension.errors import DataError
from rmtension.evaluation import _metrics as evaluation
from rmtension.evaluation._centred_margins import centred_rewards
from rmtension.evaluation._centred_margins import confidence as confidence_table
from rmtension.evaluation._intervals import Estimate, adjusted_p_values
from rmtension.evaluation._length import length_baseline, length_matched_places
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.evaluation._transfer import transferability as transferability_of
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._overlap import Overlap, depth_thirds, jaccard_intervals
from rmtension.neurons._signs import ranked
from rmtension.passes._activation_profile import SCORES as ACTIVATION_SCORES
from rmtension.study._causality import ablation_matrix, equal_size_effects
from rmtension.study._collapse_and_drift import collapse, drift, effects_by_subset, split_drift
from rmtension.study._curves import ablation_curves
from rmtension.study._family_runs import MODELS, OBJECTIVES, FamilyRuns
from rmtension.study._options import base_has

__all__ = [
    "accuracy",
    "causality",
    "confidence",
    "cross_objective",
    "curves",
    "depth",
    "overlap",
    "scores",
    "sets",
    "transferability",
]

Tables = dict[str, pd.DataFrame]


# -- behaviour ---------------------------------------------------------------------------------------------------------


def accuracy(family: FamilyRuns) -> Tables:
    """Tables `accuracy`, `subsets` and `comparisons` (the mixed model minus each specialist). Analysis 1."""
    rows: list[dict[str, Any]] = []
    subsets, comparisons = [], []
    for objective, pairs in family.evaluating.items():
        for model in MODELS:
            scored = family.rewards(model, objective)
            for measure, estimate in _measures(family, scored).items():
                rows.append({"model": model, "objective": objective, "measure": measure, **estimate.to_dict()})
            frame = evaluation.by_subset(scored, **family.judging)
            subsets.append(frame.assign(model=model, objective=objective))
        baseline = length_baseline(pairs, level=family.options.level, seed=family.options.seed)
        rows.append({"model": "length only", "objective": objective, "measure": "accuracy", **baseline.to_dict()})
        for other in OBJECTIVES:
            comparisons.append(_compared(family, "mixed", other, objective))
    compared = pd.concat(comparisons, ignore_index=True)
    # One family of tests: every subset of both objectives against both specialists. Their unions are not adjusted.
    compared["q_value"] = adjusted_p_values(compared["p_value"].where(compared["subset"] != "all").tolist())
    by_subset = pd.concat(subsets, ignore_index=True)
    first = ["model", "objective", "subset"]
    by_subset = by_subset[[*first, *(column for column in by_subset if column not in first)]]
    return {"accuracy": pd.DataFrame(rows), "subsets": by_subset, "comparisons": compared}


def transferability(family: FamilyRuns) -> Tables:
    """Table `transferability`: T, the mixed model's accuracy, their difference, the Jaccard indices. Analysis 2."""
    rows = []
    for objective in OBJECTIVES:
        mixed, helpful, harmless = (family.rewards(name, objective) for name in ("mixed", *OBJECTIVES))
        transfer = transferability_of(mixed, helpful, harmless, level=family.options.level, seed=family.options.seed)
        named = {
            "transferability": transfer.value,
            "accuracy": transfer.accuracy,
            "beyond accuracy": transfer.beyond_accuracy,
            "jaccard helpful": transfer.jaccard_helpful,
            "jaccard harmless": transfer.jaccard_harmless,
        }
        for quantity, estimate in named.items():
            row = {"objective": objective, "quantity": quantity, **estimate.to_dict(), "n_union": transfer.n_union}
            rows.append(row)
    return {"transferability": pd.DataFrame(rows)}


def confidence(family: FamilyRuns) -> Tables:
    """Tables `confidence` and `rewards` (every pair's centred rewards). Analysis 3."""
    summaries, rewards = [], []
    for objective in OBJECTIVES:
        scored = {model: family.rewards(model, objective) for model in MODELS}
        frame = confidence_table(scored, level=family.options.level, seed=family.options.seed)
        frame.insert(1, "objective", objective)
        summaries.append(frame)
        rewards.append(centred_rewards(scored).assign(objective=objective))
    return {
        "confidence": pd.concat(summaries, ignore_index=True),
        "rewards": pd.concat(rewards, ignore_index=True),
    }


# -- neurons -----------------------------------------------------------------------------------------------------------


def scores(family: FamilyRuns) -> Tables:
    """Table `neurons`: every activation score of every neuron in every model, and its sets. Analysis 4."""
    options = family.options
    place = family.scores_of(options.scores[0], "mixed").to_frame()[["layer", "neuron"]]
    columns: dict[str, np.ndarray] = {}
    named = [name for name in (*ACTIVATION_SCORES, "selectivity") if name != "change" or "base" in family.runs]
    for score in dict.fromkeys([*options.scores, *named]):
        for model in family.runs:
            if model == "base" and not base_has(score):
                continue
            found = family.scores_of(score, model).to_frame()
            columns[f"{score}_{model}"] = found["score"].to_numpy()
            columns[f"{score}_{model}_stderr"] = found["stderr"].to_numpy()
    for name, neurons in family.ablated_sets().items():
        columns[f"in_{name.replace(' ', '_')}"] = neurons.mask.flatten().numpy()
    return {"neurons": pd.concat([place, pd.DataFrame(columns)], axis=1)}


def sets(family: FamilyRuns) -> Tables:
    """Table `sets`: size, score at the cut and number of ties of every model's top set by every score. Analysis 5."""
    rows = []
    for score in family.options.scores:
        for model in family.models_with(score):
            found = family.scores_of(score, model)
            neurons = family.top(found)
            order = ranked(found.values, family.options.rank_by, found.provenance)
            cut = float(order[neurons.mask].min())
            rows.append(
                {
                    "score": score,
                    "model": model,
                    "size": len(neurons),
                    "fraction": len(neurons) / order.numel(),
                    "cut": cut,
                    "n_tied": int((order == cut).sum()),
                    "n_pairs": found.n,
                }
            )
    return {"sets": pd.DataFrame(rows)}


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
        tops = {model: family.top(one) for model, one in scores.items()}
        floor = family.base_scores(score)
        for without in (None, None if floor is None else family.top(floor)):
            either = tops["helpful"] | tops["harmless"]
            found = Overlap.of(either, tops["mixed"], exclude=without, level=family.options.level)
            row = {"score": score, "kind": "three-way", "a": "helpful or harmless", "b": "mixed"}
            rows.append(row | {"without_base": without is not None} | asdict(found))
            if floor is None:
                break
    return {"overlap": pd.DataFrame(rows)}


def overlap_with(family: FamilyRuns, other: FamilyRuns) -> pd.DataFrame:
    """The seed ceiling: overlap of every model's top set with that of the same objective from another seed."""
    rows: list[dict[str, Any]] = []
    for score in family.options.scores:
        for model in MODELS:
            names = [f"{model} (seed {one.family.seed})" for one in (family, other)]
            scores = dict(zip(names, (one.scores_of(score, model) for one in (family, other)), strict=True))
            rows += _overlap_rows(family, score, "seeds", scores, family.base_scores(score))
    return pd.DataFrame(rows)


# -- causes ------------------------------------------------------------------------------------------------------------


def curves(family: FamilyRuns) -> Tables:
    """Table `curves`: each model with more and more of its own top neurons ablated, by every score. Analysis 8."""
    options = family.options
    frames = []
    for model in MODELS:
        frame = ablation_curves(
            family.ablations(model),
            {score: family.scores_of(score, model) for score in options.scores},
            options.curve_fractions,
            rank_by=options.rank_by,
            rank_within=options.rank_within,
            cut_rule=options.cut_rule,
            clamp=options.clamp,
        )
        frame.insert(0, "model", model)
        frames.append(frame)
    return {"curves": pd.concat(frames, ignore_index=True)}


def cross_objective(family: FamilyRuns) -> Tables:
    """Tables `cross_objective` (each model without its own top set, on every subset) and `drift`. Analysis 9."""
    effects, drifts = [], []
    for model in MODELS:
        ablations = family.ablations(model)
        for score in family.options.scores:
            neurons = family.top(family.scores_of(score, model))
            found = effects_by_subset(ablations, neurons)
            effects.append(found.assign(model=model, score=score))
            drifts.append({"model": model, "score": score, **drift(found), **split_drift(ablations, neurons)})
    frame = pd.concat(effects, ignore_index=True)
    first = ["model", "score"]
    return {
        "cross_objective": frame[[*first, *(column for column in frame if column not in first)]],
        "drift": pd.DataFrame(drifts),
    }


def causality(family: FamilyRuns) -> Tables:
    """Tables of the mixed model without each set: effects, effects at equal size, what is left, and T. Analysis 10."""
    options = family.options
    ablations = family.ablations("mixed")
    sets = family.ablated_sets()
    tops = [family.top(family.scores_of(options.scores[0], name)) for name in OBJECTIVES]
    return {
        "ablation": ablation_matrix(
            ablations,
            sets,
            n_draws=options.n_draws,
            exclude=tops[0] | tops[1],
            magnitude=family.scores_of("abs_mean", "mixed").values,
        ),
        "equal_size": equal_size_effects(ablations, sets, against="shared", n_subsamples=options.n_subsamples),
        "collapse": collapse(ablations, sets),
        "ablated_transferability": _ablated_transferability(family, sets),
    }


# In the paper's order; `StudyOptions.analyses` selects them by name.
ANALYSES: dict[str, Callable[[FamilyRuns], Tables]] = {
    one.__name__: one
    for one in (
        accuracy,
        transferability,
        confidence,
        scores,
        sets,
        depth,
        overlap,
        curves,
        cross_objective,
        causality,
    )
}


def _measures(family: FamilyRuns, scored: PairRewards) -> dict[str, Estimate]:
    options = family.options
    found = {
        "accuracy": evaluation.accuracy(scored, **family.judging),
        **evaluation.balance(scored, refuse=options.refuse, respond=options.respond, **family.judging),
    }
    if len(scored.pairs.subsets) > 1:
        found["accuracy, mean of subsets"] = evaluation.macro_accuracy(scored, **family.judging)
    matched = _length_matched(scored)
    if matched is not None:
        found["accuracy, length matched"] = evaluation.accuracy(matched, **family.judging)
    found["margin"] = evaluation.mean_margin(scored, level=options.level, seed=options.seed)
    return found


def _compared(family: FamilyRuns, first: str, second: str, objective: str) -> pd.DataFrame:
    """Paired differences of two models on one objective: on all its pairs, and on every subset."""
    one, other = family.rewards(first, objective), family.rewards(second, objective)
    whole = evaluation.comparison_row(evaluation.compare(one, other, **family.judging))
    frame = evaluation.compare_by_subset(one, other, **family.judging).drop(columns="q_value")
    frame = pd.concat([pd.DataFrame([{"subset": "all", **whole}]), frame], ignore_index=True)
    frame.insert(0, "objective", objective)
    frame.insert(0, "second", second)
    frame.insert(0, "first", first)
    return frame


def _ablated_transferability(family: FamilyRuns, sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Transferability of the mixed model, whole and without each set, with its difference from accuracy."""
    ablations = family.ablations("mixed")
    rows = []
    for name, neurons in ({"nothing": None} | dict(sets)).items():
        for objective, mixed in ablations.rewards(neurons).items():
            helpful, harmless = (family.rewards(one, objective) for one in OBJECTIVES)
            level, seed = family.options.level, family.options.seed
            found = transferability_of(mixed, helpful, harmless, level=level, seed=seed)
            for quantity, one in (("transferability", found.value), ("beyond accuracy", found.beyond_accuracy)):
                size = 0 if neurons is None else len(neurons)
                row = {"set": name, "size": size, "objective": objective, "quantity": quantity}
                rows.append({**row, **one.to_dict(), "n_union": found.n_union})
    return pd.DataFrame(rows)


def _overlap_rows(
    family: FamilyRuns, score: str, kind: str, scores: Mapping[str, NeuronScores], base: NeuronScores | None
) -> list[dict[str, Any]]:
    """Compare every two top sets, with and without the base's own top set."""
    options = family.options
    sets = {name: family.top(one) for name, one in scores.items()}
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
            found = Overlap.of(
                sets[a], sets[b], exclude=None if floor is None else family.top(floor), level=options.level
            )
            row = {"score": score, "kind": kind, "a": a, "b": b, "without_base": floor is not None}
            rows.append(row | asdict(found) | {"jaccard_low": low, "jaccard_high": high})
    return rows


def _length_matched(scored: PairRewards) -> PairRewards | None:
    """The rewards of the pairs matched in length; None if no pair is left, or if items have no single length."""
    try:
        return scored.take(length_matched_places(scored.pairs))
    except DataError:
        return None
