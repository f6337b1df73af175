"""How well the first-order prediction of gains tells what they do to margins, on the damaged models of `mended.py`.

    python tests/programs/gains_first_order.py --models 10 --folder mended

`GainFitter` finds gains of 58 neurons. For these, and for a half, a quarter and an eighth of their changes, the
prediction is the sum of the neurons' contributions in the unedited model times the changes of their gains; the truth is
the change of the margin. The slope (of true on predicted, through 0) and the Pearson correlation are over the test
pairs of both objectives. The control exchanges the gains among the neurons.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from mended import SHARE_EDITED, STRONG, WEAK, damaged_model

from rmtension import AblationContext, RewardHead, Scale
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.repair._edit import SITE
from rmtension.repair._gains import GainFitter, GainOptions
from rmtension.repair._splits import RepairPairs
from rmtension.synthetic import preference_world
from rmtension.training import train_family

PARTS = (1.0, 0.5, 0.25, 0.125)


def try_seed(seed: int, folder: Path) -> list[dict[str, float]]:
    """One row per part of the change."""
    world = preference_world(seed)
    folders = train_family(world.train, folder / f"seed-{seed}", seed=seed, resume=True, progress=False)
    pairs = RepairPairs.split(world.test, weak=WEAK, strong=STRONG, most_lost=0.05, seed=seed)
    head = damaged_model(RewardHead.from_pretrained(folders["mixed"]), pairs).head
    fitter = GainFitter(head, pairs, progress=False)
    neurons = fitter.strongest(0.5, round(SHARE_EDITED * head.n_layers * head.n_neurons(SITE)))
    gains = fitter.fit(neurons, GainOptions(share=0.5)).gains
    places = neurons.mask
    test = pairs.test[WEAK] + pairs.test[STRONG]
    each = NeuronAttribution(head, "gradient_x_activation", site=SITE).per_pair(test, progress=False)
    contributions = each.values[:, places].double()  # noqa: PD011 - a tensor
    before = head.score_pairs(test, progress=False).margin.double()
    order = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(seed))
    rows = []
    for part in PARTS:
        change = part * (gains[places] - 1)
        scaled = torch.ones_like(gains)
        scaled[places] = 1 + change
        with AblationContext(head, neurons, Scale(scaled)):
            true = head.score_pairs(test, progress=False).margin.double() - before
        row: dict[str, float] = {"seed": seed, "part": part, "mean |change|": float(true.abs().mean())}
        for name, changes in (("", change), ("exchanged ", change[order])):
            predicted = contributions @ changes
            row[f"{name}slope"] = float(predicted @ true / (predicted @ predicted))
            row[f"{name}r"] = float(torch.corrcoef(torch.stack([predicted, true]))[0, 1])
        rows.append(row)
    return rows


def main() -> None:
    """Print a row per model and part, and their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("mended"))
    options = parser.parse_args()
    table = pd.DataFrame([row for seed in range(options.models) for row in try_seed(seed, options.folder)])
    print(table.round(3).to_string(index=False))
    print(table.drop(columns="seed").groupby("part").agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
