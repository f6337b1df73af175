"""How much of a top set comes back: with other prompts, scores, positions, replacements, and another seed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from rmtension.attribution._methods import METHODS
from rmtension.neurons._neuron_scores import N_BLOCKS, NeuronScores
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._overlap import resampled_tops
from rmtension.neurons._replication import replication_probability
from rmtension.study._family_runs import MODELS, FamilyRuns
from rmtension.study._options import StudyOptions

_N_SPLITS = 20


def stability(family: FamilyRuns, tops: Mapping[tuple[str, str], NeuronSet]) -> pd.DataFrame:
    """Table `stability`: how much of every top set comes back; one row per score, model and what is changed.

    `tops` are the top sets by score and model. `share` is the share of a top set that is also in the set under the
    change, `chance` the expected share of a random set with as many neurons in each layer. Other positions and the
    other replacement are run for the mixed model and the first score.
    """
    rows: list[dict[str, Any]] = []
    for (score, model), top in tops.items():
        scores = family.scores_of(score, model)
        if scores.without_block is None:
            continue
        row = {"score": score, "model": model}
        rows += [row | found for found in _other_prompts(scores, top, family.options)]
        for other in family.options.scores:
            if other != score and (other, model) in tops:
                rows.append(row | {"changed": f"score: {other}"} | _in_common(top, tops[other, model]))
    first = family.options.scores[0]
    for changed, scores in _other_settings(family, first):
        found = _in_common(tops[first, "mixed"], family.top(scores))
        rows.append({"score": first, "model": "mixed", "changed": changed} | found)
    return pd.DataFrame(rows, columns=["score", "model", "changed", "size", "share", "low", "high", "chance"])


def stability_with(family: FamilyRuns, other: FamilyRuns) -> pd.DataFrame:
    """The rows for another seed: the share of each top set that is also in the other seed's set of the same model."""
    return pd.DataFrame(
        {"score": score, "model": model, "changed": f"seed: {other.family.seed}"}
        | _in_common(*(runs.top(runs.scores_of(score, model)) for runs in (family, other)))
        for score in family.options.scores
        for model in MODELS
    )


# -- inside ------------------------------------------------------------------------------------------------------------


def _in_common(a: NeuronSet, b: NeuronSet) -> dict[str, Any]:
    """The share of `a` in `b`, and that of a random set with as many neurons in each layer as `b`."""
    by_chance = (a.mask.sum(1) * b.mask.double().mean(1)).sum()
    n = max(len(a), 1)
    return {"size": len(a), "share": float((a.mask & b.mask).sum()) / n, "chance": float(by_chance) / n}


def _other_prompts(scores: NeuronScores, top: NeuronSet, options: StudyOptions) -> Iterator[dict[str, Any]]:
    """The agreement of the top sets of two halves of the prompts, and that expected with as many new prompts."""
    if scores.require_blocks().isnan().any():
        return  # all prompts are in one block: nothing is known about others
    chance = _in_common(top, top)["chance"]
    generator = np.random.default_rng(options.seed)
    halves = np.zeros((_N_SPLITS, N_BLOCKS))
    for split in halves:
        split[generator.permutation(N_BLOCKS)[: N_BLOCKS // 2]] = 2  # twice, so that weights sum to N_BLOCKS
    shares = []
    for split in halves:
        counts = torch.from_numpy(np.stack([split, 2 - split]))
        one, other = resampled_tops(
            scores, counts, options.fraction, options.rank_by, options.rank_within, options.cut_rule
        )
        shares.append(float((one & other).sum()) * 2 / float(one.sum() + other.sum()))
    yield {
        "changed": "half of the prompts", "size": len(top), "share": float(np.mean(shares)),
        "low": min(shares), "high": max(shares), "chance": chance,
    }  # fmt: skip
    if options.rank_within == "model":
        probability = replication_probability(scores, k=len(top), rank_by=options.rank_by)
        expected = float(probability[top.mask].mean())
        yield {"changed": "new prompts (expected)", "size": len(top), "share": expected, "chance": chance}


def _other_settings(family: FamilyRuns, score: str) -> Iterator[tuple[str, NeuronScores]]:
    """The scores of the mixed model at other positions, and with the other replacement."""
    for positions in ("all", "response"):
        if positions != family.options.positions:
            changed = replace(family.options, positions=positions)
            yield f"positions: {positions}", family.scored(score, "mixed", changed)
    if score in METHODS and METHODS[score].needs_replacement:
        other = {"mean": "zero", "zero": "mean"}[family.options.replacement]
        yield f"replacement: {other}", family.scored(score, "mixed", replace(family.options, replacement=other))
