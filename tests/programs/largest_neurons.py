"""What ablating the neurons with the largest activations does to the mixed model of a replication.

    rmtension replicate smollm2.yaml --out replication
    python tests/programs/largest_neurons.py smollm2.yaml --out replication

For the first seed: the neurons with the largest mean |activation| in the base, replaced by their means and by zero, at
all tokens and at response tokens; the shared and the mixed model's top set without the ten largest; random tenths
without them; and the effects of single neurons. Neurons and pairs are those of the replication. It writes
largest_neurons.csv and single_effects.csv into --out.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

from rmtension import AblationContext, Mean, NeuronSet, RewardHead, Zero
from rmtension.attribution import single_neuron_effects
from rmtension.replication import read_recipe
from rmtension.replication._plan import sampled
from rmtension.replication._prepare import prepare_pairs
from rmtension.study import ModelRuns


def main() -> None:
    """Measure, print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n-single", type=int, default=16, help="harmless pairs for the effects of single neurons")
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    pairs = prepare_pairs(recipe, AutoTokenizer.from_pretrained(options.out / "base"))
    evaluating = sampled(pairs.parts["evaluation"], recipe.n_evaluating)
    first, second = sampled(pairs.parts["scoring"], recipe.n_scoring).values()
    model = options.out / "models" / f"seed-{recipe.seeds[0]}" / "mixed"
    means = Mean(ModelRuns(model, folder=options.out / "study" / "runs").statistics(first + second))
    head = RewardHead.from_pretrained(model)
    table = pd.read_csv(options.out / "corrected" / "neurons.csv")
    table = table[table["seed"] == recipe.seeds[0]].reset_index(drop=True)
    rank = table["abs_mean_base"].rank(ascending=False)

    def neurons(mask: "pd.Series[bool]") -> NeuronSet:
        values = torch.from_numpy(mask.to_numpy(dtype=bool)).view(head.n_layers, -1)
        return NeuronSet(values, "mlp", head.architecture)

    largest = rank <= 10
    cases = [
        (f"{k} largest", neurons(rank <= k), replacement, positions)
        for k in (1, 3, 10)
        for replacement in (means, Zero())
        for positions in ("all", "response")
    ]
    for name in ("shared", "mixed top"):
        mask = table[f"in_{name.replace(' ', '_')}"] & ~largest
        cases += [(f"{name} without the 10 largest", neurons(mask), which, "all") for which in (means, Zero())]
    for seed in (0, 1):
        drawn = np.zeros(len(table), dtype=bool)
        drawn[np.random.default_rng(seed).choice(len(table), len(table) // 10, replace=False)] = True
        cases.append((f"random {seed} without the 10 largest", neurons(pd.Series(drawn) & ~largest), means, "all"))
    rows = []
    for objective, some in evaluating.items():
        before = head.score_pairs(some).margin.double()
        for name, chosen, replacement, positions in cases:
            with AblationContext(head, chosen, replacement, positions=positions):
                after = head.score_pairs(some).margin.double()
            change = after - before
            row = {"objective": objective, "set": name, "size": len(chosen), "replacement": replacement.name}
            row |= {"positions": positions, "before": float(before.mean()), "change": float(change.mean())}
            row |= {"stderr": float(change.std() / len(change) ** 0.5), "accuracy": float((after > 0).double().mean())}
            rows.append(row)
    found = pd.DataFrame(rows)
    found.to_csv(options.out / "largest_neurons.csv", index=False)
    print(found.round(3).to_string())
    wanted = (rank <= 20) | (table["attribution_patching_mixed"].abs().rank(ascending=False) <= 60)
    some = evaluating["harmless"].sample(options.n_single, seed=1)
    effects = single_neuron_effects(head, some, means, neurons=neurons(wanted))
    columns = ["layer", "neuron", "attribution_patching_mixed", "abs_mean_base", "in_shared", "in_mixed_top"]
    single = table[columns].assign(effect=effects.to_frame()["score"])[wanted].sort_values("effect")
    single.to_csv(options.out / "single_effects.csv", index=False)
    print(single.head(20).round(3).to_string())


if __name__ == "__main__":
    main()
