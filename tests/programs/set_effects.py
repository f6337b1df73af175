"""How well effects of sets are predicted, and what few neurons keep, on trained models.

    rmtension demo --seeds 3 --out runs --analyses depth --neurons 1
    python tests/programs/set_effects.py --models runs/models --out runs/sets
    python tests/programs/set_effects.py --model my-mixed-rm --pairs a.jsonl.gz b.jsonl.gz --out runs/sets

For every model, site and replacement, 200 sets of 1% to 20% of the neurons are truly ablated on all pairs: top sets of
three methods by magnitude, support and opposition; random sets; mixtures of both. Their effects are compared with
`predict_set_effects` and with sums of single scores. `kept_curves` gives CPR and CMD of every method and of random
rankings. A CSV file per model that exists is not computed again. Models of the embedded world are measured on test
pairs of their own objective, mixed ones on pairs of both.
"""

import argparse
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from faithful_models import add_model_arguments, measured_models
from scipy import stats

from rmtension import (
    ActivationCollector,
    Mean,
    NeuronAttribution,
    NeuronScores,
    NeuronSet,
    PreferencePairs,
    RewardHead,
    Zero,
)
from rmtension.attribution import kept_curves, predict_set_effects, score_together
from rmtension.interventions import score_without

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
METHODS = ("attribution_patching", "relp", "relp_fixed_attention", "integrated_gradients")
KINDS = {kind.name: kind for kind in (Mean, Zero)}
RANKED = ("attribution_patching", "relp", "integrated_gradients")


def planned_sets(scores: Mapping[str, NeuronScores], n: int) -> dict[str, NeuronSet]:
    """Top sets by every method, random sets, and mixtures, `n` in all."""
    sets = {
        f"{name} {rank_by} {share}": scores[name].top(share, rank_by=rank_by)
        for name in RANKED
        for share in FRACTIONS
        for rank_by in ("magnitude", "supports", "opposes")
    }
    generator = np.random.default_rng(0)
    draw = 0
    while len(sets) < n:
        share = FRACTIONS[draw % len(FRACTIONS)]
        top = scores[RANKED[draw % 2]].top(share, rank_by=("supports", "opposes", "magnitude")[draw % 3])
        random = top.matched_random(seed=draw, match="model")
        part = 0.0 if draw // len(FRACTIONS) % 4 == 0 else generator.uniform(0.1, 0.9)
        n_top = min(len(top), round(part * len(top)))
        mixed = top.subsample(n_top, seed=draw) | random.subsample(len(top) - n_top, seed=draw)
        sets[f"{'random' if not n_top else 'mixed'} {draw} {share}"] = mixed
        draw += 1
    return sets


def agreement(predicted: Any, true: Any) -> dict[str, float]:
    """Rank correlation, and slope of true on predicted."""
    return {
        "spearman": float(stats.spearmanr(predicted, true).statistic),
        "slope": float(np.polyfit(predicted, true, 1)[0]),
    }


def measure(name: str, folder: Path, pairs: PreferencePairs, options: argparse.Namespace) -> None:
    """The rows of one model, at the sites and with the replacements of the options."""
    head = RewardHead.from_pretrained(folder)
    for site in options.sites:
        for kind in (KINDS[replacement] for replacement in options.replacements):
            path = options.out / f"{name} {site} {kind.name}.csv"
            if path.exists():
                continue
            start = time.monotonic()
            replacement = Mean(ActivationCollector(head, site=site).collect(pairs)) if kind is Mean else Zero()
            asked = [
                NeuronAttribution(head, method, replacement=replacement, site=site, steps=options.steps)
                for method in METHODS
            ]
            scores = dict(zip(METHODS, score_together(asked, pairs), strict=True))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a site with a dozen heads has ties and small top sets
                sets = planned_sets(scores, options.n_sets)
            whole = head.score_pairs(pairs).margin.double().mean()
            ablated = score_without(head, pairs, list(sets.values()), replacement, progress=False)
            true = np.array([float(rewards.margin.double().mean() - whole) for rewards in ablated])
            rows = [
                {
                    "method": method,
                    **agreement([float(of.as_effects()[each.mask].sum()) for each in sets.values()], true),
                }
                for method, of in scores.items()
            ]
            for seed in range(options.repeats):
                found = predict_set_effects(
                    head, pairs, sets, replacement, passes=options.passes, seed=seed, progress=False
                )
                low, high = (found.table[end].to_numpy() for end in ("low", "high"))
                covered = float(((low <= true) & (true <= high)).mean())
                row = {"method": f"predict_set_effects, seed {seed}", "covered": covered}
                rows.append(row | agreement(found.table["predicted"], true))
            table = pd.DataFrame(rows)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                curves = kept_curves(head, pairs, scores, replacement, n_random=3, progress=False)
            areas = curves.areas.rename(columns={"ranking": "method"})
            table = table.merge(areas, on="method", how="outer")
            table = table.assign(model=name, site=site, replacement=kind.name, n_sets=len(sets), n_pairs=len(pairs))
            table.to_csv(path, index=False)
            print(f"{name}, {site}, {kind.name}: {time.monotonic() - start:.0f} s")
            print(table.drop(columns=["model", "site", "replacement"]).round(3).to_string(index=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n-sets", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2, help="seeds of predict_set_effects")
    parser.add_argument("--passes", type=float, default=3, help="of predict_set_effects")
    parser.add_argument("--steps", type=int, default=4, help="nodes of integrated gradients")
    parser.add_argument("--sites", nargs="+", choices=("mlp", "attn_head"), default=["mlp", "attn_head"])
    parser.add_argument("--replacements", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, folder, pairs in measured_models(options):
        measure(name, folder, pairs, options)
    table = pd.concat([pd.read_csv(path) for path in sorted(options.out.glob("*.csv"))])
    table["method"] = table["method"].str.replace(r", seed \d+| \d+$", "", regex=True)
    columns = ["spearman", "slope", "covered", "cpr", "cmd"]
    print(table.groupby(["site", "replacement", "method"])[columns].agg(["mean", "min", "max"]).round(3).to_string())
    print_areas(table[table["cpr"].notna()])


def print_areas(table: pd.DataFrame) -> None:
    """Print CPR and CMD of every model, random rankings as means over them, as a Markdown table."""
    methods = sorted(table["method"].unique())
    print(f"\n| CPR, CMD | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for (site, replacement, model), part in table.groupby(["site", "replacement", "model"]):
        areas = part.groupby("method")[["cpr", "cmd"]].mean().loc[methods]
        cells = [f"{cpr:.3f}, {cmd:.3f}" for cpr, cmd in areas.to_numpy()]
        print(f"| {model}, {site} to {replacement} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
