"""How much of the mixed model's margin the top neurons of each method keep: CPR and CMD on a replication.

    rmtension replicate smollm2.yaml --out replication
    python tests/programs/kept_of_replication.py smollm2.yaml --out replication

Scores and pairs are those of the stage `faithfulness`; neurons are replaced by their means, and by zero. For the first
ranking CPR and CMD are computed a second time with transformers and plain hooks, without this library's ablations, one
text at a time. Writes kept.csv and kept_curves.csv into --out.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmtension import ActivationCollector, Mean, NeuronScores, PreferencePairs, RewardHead, Zero
from rmtension.attribution import kept_curves
from rmtension.replication import read_recipe
from rmtension.replication._plan import sampled
from rmtension.replication._prepare import prepare_pairs
from rmtension.study._family_runs import joined

METHODS = ("attribution_patching", "gradient_x_activation", "integrated_gradients", "relp")
FRACTIONS = (0.01, 0.05, 0.2, 0.5, 1.0)


def plain_areas(
    folder: Path, pairs: PreferencePairs, scores: NeuronScores, means: torch.Tensor
) -> tuple[float, float, list[float]]:
    """CPR, CMD and the mean margins with only the top shares kept (first none), by hooks on transformers' model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The order of the library: by size, ties by layer and neuron.
    values = scores.values  # noqa: PD011 - a tensor
    order = values.abs().flatten().argsort(descending=True, stable=True)
    kept: dict[int, torch.Tensor] = {}

    def replaced(layer: int):
        def hook(_module, inputs):
            return (torch.where(kept[layer], inputs[0], means[layer].to(inputs[0])),)

        return hook

    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(replaced(layer))
    margins = []
    for fraction in (0.0, *FRACTIONS):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: int(np.ceil(fraction * len(order)))]] = True
        kept = dict(enumerate(mask.view(values.shape)))
        rewards = {"chosen": [], "rejected": []}
        with torch.no_grad():
            for pair in pairs:
                for side in rewards:
                    ids = tokenizer(pair.text(side), return_tensors="pt")["input_ids"]
                    rewards[side].append(float(model(ids).logits[0, 0]))
        margins.append(float(np.mean(np.subtract(rewards["chosen"], rewards["rejected"]))))
    heights = (np.array(margins) - margins[0]) / (margins[-1] - margins[0])
    widths = np.diff((0.0, *FRACTIONS))
    areas = [float(((each[1:] + each[:-1]) / 2 * widths).sum()) for each in (heights, np.abs(1 - heights))]
    return areas[0], areas[1], margins


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    tokenizer = AutoTokenizer.from_pretrained(options.out / "base")
    both = joined(sampled(prepare_pairs(recipe, tokenizer).parts["evaluation"], recipe.n_faithful))
    folder = options.out / "models" / f"seed-{recipe.seeds[0]}" / "mixed"
    head = RewardHead.from_pretrained(folder)
    statistics = ActivationCollector(head).collect(both, progress=False)
    means = Mean(statistics)
    rankings = {
        name: NeuronScores.load(options.out / "faithfulness" / f"seed-{recipe.seeds[0]}" / f"{name}.safetensors")
        for name in METHODS
    }
    areas, curves = [], []
    for name, replacement in (("mean", means), ("zero", Zero())):
        found = kept_curves(head, both, rankings, replacement, fractions=FRACTIONS, n_random=1, progress=False)
        print(found, flush=True)
        areas.append(found.areas.assign(replacement=name))
        curves.append(found.curves.assign(replacement=name))
    pd.concat(areas).to_csv(options.out / "kept.csv", index=False)
    pd.concat(curves).to_csv(options.out / "kept_curves.csv", index=False)
    first = METHODS[0]
    cpr, cmd, margins = plain_areas(folder, both, rankings[first], statistics.mean)
    print(f"{first}, by plain hooks: CPR {cpr:.6f}, CMD {cmd:.6f}; margins {np.round(margins, 4).tolist()}")
    print(areas[0][areas[0]["ranking"] == first][["cpr", "cmd"]].to_string(index=False))


if __name__ == "__main__":
    main()
