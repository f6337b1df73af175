"""How much of a planted gap edits close, on models of the embedded world, beside random neurons and shuffled labels.

    python tests/programs/mended.py --models 10 --folder mended [--random 20]

Each seed trains a base, two specialists and a mixed model on a world of its own (a minute), and damages the mixed one:
the 58 neurons that contribute most to its harmless margins, and little to its helpful ones, count as many times
negatively as brings harmless accuracy below .75, if any does. Every method fits and chooses on its own pairs; the
closed share is of test pairs.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rmtension import NeuronSet, RewardHead
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._diagnose import diagnose
from rmtension.repair._distil import distil_ensemble
from rmtension.repair._down_projection import edit_down_projection
from rmtension.repair._edit import Edit
from rmtension.repair._gains import GainFitter, GainOptions
from rmtension.repair._refit import refit_head
from rmtension.repair._splits import RepairPairs
from rmtension.synthetic import DamagedModel, plant_damage, preference_world
from rmtension.training import train_family

WEAK, STRONG, N_DAMAGED, SHARE_EDITED = "harmless", "helpful", 58, 0.05


def damaged_model(mixed: RewardHead, pairs: RepairPairs) -> DamagedModel:
    """The mildest damage of which fit pairs show it: harmless accuracy below .75, or the strongest tried."""
    for factor in (-0.5, -1.0, -2.0, -3.0, -5.0, -8.0):
        damaged = plant_damage(mixed, pairs.fit[WEAK], n=N_DAMAGED, factor=factor, spare=pairs.fit[STRONG])
        if damaged.head.score_pairs(pairs.fit[WEAK], progress=False).accuracy() < 0.75:
            break
    return damaged


def try_seed(seed: int, folder: Path, n_random: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The closed shares of every method on one model, and what was predicted."""
    world = preference_world(seed)
    folders = train_family(world.train, folder / f"seed-{seed}", seed=seed, resume=True, progress=False)
    heads = {name: RewardHead.from_pretrained(folders[name]) for name in (WEAK, STRONG, "mixed")}
    pairs = RepairPairs.split(world.test, weak=WEAK, strong=STRONG, seed=seed)
    damaged = damaged_model(heads["mixed"], pairs)
    head = damaged.head
    specialists = {name: heads[name] for name in (WEAK, STRONG)}
    test = pairs.test[WEAK]
    before = head.score_pairs(test, progress=False).margin.double()
    ceiling = SpecialistEnsemble(specialists, pairs, progress=False).margins(test)
    rows = []

    def note(method: str, edit: Edit | None) -> float:
        edited = head if edit is None else edit.apply(head)
        after = edited.score_pairs(test, progress=False).margin.double()
        share = closed_share(test, before, after, ceiling)
        strong = [model.score_pairs(pairs.test[STRONG], progress=False).accuracy() for model in (head, edited)]
        rows.append(
            {
                "seed": seed, "method": method, "closed": share.value, "low": share.low, "high": share.high,
                "strong change": strong[1] - strong[0], "numbers": 0 if edit is None else edit.n_numbers,
            }
        )  # fmt: skip
        return share.value

    found = diagnose(head, pairs, specialists=specialists, progress=False)
    realised = note("A head refit", refit_head(head, pairs, progress=False)[0])
    note("A head refit, shuffled", refit_head(head, pairs.shuffled(seed), progress=False)[0])
    note("E distilled ensemble", distil_ensemble(head, pairs, specialists, progress=False)[0])
    note("C down projection", edit_down_projection(head, pairs, progress=False)[0])
    fitter = GainFitter(head, pairs, progress=False)
    order = fitter.ranking(0.5).abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[: round(SHARE_EDITED * len(order))]] = True
    attributed = NeuronSet(mask.view(head.n_layers, -1), "mlp", head.architecture)
    both = pairs.fit[WEAK] + pairs.fit[STRONG]
    magnitude = ActivationCollector(head).collect(both, progress=False).abs_mean
    sets = {"B gains, attributed": attributed, "B gains, damaged neurons": damaged.neurons}
    sets |= {
        f"B gains, random {draw}": attributed.matched_random(seed=draw, match="magnitude", magnitude=magnitude)
        for draw in range(n_random)
    }
    for name, neurons in sets.items():
        gains = fitter.fit(neurons, GainOptions(share=0.5)).gains
        note(name, Edit("gains", head.fingerprint, head.architecture, gains=gains))
    whole, broken = (model.score_pairs(test, progress=False).accuracy() for model in (heads["mixed"], head))
    about = {
        "seed": seed, "factor": damaged.factor, "before damage": whole, "damaged": broken, "gap": found.gap.value,
        "present": found.is_present, "predicted": found.predicted.value, "realised": realised,
        "contradictory": found.contradictory,
    }  # fmt: skip
    return rows, about


def main() -> None:
    """Print tables over all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("mended"))
    options = parser.parse_args()
    rows, about = [], []
    for seed in range(options.models):
        some, one = try_seed(seed, options.folder, options.random)
        rows += some
        about.append(one)
        print(pd.DataFrame([one]).round(3).to_string(index=False), flush=True)
        kinds = pd.DataFrame(some).assign(
            method=lambda frame: frame["method"].str.replace(r"random \d+", "random", regex=True)
        )
        print(
            kinds.groupby("method")[["closed", "strong change"]].agg(["mean", "min", "max"]).round(3).to_string(),
            flush=True,
        )
    table, models = pd.DataFrame(rows), pd.DataFrame(about)
    table.to_csv(options.folder / "mended.csv", index=False)
    models.to_csv(options.folder / "models.csv", index=False)
    random = table[table["method"].str.contains("random")].groupby("seed")["closed"].max()
    attributed = table[table["method"] == "B gains, attributed"].set_index("seed")["closed"]
    print(f"attributed gains beat all random ones in {int((attributed > random).sum())} of {options.models} models")
    residual = ((models["realised"] - models["predicted"]) ** 2).sum()
    spread = ((models["realised"] - models["realised"].mean()) ** 2).sum()
    r2 = 1 - residual / spread if spread > 0 else np.nan
    print(f"predicted against realised closed share: R2 {r2:.3f}")


if __name__ == "__main__":
    main()
