"""Tables of behaviour: accuracy, transferability and confidence of the models of a family."""

from typing import Any

import pandas as pd

from rmtension.errors import DataError
from rmtension.evaluation import _metrics as evaluation
from rmtension.evaluation._centred_margins import centred_rewards
from rmtension.evaluation._centred_margins import confidence as confidence_table
from rmtension.evaluation._intervals import Estimate, adjusted_p_values
from rmtension.evaluation._length import length_baseline, length_matched_places
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.evaluation._transfer import transferability as transferability_of
from rmtension.study._family_runs import MODELS, OBJECTIVES, FamilyRuns
from rmtension.study._result import Tables


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
    # One family of tests: every subset of both objectives against both specialists. Rows "all" are not adjusted.
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


def _measures(family: FamilyRuns, scored: PairRewards) -> dict[str, Estimate]:
    options = family.options
    measures = {
        "accuracy": evaluation.accuracy(scored, **family.judging),
        **evaluation.balance(scored, refuse=options.refuse, respond=options.respond, **family.judging),
    }
    if len(scored.pairs.subsets) > 1:
        measures["accuracy, mean of subsets"] = evaluation.macro_accuracy(scored, **family.judging)
    matched = _length_matched(scored)
    if matched is not None:
        measures["accuracy, length matched"] = evaluation.accuracy(matched, **family.judging)
    measures["margin"] = evaluation.mean_margin(scored, level=options.level, seed=options.seed)
    return measures


def _compared(family: FamilyRuns, first: str, second: str, objective: str) -> pd.DataFrame:
    """Paired differences of two models on one objective: on all its pairs, and on every subset."""
    rewards = family.rewards(first, objective), family.rewards(second, objective)
    whole = evaluation.comparison_row(evaluation.compare(*rewards, **family.judging))
    frame = evaluation.compare_by_subset(*rewards, **family.judging).drop(columns="q_value")
    frame = pd.concat([pd.DataFrame([{"subset": "all", **whole}]), frame], ignore_index=True)
    frame.insert(0, "objective", objective)
    frame.insert(0, "second", second)
    frame.insert(0, "first", first)
    return frame


def _length_matched(scored: PairRewards) -> PairRewards | None:
    """The rewards of the pairs matched in length; None if no pair is left, or if items have no single length."""
    try:
        return scored.take(length_matched_places(scored.pairs))
    except DataError:
        return None
