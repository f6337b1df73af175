"""Tables of ablations: curves, effects across objectives, and the effects of each set on the mixed model."""

from collections.abc import Mapping

import pandas as pd

from rmtension.evaluation._transfer import transferability
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.study._causality import ablation_matrix, equal_size_effects
from rmtension.study._collapse_and_drift import collapse, drift, effects_by_subset, split_drift
from rmtension.study._curves import ablation_curves
from rmtension.study._family_runs import MODELS, OBJECTIVES, FamilyRuns
from rmtension.study._result import Tables


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
            by_subset = effects_by_subset(ablations, neurons)
            effects.append(by_subset.assign(model=model, score=score))
            drifts.append({"model": model, "score": score, **drift(by_subset), **split_drift(ablations, neurons)})
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


def _ablated_transferability(family: FamilyRuns, sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Transferability of the mixed model, whole and without each set, with its difference from accuracy."""
    ablations = family.ablations("mixed")
    rows = []
    for name, neurons in ({"nothing": None} | dict(sets)).items():
        for objective, mixed in ablations.rewards(neurons).items():
            helpful, harmless = (family.rewards(specialist, objective) for specialist in OBJECTIVES)
            level, seed = family.options.level, family.options.seed
            transfer = transferability(mixed, helpful, harmless, level=level, seed=seed)
            for quantity, estimate in (
                ("transferability", transfer.value),
                ("beyond accuracy", transfer.beyond_accuracy),
            ):
                size = 0 if neurons is None else len(neurons)
                row = {"set": name, "size": size, "objective": objective, "quantity": quantity}
                rows.append({**row, **estimate.to_dict(), "n_union": transfer.n_union})
    return pd.DataFrame(rows)
