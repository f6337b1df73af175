"""The cost of every analysis of a study, in passes over its pairs."""

from typing import Any

import pandas as pd

from rmtension.attribution._methods import METHODS
from rmtension.passes._activation_profile import SCORES as ACTIVATION_SCORES
from rmtension.study._family_runs import MODELS, OBJECTIVES
from rmtension.study._options import StudyOptions, base_has

_RANDOM_ORDERS = 3  # of `ablation_curves`
# What an analysis reads that others read too; the first one pays for it.
_SHARED = {
    "accuracy": ("rewards",),
    "transferability": ("rewards",),
    "confidence": ("rewards",),
    "scores": ("profiles", "scores"),
    "sets": ("scores", "settings"),
    "depth": ("scores",),
    "overlap": ("scores",),
    "curves": ("scores", "means", "rewards"),
    "cross_objective": ("scores", "means", "rewards"),
    "causality": ("profiles", "scores", "means", "rewards"),
}


def study_cost(options: StudyOptions, *, has_base: bool) -> pd.DataFrame:
    """What each analysis of one family costs, in passes over all scoring or all evaluation pairs.

    One row per analysis: `forward` and `gradient` (a forward and a backward pass) count passes over the scoring pairs,
    `rewards` and `ablations` passes over the evaluation pairs. A result that several analyses read is counted in the
    first. Sets that turn out to be equal, or empty, run once or not at all, so a run can cost less.
    """
    paid: set[str] = set()
    rows = []
    for analysis in options.analyses:
        row: dict[str, Any] = {"analysis": analysis, "forward": 0.0, "gradient": 0.0, "rewards": 0.0, "ablations": 0.0}
        for shared in _SHARED[analysis]:
            for part, passes in _shared_cost(shared, options, has_base).items():
                if part not in paid:
                    paid.add(part)
                    row[_COLUMN[part]] += passes
        row["ablations"] += n_ablations(analysis, options, has_base=has_base)
        rows.append(row)
    return pd.DataFrame(rows)


def n_ablations(analysis: str, options: StudyOptions, *, has_base: bool) -> int:
    """How many times an analysis evaluates a model without a set of neurons."""
    n_scores = len(options.scores)
    if analysis == "curves":
        return len(MODELS) * len(options.curve_fractions) * (n_scores + _RANDOM_ORDERS)
    if analysis == "cross_objective":
        return len(MODELS) * n_scores
    if analysis == "causality":
        return n_sets_ablated(has_base=has_base) * (1 + 2 * options.n_draws + options.n_subsamples)
    return 0


def n_sets_ablated(*, has_base: bool) -> int:
    """The number of sets that `FamilyRuns.ablated_sets` has."""
    return 4 + has_base


# -- inside ------------------------------------------------------------------------------------------------------------

# The column that each part of a shared result is counted in.
_COLUMN = {
    "rewards": "rewards", "profiles": "forward", "means": "forward", "activations": "forward", "gradients": "gradient",
    "settings, forward": "forward", "settings, gradient": "gradient",
}  # fmt: skip


def _shared_cost(shared: str, options: StudyOptions, has_base: bool) -> dict[str, int | float]:
    """Parts of a shared result -> passes. Profiles of a model compared with its base run both models."""
    n_models = len(MODELS) + has_base
    if shared == "rewards":
        return {"rewards": len(MODELS)}
    if shared == "means":
        return {"means": len(MODELS)} if options.replacement == "mean" else {}
    profiles: dict[str, int | float] = {"profiles": n_models + len(MODELS) * has_base}
    if shared == "profiles":
        return profiles
    if shared == "settings":
        return _settings_cost(options, has_base)
    parts: dict[str, int | float] = {}
    for score in options.scores:
        if score not in METHODS or score in ACTIVATION_SCORES:
            parts |= profiles
            continue
        # Each specialist is scored on its own objective's pairs, which are about half of all.
        own = 1 / len(OBJECTIVES)
        passes = 2 * own + 1 + (has_base and base_has(score))
        kind = "gradients" if METHODS[score].runs_backward else "activations"
        parts[kind] = parts.get(kind, 0.0) + passes
        if METHODS[score].needs_replacement and options.replacement == "mean":
            parts["means"] = len(MODELS)
    return parts


def _settings_cost(options: StudyOptions, has_base: bool) -> dict[str, int | float]:
    """The passes of `stability`: the mixed model's first score at other positions, and by the other replacement."""
    score = options.scores[0]
    n_positions = len({"all", "response"} - {options.positions})
    if score not in METHODS or score in ACTIVATION_SCORES:
        return {"settings, forward": n_positions * (1 + has_base)}
    method = METHODS[score]
    n = n_positions + method.needs_replacement
    passes: dict[str, int | float] = {"settings, gradient" if method.runs_backward else "settings, forward": n}
    if method.needs_replacement and options.replacement == "zero":
        passes["settings, forward"] = passes.get("settings, forward", 0) + 1  # the means
    return passes
