"""Which planted neurons each method finds: `python tests/programs/recovery.py --seeds 8`.

The models are organisms with hand-set weights (`rmtension.synthetic.make_organism`), without and with redundancy,
superposition and noise. Every method scores all neurons on helpful and on harmless margins, `conflict` sorts them into
classes, and the classes are compared with the truth: a helpful neuron should raise helpful margins only, a shared
neuron both margins, and a conflict neuron should raise helpful margins and lower harmless margins. "true single
effects" sorts by the exact effect of zeroing each neuron alone, with the same threshold: the result of a method that
predicts single ablations exactly.
"""

import argparse
import sys
import tempfile

import pandas as pd
import torch

from rmtension import ActivationCollector, Mean, NeuronAttribution, NeuronSet, PreferencePairs
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.neurons._conflict import conflict
from rmtension.neurons._conflict_report import classes
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
    """The neurons of each class by each method; integrated gradients use `steps` nodes."""
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
    by_method = {}
    for name, options in asked.items():
        attribution = NeuronAttribution(head, **options)
        scores = {objective: attribution.per_pair(pairs) for objective, pairs in organism.pairs.items()}
        by_method[name] = conflict(scores["helpful"], scores["harmless"], min_share=LEAST).sets
    effects = [single_neuron_effects(head, organism.pairs[name]) for name in ("helpful", "harmless")]
    added = [-effect.as_effects() for effect in effects]
    signs = [torch.where(values.abs() >= LEAST * values.abs().max(), values.sign(), 0) for values in added]
    by_method["true single effects"] = {
        name: NeuronSet((signs[0] == a) & (signs[1] == b), "mlp", head.architecture)
        for (a, b), name in classes(("helpful", "harmless")).items()
    }
    return by_method


def recovery(organism: Organism, **options: int) -> dict[str, dict[str, int]]:
    """Per method: neurons in the class of their kind, in any class, in the truth; and decoys in any class."""
    rows = {}
    decoys = organism.truth["decoy"] | organism.truth["loud"]
    for method, sets in found_sets(organism, **options).items():
        classes = {name: neurons for name, neurons in sets.items() if name != "none"}
        rows[method] = {
            "hits": sum(len(classes[name] & organism.truth[kind]) for name, kind in KIND_OF.items()),
            "found": sum(map(len, classes.values())),
            "truth": sum(len(organism.truth[kind]) for kind in KIND_OF.values()),
            "decoys": sum(len(neurons & decoys) for neurons in classes.values()),
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
                by_method = recovery(make_organism(folder, seed=seed, **arguments))
            rows += [{"design": design, "method": method, **row} for method, row in by_method.items()]
            print(f"{design}: seed {seed} done", file=sys.stderr)
    sums = pd.DataFrame(rows).groupby(["design", "method"], sort=False)[["hits", "found", "truth", "decoys"]].sum()
    sums["precision"], sums["recall"] = sums["hits"] / sums["found"], sums["hits"] / sums["truth"]
    sums["F1"] = 2 * sums["hits"] / (sums["found"] + sums["truth"])
    print(f"{options.seeds} seeds; decoys: how many are in a class, summed over seeds")
    print(sums[["precision", "recall", "F1", "decoys"]].round(2).to_string())


if __name__ == "__main__":
    main()
