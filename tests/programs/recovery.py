"""What each method finds of planted neurons: `python tests/programs/recovery.py --seeds 8`.

Organisms with hand-set weights (`rmtension.synthetic.make_organism`), without and with redundancy, superposition and
noise. Every method scores all neurons on helpful and on harmless margins, `conflict` sorts them into classes, and the
classes are compared with the truth: a neuron that carries helpfulness should raise helpful margins only, a shared one
both, a conflict one helpful margins at the cost of harmless ones. "true single effects" sorts by the exact effect of
zeroing each neuron alone, with the same floor: what a method that predicts single ablations should find.
"""

import argparse
import sys
import tempfile

import pandas as pd
import torch

from rmtension import ActivationCollector, Mean, NeuronAttribution, NeuronSet, PreferencePairs
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.neurons._conflict import conflict
from rmtension.neurons._conflict_report import CLASSES
from rmtension.synthetic._organisms import Organism, make_organism

KIND_OF = {
    "helpful only up": "helpful",
    "harmless only up": "harmless",
    "both up": "shared",
    "helpful up, harmless down": "conflict",
}
DESIGNS = {
    "plain": {},
    "deeper, 8 of each kind": {"depth": 6, "width": 96, "per_kind": 8, "n_pairs": 128},
    "noise .02": {"noise": 0.02},
    "noise .05": {"noise": 0.05},
    "redundancy 2": {"redundancy": 2},
    "superposition .04": {"superposition": 0.04},
    "superposition .2": {"superposition": 0.2},
    "redundancy 2, superposition .04, noise .02": {"redundancy": 2, "superposition": 0.04, "noise": 0.02},
}
LEAST = 0.05


def found_sets(organism: Organism, steps: int = 32) -> dict[str, dict[str, NeuronSet]]:
    """Method -> class -> neurons; integrated gradients at so many nodes."""
    head = organism.head()
    everything = PreferencePairs([*organism.pairs["helpful"], *organism.pairs["harmless"]])
    statistics = ActivationCollector(head).collect(everything)
    asked = {
        "attribution_patching to zero": {"method": "attribution_patching"},
        "attribution_patching to mean": {"method": "attribution_patching", "replacement": Mean(statistics)},
        "gradient_x_activation": {"method": "gradient_x_activation"},
        "integrated_gradients to zero": {"method": "integrated_gradients", "steps": steps},
        "direct_effect": {"method": "direct_effect"},
        "mean_difference": {"method": "mean_difference"},
    }
    found = {}
    for name, options in asked.items():
        scores = {one: NeuronAttribution(head, **options).per_pair(pairs) for one, pairs in organism.pairs.items()}
        found[name] = conflict(scores["helpful"], scores["harmless"], min_share=LEAST).sets
    effects = [single_neuron_effects(head, organism.pairs[name]) for name in ("helpful", "harmless")]
    added = [-one.as_effects() for one in effects]
    signs = [torch.where(one.abs() >= LEAST * one.abs().max(), one.sign(), 0) for one in added]
    found["true single effects"] = {
        name: NeuronSet((signs[0] == a) & (signs[1] == b), "mlp", head.architecture) for (a, b), name in CLASSES.items()
    }
    return found


def recovery(organism: Organism, **options: int) -> dict[str, dict[str, int]]:
    """Method -> its hits (neurons in the class of their kind), finds, the truth, and decoys put into any class."""
    rows = {}
    decoys = organism.truth["decoy"] | organism.truth["loud"]
    for method, sets in found_sets(organism, **options).items():
        classes = {name: one for name, one in sets.items() if name != "none"}
        rows[method] = {
            "hits": sum(len(classes[one] & organism.truth[kind]) for one, kind in KIND_OF.items()),
            "found": sum(map(len, classes.values())),
            "truth": sum(len(organism.truth[kind]) for kind in KIND_OF.values()),
            "decoys": sum(len(one & decoys) for one in classes.values()),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for design, arguments in DESIGNS.items():
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found = recovery(make_organism(folder, seed=seed, **arguments))
            rows += [{"design": design, "method": method, **row} for method, row in found.items()]
            print(f"{design}: seed {seed} done", file=sys.stderr)
    sums = pd.DataFrame(rows).groupby(["design", "method"], sort=False)[["hits", "found", "truth", "decoys"]].sum()
    sums["precision"], sums["recall"] = sums["hits"] / sums["found"], sums["hits"] / sums["truth"]
    sums["F1"] = 2 * sums["hits"] / (sums["found"] + sums["truth"])
    print(f"{options.seeds} seeds; decoys: how many were put into a class, all seeds together")
    print(sums[["precision", "recall", "F1", "decoys"]].round(2).to_string())


if __name__ == "__main__":
    main()
