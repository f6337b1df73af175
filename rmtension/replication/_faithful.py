"""Which method predicts the true effects of ablating single neurons and sets, on one reward model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from rmtension.attribution._faithfulness import faithfulness, sample_neurons
from rmtension.attribution._methods import METHODS
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.data._pairs import PreferencePairs
from rmtension.evaluation._intervals import N_BOOTSTRAP, percentile_interval
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Mean, Zero
from rmtension.neurons._neuron_scores import NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.replication._recipe import Recipe
from rmtension.study._family_runs import joined
from rmtension.study._model_runs import ModelRuns

# The first ranks the neurons of sets that are half random.
COMPARED = (
    "attribution_patching", "gradient_x_activation", "direct_effect", "mean_difference", "integrated_gradients", "relp",
)  # fmt: skip
# Sizes of the sets as shares of all neurons, and steps of integrated gradients.
_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
STEPS = 4


@dataclass(frozen=True)
class Faithful:
    """How well every method predicts true effects on one reward model.

    `single` has one row per method for single neurons, as `Faithfulness.summary`, and `neurons` one row per ablated
    neuron. `sets` has one row per set with its true effect and each method's prediction; `of_sets` has the rank
    correlation and the slope of each method over these sets, with intervals that resample the sets.

    Examples:
        >>> Faithful.__match_args__
        ('single', 'neurons', 'sets', 'of_sets')
    """

    single: pd.DataFrame
    neurons: pd.DataFrame
    sets: pd.DataFrame
    of_sets: pd.DataFrame


def measure_faithfulness(
    model: Any, pairs: Mapping[str, PreferencePairs], recipe: Recipe, folder: Path, *, passes: dict[str, int],
    progress: bool | None,
) -> Faithful:  # fmt: skip
    """Ablate neurons and sets of `model` on `pairs`, and compare with the scores of every method on the same pairs."""
    runs = ModelRuns(model, folder=folder / "runs")
    both = joined(pairs)
    options = recipe.study
    replacement: Replacement = Zero()
    if options.replacement == "mean":
        replacement = Mean(runs.statistics(both, site=options.site))
    scores = {name: _scores(runs, name, both, replacement, options.site, folder, progress) for name in COMPARED}
    effects = folder / "effects.safetensors"
    if not effects.exists():
        neurons = sample_neurons(runs.head, options.site, recipe.n_single, seed=0)
        single_neuron_effects(
            runs.head, both, replacement, site=options.site, neurons=neurons, work=folder / "work", progress=progress
        ).save(effects)
    found = faithfulness(
        runs.head,
        both,
        scores,
        replacement,
        true_effects=NeuronScores.load(effects),
        set_fractions=(),
        level=options.level,
        progress=progress,
    )
    table = agreement = pd.DataFrame()
    if recipe.n_sets:
        sets = _planned_sets(scores, recipe.n_sets)
        table = _effects_of_sets(runs, both, sets, scores, replacement)
        agreement = _agreement(table, options.level)
    passes["run"] += runs.n_run
    passes["read"] += runs.n_read
    result = Faithful(found.summary, found.neurons, table, agreement)
    for name, frame in vars(result).items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    return result


def _scores(
    runs: ModelRuns, name: str, pairs: PreferencePairs, replacement: Replacement, site: str, folder: Path,
    progress: bool | None,
) -> NeuronScores:  # fmt: skip
    path = folder / f"{name}.safetensors"
    if not path.exists():
        more: dict[str, Any] = {"steps": STEPS} if METHODS[name].needs_path else {}
        if METHODS[name].needs_replacement:
            more["replacement"] = replacement
        attribution = NeuronAttribution(runs.head, name, site=site, **more)
        attribution.score(pairs, work=folder / f"{name}.work", progress=progress).save(path)
    return NeuronScores.load(path)


def _planned_sets(scores: Mapping[str, NeuronScores], n: int) -> dict[str, NeuronSet]:
    """Sets of 1 to 20% of the neurons: top sets of each method, half top and half random, and random ones."""
    first = next(iter(scores.values()))
    named = [(name, share) for share in _FRACTIONS for name in scores]
    # Spread over all sizes if there are more than wanted.
    chosen = np.unique(np.linspace(0, len(named) - 1, min(n // 2, len(named))).round().astype(int)).tolist()
    sets = {f"{name}, top {share:.0%}": scores[name].top(share) for name, share in (named[i] for i in chosen)}
    draw = 0
    while len(sets) < n:
        share = _FRACTIONS[draw % len(_FRACTIONS)]
        top = first.top(share)
        random = top.matched_random(seed=draw, match="model")
        if draw // len(_FRACTIONS) % 2:
            half = len(top) // 2
            random = top.subsample(half, seed=draw) | random.subsample(len(top) - half, seed=draw)
            sets[f"half top, half random {share:.0%}, draw {draw}"] = random
        else:
            sets[f"random {share:.0%}, draw {draw}"] = random
        draw += 1
    return sets


def _effects_of_sets(
    runs: ModelRuns,
    pairs: PreferencePairs,
    sets: Mapping[str, NeuronSet],
    scores: Mapping[str, NeuronScores],
    replacement: Replacement,
) -> pd.DataFrame:
    whole = runs.rewards(pairs).margin.double()
    runs.prepare(pairs, list(sets.values()), replacement=replacement)
    rows = []
    for name, neurons in sets.items():
        change = runs.rewards(pairs, without=neurons, replacement=replacement).margin.double() - whole
        predicted = {method: float(of.as_effects()[neurons.mask].sum()) for method, of in scores.items()}
        rows.append({"set": name, "size": len(neurons), "effect": float(change.mean()), **predicted})
    return pd.DataFrame(rows, columns=["set", "size", "effect", *scores])


def _agreement(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """Rank correlation and slope of true on predicted effects over the sets, with bootstrap intervals over sets."""
    rows = []
    effect = table["effect"].to_numpy()
    draws = np.random.default_rng(0).integers(len(table), size=(N_BOOTSTRAP, len(table)))
    for method in table.columns[3:]:
        predicted = table[method].to_numpy()
        row: dict[str, Any] = {"method": method, "n": len(table)}
        for name, measure in (("spearman", _rank_correlations), ("slope", _slopes)):
            resampled = measure(predicted[draws], effect[draws])
            finite = resampled[np.isfinite(resampled)]
            low, high = percentile_interval(finite, level) if len(finite) else (np.nan, np.nan)
            row |= {name: float(measure(predicted[None], effect[None])[0]), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _rank_correlations(
    predicted: Float[np.ndarray, "draw set"], effect: Float[np.ndarray, "draw set"]
) -> Float[np.ndarray, "draw"]:
    """Spearman's correlation of every row; NaN if all values of one are the same."""
    ranks = [stats.rankdata(values, axis=1) for values in (predicted, effect)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    sizes = [(rank**2).sum(axis=1) for rank in centred]
    with np.errstate(invalid="ignore"):
        return np.asarray((centred[0] * centred[1]).sum(axis=1) / np.sqrt(sizes[0] * sizes[1]))


def _slopes(
    predicted: Float[np.ndarray, "draw set"], effect: Float[np.ndarray, "draw set"]
) -> Float[np.ndarray, "draw"]:
    """The least-squares slope of the effect on the prediction in every row; NaN if all predictions are the same."""
    centred = predicted - predicted.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((centred * effect).sum(axis=1) / (centred**2).sum(axis=1))
