"""Overlap of top sets within the layers that training changed."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import pandas as pd
import torch

from rmtension.neurons._neuron_scores import top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._overlap import Overlap
from rmtension.study._family_runs import MODELS
from rmtension.study._options import StudyOptions, sign_of

_COLUMNS = ["jaccard", "layer_expected_jaccard", "beyond_chance", "beyond_low", "beyond_high"]


def overlap_of_trained_layers(neurons: pd.DataFrame, options: StudyOptions, first: int) -> pd.DataFrame:
    """The overlap of top sets of the layers from `first` on, from the table `neurons` of a study.

    Below `first` all models compute the same activations, so their top sets by activations agree there whatever they
    learned. Here the top `fraction` is taken among the neurons of the trained layers. One row per score and pair of
    models of a seed, and per model and pair of seeds (`kind` "seeds"), with and without the base's own top set. Chance
    is that of `Overlap` within the trained layers.
    """
    trained = {seed: part[part["layer"] >= first] for seed, part in neurons.groupby("seed", sort=False)}
    rows = []
    for score in options.scores:
        for row, names, sets, base in _comparisons(trained, options, score):
            for without in (None, *([base] if base is not None else [])):
                measured = Overlap.of(*sets, exclude=without, level=options.level)
                row |= {"score": score, "a": names[0], "b": names[1], "without_base": without is not None}
                rows.append(row | {name: getattr(measured, name) for name in _COLUMNS})
    return pd.DataFrame(rows)


# -- inside ------------------------------------------------------------------------------------------------------------

_Comparison = tuple[dict[str, object], tuple[str, str], tuple[NeuronSet, NeuronSet], NeuronSet | None]


def _comparisons(trained: Mapping[Any, pd.DataFrame], options: StudyOptions, score: str) -> Iterator[_Comparison]:
    """What is compared: the models of each seed, and each model between seeds."""
    sets = {
        (seed, model): _top(part, f"{score}_{model}", options, score)
        for seed, part in trained.items()
        for model in (*MODELS, "base")
        if f"{score}_{model}" in part
    }
    for seed in trained:
        for pair in combinations(MODELS, 2):
            both = tuple(sets[seed, model] for model in pair)
            yield {"kind": "models", "seed": seed}, pair, (both[0], both[1]), sets.get((seed, "base"))
    for first, second in combinations(trained, 2):
        for model in MODELS:
            names = (f"{model} (seed {first})", f"{model} (seed {second})")
            both = (sets[first, model], sets[second, model])
            yield {"kind": "seeds", "seed": first}, names, both, sets.get((first, "base"))


def _top(part: pd.DataFrame, column: str, options: StudyOptions, score: str) -> NeuronSet:
    """The top neurons of a column, ranked as `NeuronScores.top` ranks them; exact, in the order of neurons for ties."""
    values = torch.from_numpy(part[column].to_numpy(dtype="float64").copy())
    if options.rank_by == "magnitude":
        values = values.abs()
    elif options.rank_by != "score":
        sign = sign_of(score)
        assert sign is not None
        values = values * (sign if options.rank_by == "supports" else -sign)
    n_layers = part["layer"].nunique()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[: top_size(options.fraction, len(values))]] = True
    return NeuronSet(mask.view(n_layers, -1), options.site, "trained layers")
