"""Whether neurons come back in top sets as often as they are said to.

    python tests/programs/replication_calibration.py --out runs/calibration
    python tests/programs/replication_calibration.py --out runs/calibration --model my-rm --pairs a.jsonl.gz b.jsonl.gz

Trains helpful, harmless and mixed models on the embedded world with several seeds, all from one base, and scores them.

Other prompts: the test pairs are divided into halves by prompt, again and again. `replication_probability` of one half
is compared with the top set of the other.

Other seeds: `replication_across_seeds` of some seeds is compared with the top set of a seed that is not among them.

The table gives Brier scores, the mean squared difference between the probability and what happened: of the probability,
of the top set taken as certain, and of the same share for every neuron. The second table gives the share of neurons
that came back by the probability that was stated.
"""

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from faithful_models import OBJECTIVES, take

from rmtension import NeuronAttribution, NeuronScores, PreferencePairs, RewardHead
from rmtension.neurons import replication_across_seeds, replication_probability
from rmtension.synthetic._world import preference_world
from rmtension.training import train_seeds

METHODS = ("gradient_x_activation", "mean_difference")
EDGES = (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1)


def halves(pairs: PreferencePairs, n_prompts: int, seed: int) -> list[PreferencePairs]:
    """Two groups of the pairs of as many different prompts each."""
    prompts = sorted({pair.prompt for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(prompts))
    groups = [{prompts[number] for number in part} for part in (order[:n_prompts], order[n_prompts : 2 * n_prompts])]
    return [PreferencePairs(pair for pair in pairs if pair.prompt in group) for group in groups]


def rows_of(stated, known: NeuronScores, new: NeuronScores, fraction: float, **labels: object) -> pd.DataFrame:
    """A row per neuron: the stated probability, whether it is in the known top set, and in the new one."""
    return pd.DataFrame(
        {
            "stated": stated.flatten().numpy(),
            "was in": known.top(fraction).mask.flatten().numpy(),
            "is in": new.top(fraction).mask.flatten().numpy(),
            **labels,
        }
    )


def over_prompts(
    head: RewardHead, pairs: PreferencePairs, *, sizes: list[int], n_draws: int, fraction: float, **labels: object
) -> Iterator[pd.DataFrame]:
    """What one half of the prompts says of the top set of the other half."""
    for method in METHODS:
        attribution = NeuronAttribution(head, method)
        for size in sizes:
            for draw in range(n_draws):
                one, other = (attribution.score(part, progress=False) for part in halves(pairs, size, draw))
                stated = replication_probability(one, fraction)
                about = {"of": f"{size} other prompts", "method": method, "draw": draw, **labels}
                yield rows_of(stated, one, other, fraction, **about)


def over_seeds(
    scores: list[NeuronScores], *, n_known: int, n_draws: int, fraction: float, **labels: object
) -> Iterator[pd.DataFrame]:
    """What some seeds say of the top set of another."""
    for held_out, new in enumerate(scores):
        others = [number for number in range(len(scores)) if number != held_out]
        chosen = list(combinations(others, n_known))
        order = np.random.default_rng(held_out).permutation(len(chosen))[:n_draws]
        for draw in order:
            known = [scores[number] for number in chosen[draw]]
            stated = replication_across_seeds(known, fraction)
            about = {"of": f"another seed than {n_known}", "draw": f"{held_out} {draw}", **labels}
            yield rows_of(stated, known[0], new, fraction, **about)


def brier_scores(rows: pd.DataFrame) -> dict[str, float]:
    """Of the stated probability, of the top set taken as certain, and of the same share for every neuron."""
    came = rows["is in"].astype(float)
    return {
        "neurons": len(rows),
        "stated": float(((rows["stated"] - came) ** 2).mean()),
        "set as certain": float(((rows["was in"].astype(float) - came) ** 2).mean()),
        "share for all": float(((came.mean() - came) ** 2).mean()),
        "in set: stated": float(rows.loc[rows["was in"], "stated"].mean()),
        "in set: came back": float(rows.loc[rows["was in"], "is in"].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="models and tables; models that exist are used")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="*", default=[24, 96, 384], help="prompts of a half")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--models-with-halves", type=int, default=2, help="seeds whose models are scored on halves")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", type=Path, help="one reward model more, scored on halves of --pairs")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--n-pairs", type=int, default=192, help="of every file of --pairs")
    options = parser.parse_args()
    drawn = {"n_draws": options.draws, "fraction": options.fraction}
    families = train_seeds(
        preference_world(0).train, options.out / "models", range(options.seeds), name="world", jobs=options.jobs
    )
    test = preference_world(0, n_test=max(768, 2 * max(options.sizes))).test
    found: list[pd.DataFrame] = []
    for kind in (*OBJECTIVES, "mixed"):
        parts = [kind] if kind in OBJECTIVES else list(OBJECTIVES)
        pairs = PreferencePairs(pair for part in parts for pair in test[part])
        some = PreferencePairs(pair for part in parts for pair in test[part][: 384 // len(parts)])
        heads = [RewardHead.from_pretrained(str(getattr(family, kind))) for family in families]
        for head in heads[: options.models_with_halves]:
            found += over_prompts(head, pairs, sizes=options.sizes, model=kind, **drawn)
        for method in METHODS:
            scores = [NeuronAttribution(head, method).score(some, progress=False) for head in heads]
            for n_known in (2, 3, 5):
                found += over_seeds(scores, n_known=n_known, method=method, model=kind, **drawn)
        print(f"{kind}: done", flush=True)
    if options.model is not None:
        head = RewardHead.from_pretrained(str(options.model))
        parts = [
            take(PreferencePairs.from_jsonl(path, on_invalid="skip"), options.n_pairs, head) for path in options.pairs
        ]
        pairs = sum(parts, start=PreferencePairs([]))
        size = len({pair.prompt for pair in pairs}) // 2
        found += over_prompts(head, pairs, sizes=[size], model=options.model.name, **drawn)
    rows = pd.concat(found, ignore_index=True)
    table = rows.groupby(["of", "method"]).apply(lambda part: pd.Series(brier_scores(part)), include_groups=False)
    table.to_csv(options.out / "brier.csv")
    print(table.round(4).to_string())
    rows["bin"] = pd.cut(rows["stated"], EDGES, include_lowest=True)
    curve = rows.groupby([rows["of"].str.replace(r"\d+ ", "", regex=True), "bin"], observed=True).agg(
        n=("stated", "size"), stated=("stated", "mean"), came_back=("is in", "mean")
    )
    curve.to_csv(options.out / "calibration.csv")
    print(curve.round(3).to_string())


if __name__ == "__main__":
    main()
