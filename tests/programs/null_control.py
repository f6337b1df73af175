"""What a study reports on data without an effect.

    python tests/programs/null_control.py --studies 200 [--labels random] [--positions response]

Three independent random models share no neurons and know no preference. With random labels, the objective and the
preferred response of every pair are drawn at random, so that no two models differ in accuracy either; the world's
labels are kept otherwise. 95% intervals should then exclude 0 in one case of twenty: of accuracy differences, of
overlap beyond chance within layers, and of the effect of the shared neurons beyond matched random neurons. The report
of a study gives a direction only to an effect that is beyond both kinds of random sets; these are counted too. The test
suite runs a few of these studies.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import make_config

from rmtension import PreferencePairs, RewardHead, StudyOptions, StudyResult, TensionStudy
from rmtension.report._main_findings import findings
from rmtension.synthetic._world import preference_world
from rmtension.training._train_tokenizer import train_tokenizer

ANALYSES = ("accuracy", "overlap", "causality")
OBJECTIVES = ("helpful", "harmless")
# What the report says about ablated sets: words of its quantities, and their names here.
DIRECTIONS = {
    "beyond random": "directions in the report, ablated sets",
    "retained share": "directions in the report, one objective more",
}


def random_head(seed: int, tokenizer) -> RewardHead:
    """A GPT-2-shaped classifier: 3 layers of one head and 128 MLP neurons, weights large enough for curvature."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = make_config("gpt2", len(tokenizer), n_positions=256, n_inner=128, n_head=1)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)


def untrained_study(
    seed: int, *, shuffle: bool = False, n_test: int = 96, n_draws: int = 8, positions: str = "all"
) -> StudyResult:
    """A study of three random models on the embedded world, with labels shuffled or not."""
    world = preference_world(seed, n_train=48, n_test=n_test)
    tokenizer = train_tokenizer(world.texts, 512)
    heads = {name: random_head(3 * seed + n, tokenizer) for n, name in enumerate((*OBJECTIVES, "mixed"))}
    pairs = shuffled(world.test, seed) if shuffle else world.test
    # A fifth of the neurons: sets of a tenth of 384 share 4 by chance, too few for shares of intervals.
    options = StudyOptions(
        seed=seed,
        n_draws=n_draws,
        n_subsamples=2,
        fraction=0.2,
        scores=("mean_difference",),
        analyses=ANALYSES,
        positions=positions,
    )
    return TensionStudy(heads, pairs, options=options).run(progress=False)


def shuffled(pairs: dict[str, PreferencePairs], seed: int) -> dict[str, PreferencePairs]:
    """The pairs with the objective and the preferred response of each drawn at random."""
    rng = np.random.default_rng(seed)
    everything = [pair for part in pairs.values() for pair in part]
    swapped = [pair.swapped() if rng.random() < 0.5 else pair for pair in everything]
    order = rng.permutation(len(swapped))
    return {
        name: PreferencePairs(swapped[i] for i in half)
        for name, half in zip(OBJECTIVES, np.array_split(order, 2), strict=True)
    }


def intervals_of(result: StudyResult) -> pd.DataFrame:
    """One row per 95% interval of a study: the quantity, and whether the interval excludes 0."""
    comparisons = result.to_frame("comparisons").query("subset == 'all'")
    overlap = result.to_frame("overlap").query("kind == 'models'")
    ablation = result.to_frame("ablation")
    shared, others = ablation.query("set == 'shared'"), ablation.query("set != 'shared'")
    parts = {
        "accuracy differences": (comparisons, "low", "high"),
        "overlap beyond chance": (overlap, "beyond_low", "beyond_high"),
        "shared beyond random, margin": (shared.query("quantity == 'margin'"), "beyond_low", "beyond_high"),
        "shared beyond random, accuracy": (shared.query("quantity == 'accuracy'"), "beyond_low", "beyond_high"),
        "other sets beyond random, margin": (others.query("quantity == 'margin'"), "beyond_low", "beyond_high"),
    }
    rows = [
        pd.DataFrame({"quantity": name, "excludes 0": (frame[low] > 0) | (frame[high] < 0)})
        for name, (frame, low, high) in parts.items()
    ]
    rows += [
        pd.DataFrame({"quantity": [name], "excludes 0": [not finding.is_open and not finding.is_same]})
        for finding in findings(result)
        for words, name in DIRECTIONS.items()
        if words in finding.quantity
    ]
    return pd.concat(rows).assign(jaccard_beyond_chance=float(overlap["beyond_chance"].mean()))


def shares(intervals: pd.DataFrame) -> pd.DataFrame:
    """Share of 95% intervals that exclude 0, with the number of intervals, and of studies with such an interval."""
    grouped = intervals.groupby("quantity", sort=False)["excludes 0"]
    table = grouped.agg(["mean", "size"]).set_axis(["excludes 0", "intervals"], axis=1)
    of_studies = intervals.groupby(["quantity", "study"])["excludes 0"]
    table["studies with one"] = of_studies.any().groupby("quantity").mean()
    table["studies with half or more"] = (of_studies.mean() >= 0.5).groupby("quantity").mean()
    return table.round(4)


def main() -> None:
    """Print the shares for each kind of labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first study")
    parser.add_argument(
        "--out", type=Path, help="folder for a file per study; what is there is not run again: use one per version"
    )
    parser.add_argument("--labels", nargs="+", choices=("random", "world"), default=["random", "world"])
    parser.add_argument("--positions", choices=("all", "response", "last"), default="all", help="tokens for the scores")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for labels in options.labels:
        found = []
        for seed in range(options.first, options.first + options.studies):
            path = None if options.out is None else options.out / f"{labels} {options.positions} {seed}.csv"
            if path is not None and path.exists():
                found.append(pd.read_csv(path))
                continue
            result = untrained_study(seed, shuffle=labels == "random", positions=options.positions)
            found.append(intervals_of(result).assign(study=seed))
            if path is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                found[-1].to_csv(path.with_suffix(".part"), index=False)
                path.with_suffix(".part").replace(path)
        intervals = pd.concat(found)
        beyond = intervals.groupby("study")["jaccard_beyond_chance"].first().mean()
        print(f"{labels} labels, {len(found)} studies, positions {options.positions}")
        print(f"{shares(intervals).to_string()}\nmean Jaccard minus chance in each layer: {beyond:.4f}\n", flush=True)


if __name__ == "__main__":
    main()
