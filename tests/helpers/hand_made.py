"""Tables and studies written by hand."""

import numpy as np
import pandas as pd
from scipy import stats

from rmtension import StudyResult

MODELS, OBJECTIVES = ("helpful", "harmless", "mixed"), ("helpful", "harmless")


SETS = {"helpful only": 30, "harmless only": 28, "shared": 7}


SCORES = ("magnitude", "change")


SUBSETS = {"helpful": ("chat", "maths"), "harmless": ("should_refuse", "should_respond")}


FRACTIONS = (0.02, 0.1, 0.3, 1.0)


def hand_made(seeds=(0, 1, 2), family="tiny", level=0.95):
    """The tables of a study with random numbers, which figures should show."""
    rng = np.random.default_rng(7)
    rows = {}

    def add(table, names, *estimates, **numbers):
        row = {"family": family, "seed": seed, **names}
        for value, low, high in estimates:
            row[value] = numbers.get(value, rng.uniform(0.2, 0.8))
            row |= {low: row[value] - rng.uniform(0.01, 0.1), high: row[value] + rng.uniform(0.01, 0.1)}
        rows.setdefault(table, []).append(row | numbers)

    usual = ("value", "low", "high")
    for seed in seeds:
        for model in (*MODELS, "length only"):
            for on in OBJECTIVES:
                measures = ("accuracy", "margin", *(("refusing", "responding") if on == "harmless" else ()))
                for measure in measures if model != "length only" else ("accuracy",):
                    add("accuracy", {"model": model, "objective": on, "measure": measure}, usual, n=90, level=level)
        for model in MODELS:
            for on in OBJECTIVES:
                for subset in SUBSETS[on]:
                    margin = ("margin", "margin_low", "margin_high")
                    names = {"model": model, "objective": on, "subset": subset}
                    add("subsets", names, ("accuracy", "low", "high"), margin, chance=0.5, n=45)
                for pairs in ("all", "all models correct"):
                    for quantity in ("margin", "margin_in_spreads", "probability"):
                        names = {"model": model, "objective": on, "pairs": pairs, "quantity": quantity}
                        add("confidence", names, usual, n=90 if pairs == "all" else 50 + seed)
                for number in range(20):
                    chosen, rejected = rng.normal(1, 2, 2)
                    names = {"model": model, "objective": on, "id": f"{on}-{number}"}
                    add("rewards", names, chosen=chosen, rejected=rejected, all_correct=number % 3 == 0)
                for score in (*SCORES, "random"):
                    for draw in range(2 if score == "random" else 1):
                        for fraction in FRACTIONS:
                            names = {"model": model, "score": score, "draw": draw, "fraction": fraction}
                            change = ("change", "change_low", "change_high")
                            margin = ("margin_change", "margin_change_low", "margin_change_high")
                            numbers = {"before": 0.8 + 0.01 * seed, "drop": rng.uniform(), "normalised": rng.uniform()}
                            numbers |= {"margin": rng.uniform(), "size": round(100 * fraction), "n": 90}
                            accuracy = ("accuracy", "low", "high")
                            add("curves", {**names, "objective": on}, accuracy, change, margin, **numbers)
        for on in OBJECTIVES:
            for second in OBJECTIVES:
                for subset in ("all", *SUBSETS[on]):
                    names = {"first": "mixed", "second": second, "objective": on, "subset": subset}
                    add("comparisons", names, ("difference", "low", "high"), n=45, q_value=rng.uniform())
            for quantity in ("transferability", "accuracy", "beyond accuracy", "jaccard helpful", "jaccard harmless"):
                add("transferability", {"objective": on, "quantity": quantity}, usual, n=90, n_union=80)
            for name, size in SETS.items():
                for quantity in ("accuracy", "margin"):
                    names = {"set": name, "objective": on, "quantity": quantity}
                    effect = rng.uniform(-1, 1)
                    ends = {"effect": effect, "low": effect - rng.uniform(0, 0.2), "high": effect + rng.uniform(0, 0.2)}
                    for control in ("layer", "magnitude"):
                        beyond = ("beyond_random", "beyond_low", "beyond_high")
                        numbers = {"random_effect": rng.normal(), "random_sd": rng.uniform(), "before": 0.8, "n": 90}
                        known = {"control": control, "size": size + seed}
                        # The effect is the same for both controls.
                        add("ablation", {**names, **known, **ends}, beyond, **numbers)
                    gap = ("difference", "difference_low", "difference_high")
                    numbers = {"size": 7 + seed, "per_neuron": rng.normal(), "n": 90, "against": "shared"}
                    add("equal_size", names, ("effect", "low", "high"), gap, **numbers)
        for name, size in SETS.items():
            for quantity in ("accuracy", "margin"):
                retained = [(f"retained_{on}", f"retained_{on}_low", f"retained_{on}_high") for on in OBJECTIVES]
                gap = ("difference", "difference_low", "difference_high")
                add("collapse", {"set": name, "size": size + seed, "quantity": quantity}, *retained, gap)
        for score in SCORES:
            for changed in ("half of the prompts", "new prompts (expected)"):
                names = {"score": score, "model": "mixed", "changed": changed}
                add("stability", names, ("share", "low", "high"), size=40 + seed, chance=0.1)
            for name in (*MODELS, "shared"):
                shares = dict(zip(("early", "middle", "late"), rng.dirichlet([2, 2, 2]), strict=True))
                add("depth", {"score": score, "set": name}, size=40 + seed, **shares)
            jaccard = ("jaccard", "jaccard_low", "jaccard_high")
            beyond = ("beyond_chance", "beyond_low", "beyond_high")
            pairs = [("models", a, b) for a, b in (("helpful", "harmless"), ("helpful", "mixed"))]
            pairs += [("three-way", "helpful or harmless", "mixed")]
            pairs += [
                ("seeds", f"{model} (seed {seed})", f"{model} (seed {other})")
                for model in MODELS
                for other in seeds
                if other > seed
            ]
            for kind, a, b in pairs:
                for without in (False, True):
                    names = {"score": score, "kind": kind, "a": a, "b": b, "without_base": without}
                    numbers = {"beyond_chance": rng.uniform(-0.1, 0.3), "expected_jaccard": 0.05, "size_a": 9}
                    numbers |= {"layer_expected_jaccard": rng.uniform(0.05, 0.1), "size_b": 8, "intersection": 2}
                    add("overlap", names, jaccard, beyond, **numbers)
                    if kind == "three-way":
                        rows["overlap"][-1] |= {"jaccard_low": np.nan, "jaccard_high": np.nan}
    summary = {
        "version": "0",
        "options": {
            "analyses": ["accuracy"], "scores": list(SCORES), "fraction": 0.1, "rank_by": "magnitude", "site": "mlp",
            "positions": "response", "cut_rule": "exact", "replacement": "mean", "n_draws": 8, "n_subsamples": 8,
            "tie_value": 0.5, "level": level, "seed": 0,
        },
        "families": [{"family": family, "seed": seed, "base": True} for seed in seeds],
        "models": {f"{family} 0": {"mixed": {"architecture": "toy", "model": "0123", "dtype": "float32"}}},
        "pairs": {
            on: {"scoring": 90, "evaluating": 90, "identical_responses": 0, "prompts_cut": 0} for on in OBJECTIVES
        },
    }  # fmt: skip
    return StudyResult({name: pd.DataFrame(some) for name, some in rows.items()}, summary)


