"""How well the neurons of two outputs of one model are found: `python tests/programs/two_outputs.py --runs 10`.

Every run makes an organism with the outputs "helpful" and "harmless", scores each output on the pairs of its objective,
and compares the neurons found as shared, specific and conflicting with those that were planted. Controls: the same
comparison with one output in the place of both, with the outputs swapped, and random sets of the same sizes.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rmtension import Mean, NeuronSet
from rmtension.attribution import NeuronAttribution
from rmtension.neurons import conflict
from rmtension.passes import ActivationCollector
from rmtension.reward_head import RewardHead
from rmtension.synthetic import Organism, make_two_output_organism

OBJECTIVES = ("helpful", "harmless")
# What `conflict` calls the planted kinds.
CLASSES = {
    "shared": "both up",
    "conflict": "helpful up, harmless down",
    "helpful": "helpful only up",
    "harmless": "harmless only up",
}


def f1(found: NeuronSet, planted: NeuronSet) -> float:
    """The harmonic mean of precision and recall."""
    return 2 * len(found & planted) / max(1, len(found) + len(planted))


def found_sets(heads: dict[str, RewardHead], organism: Organism, *, pairs: str = "own") -> dict[str, NeuronSet]:
    """The neurons of each kind by the heads' attributions, on the pairs of each objective ("own") or on all ("all")."""
    both = organism.pairs["helpful"] + organism.pairs["harmless"]
    means = Mean(ActivationCollector(heads["helpful"]).collect(both))
    scores = [
        NeuronAttribution(heads[name], "attribution_patching", replacement=means).per_pair(
            both if pairs == "all" else organism.pairs[name]
        )
        for name in OBJECTIVES
    ]
    report = conflict(*scores, names=OBJECTIVES)
    return {kind: report.sets[name] for kind, name in CLASSES.items()}


def scored(found: dict[str, NeuronSet], organism: Organism) -> dict[str, float]:
    """F1 by kind."""
    return {kind: f1(neurons, organism.truth[kind]) for kind, neurons in found.items()}


def one_run(folder: Path, seed: int, **design: Any) -> dict[str, dict[str, float]]:
    """F1 by kind, for the two outputs and for the controls."""
    two = make_two_output_organism(folder, seed=seed, **design)
    model = two.head(output="all")
    outputs = {name: model.output(name) for name in OBJECTIVES}
    found = found_sets(outputs, two)
    return {
        "two outputs, own pairs": scored(found, two),
        "two outputs, all pairs": scored(found_sets(outputs, two, pairs="all"), two),
        "one output for both": scored(found_sets(dict.fromkeys(OBJECTIVES, outputs["helpful"]), two), two),
        "outputs swapped": scored(found_sets(dict(zip(OBJECTIVES, reversed(outputs.values()), strict=True)), two), two),
        "random sets": {
            kind: f1(neurons.matched_random(seed=seed), two.truth[kind]) for kind, neurons in found.items()
        },
    }


def main() -> None:
    """Print the mean F1 over runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--superposition", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            runs = one_run(Path(folder), seed, noise=options.noise, superposition=options.superposition)
        rows += [{"sets": name, **kinds} for name, kinds in runs.items()]
    means = pd.DataFrame(rows).groupby("sets", sort=False).mean()
    print(f"F1, mean over {options.runs} organisms of 256 neurons, 4 of each kind")
    print(means.map("{:.2f}".format).to_string())


if __name__ == "__main__":
    main()