def expected(frame, keys, value="value", low="low", high="high", level=0.95, share=False):
    """By key, the mean over seeds and its interval by the documented formula; a share's is clipped to [0, 1]."""
    intervals = {}
    for names, part in frame.groupby(list(keys), sort=False):
        n = len(part)
        half = 0.0
        if n > 1:
            half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(part[value], ddof=1) / np.sqrt(n)
        centre = part[value].mean()
        below, above = (part[value] - part[low]).mean(), (part[high] - part[value]).mean()
        low_end, high_end = centre - np.hypot(below, half), centre + np.hypot(above, half)
        intervals[names] = (centre, *np.clip([low_end, high_end], *((0, 1) if share else (-np.inf, np.inf))))
    return intervals


def hand_made_study():
    """A study with every table that a study can have."""
    study = hand_made()
    effects = study.subsets.rename(columns={"accuracy": "before"}).assign(change=-0.1, low=-0.2, high=-0.05)
    effects["score"] = "magnitude"
    rows = [
        {
            "family": "tiny",
            "seed": seed,
            "model": model,
            "score": "magnitude",
            "slope": -0.1 * seed,
            "r": np.nan,
            "split_slope": 0.1,
            "split_r": np.nan,
            "n": 4,
        }
        for seed in range(3)
        for model in MODELS
    ]
    tops = pd.DataFrame(rows)[["family", "seed", "score", "model"]].assign(size=9, cut=0.25, n_tied=1, n_pairs=90)
    neurons = pd.DataFrame({"family": "tiny", "seed": 0, "layer": 0, "neuron": range(100)})
    without = study.transferability.assign(set="shared", size=9)
    tables = {
        "cross_objective": effects,
        "drift": pd.DataFrame(rows),
        "sets": tops,
        "neurons": neurons,
        "ablation": study.ablation.assign(set_magnitude=0.3, random_magnitude=0.2),
        "ablated_transferability": without,
    }
    return StudyResult(study.tables | tables, study.summary)
