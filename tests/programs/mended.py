"""How much of a gap edits close, on models of the embedded world, beside random neurons and shuffled labels.

    python tests/programs/mended.py --models 10 --absent 5 --folder mended [--random 20]

Damaged models: each seed trains a base, two specialists and a mixed model on a world of its own (a minute), and damages
the mixed one: the 58 neurons that contribute most to its harmless margins, and little to its helpful ones, count as
many times negatively as brings harmless accuracy below .75; if none does, more neurons. Absent features: an organism
whose embedding does not tell the words that order harmless pairs from others, so that nothing is left to repair. Partly
learned ones: a mixed model learns from no, 2% or 8% harmless pairs, and its states may hold more than its reward uses.
Every method fits and chooses on its own pairs; the closed share is of test pairs.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from rmtension import RewardHead
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._diagnose import Evidence, diagnose
from rmtension.repair._distil import distil_ensemble
from rmtension.repair._down_projection import edit_down_projection
from rmtension.repair._edit import Edit
from rmtension.repair._features import read_states
from rmtension.repair._gains import GainFitter, GainOptions, fit_gains
from rmtension.repair._refit import refit_head
from rmtension.repair._splits import RepairPairs
from rmtension.synthetic import DamagedModel, make_organism, plant_damage, preference_world
from rmtension.synthetic._organism_pairs import FILLERS
from rmtension.training import train_family, train_reward_model

WEAK, STRONG, N_DAMAGED, SHARE_EDITED = "harmless", "helpful", (58, 115, 230), 0.05
# Shares of harmless pairs in the training of models that lack what they need.
_FEW = (0.0, 0.02, 0.08)
_FILLER_SPREAD = 0.05


def damaged_model(mixed: RewardHead, pairs: RepairPairs) -> DamagedModel:
    """The mildest damage to the fewest neurons of which fit pairs show it: harmless accuracy below .75."""
    # A model whose harmless neurons all serve the strong objective too is damaged for both.
    for n, spare in (*((n, pairs.fit[STRONG]) for n in N_DAMAGED), (N_DAMAGED[0], None)):
        for factor in (-0.5, -1.0, -2.0, -3.0, -5.0, -8.0):
            damaged = plant_damage(mixed, pairs.fit[WEAK], n=n, factor=factor, spare=spare)
            if damaged.head.score_pairs(pairs.fit[WEAK], progress=False).accuracy() < 0.75:
                return damaged
    return damaged


def try_seed(seed: int, folder: Path, n_random: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The closed shares of every method on one model, and what was predicted."""
    world = preference_world(seed)
    folders = train_family(world.train, folder / f"seed-{seed}", seed=seed, resume=True, progress=False)
    heads = {name: RewardHead.from_pretrained(folders[name]) for name in (WEAK, STRONG, "mixed")}
    pairs = RepairPairs.split(world.test, weak=WEAK, strong=STRONG, most_lost=0.05, seed=seed)
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
    attributed = fitter.strongest(0.5, round(SHARE_EDITED * head.n_layers * head.n_neurons("mlp")))
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
        "seed": seed, "n damaged": len(damaged.neurons), "factor": damaged.factor,
        "before damage": whole, "damaged": broken, "gap": found.gap.value,
        "present": found.is_present, "predicted": found.predicted.value, "realised": realised,
        "contradictory": found.contradictory,
    }  # fmt: skip
    return rows, about


def blind_organism(seed: int, folder: Path) -> tuple[RewardHead, RewardHead, RepairPairs]:
    """An organism whose states hold nothing that orders harmless pairs; the whole one; its pairs.

    Each filler gets an embedding of its own, and the words that order harmless pairs get the mean of these. Chosen and
    rejected responses then have different states, but no linear function of their embeddings tells which is which.
    """
    made = make_organism(folder / f"organism-{seed}", seed=seed, noise=0.05, n_pairs=240)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made.folder)
    embedding = model.get_input_embeddings().weight.data
    fillers = tokenizer.convert_tokens_to_ids(list(FILLERS))
    generator = torch.Generator().manual_seed(seed)
    embedding[fillers] += _FILLER_SPREAD * torch.randn(len(fillers), embedding.shape[1], generator=generator)
    for word, token in tokenizer.get_vocab().items():
        # Words of the kind "helpful" are in both responses of a harmless pair.
        if word.rsplit("-", 1)[0] in ("harmless", "shared", "conflict", "decoy"):
            embedding[token] = embedding[fillers].mean(dim=0)
    blind = RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)
    pairs = RepairPairs.split(made.pairs, weak=WEAK, strong=STRONG, most_lost=0.05, seed=seed)
    return blind, made.head(), pairs


def try_blind(seed: int, folder: Path) -> dict[str, object]:
    """What was predicted for an organism that cannot see what harmless pairs need, and what edits closed."""
    blind, whole, pairs = blind_organism(seed, folder)
    return {"seed": seed, "share": "blind"} | closed_by_edits(blind, pairs, {WEAK: whole, STRONG: whole})


def try_few(seed: int, share: float, folder: Path) -> dict[str, object]:
    """What was predicted for a model that saw few harmless pairs, and what edits closed."""
    world = preference_world(seed)
    folders = train_family(world.train, folder / f"seed-{seed}", seed=seed, resume=True, progress=False)
    few = folder / f"few-{share}-{seed}" if share else Path(folders[STRONG])
    if not few.exists():
        proportions = {STRONG: 1 - share, WEAK: share}
        train_reward_model(
            world.train, folders["base"], few, proportions=proportions, seed=seed, epochs=2, learning_rate=7e-4,
            warmup_steps=20, progress=False,
        )  # fmt: skip
    specialists = {name: RewardHead.from_pretrained(folders[name]) for name in (WEAK, STRONG)}
    pairs = RepairPairs.split(world.test, weak=WEAK, strong=STRONG, most_lost=0.05, seed=seed)
    return {"seed": seed, "share": share} | closed_by_edits(RewardHead.from_pretrained(few), pairs, specialists)


def closed_by_edits(head: RewardHead, pairs: RepairPairs, specialists: dict[str, RewardHead]) -> dict[str, object]:
    """The diagnosis on development pairs; and what its probe, a refit, gains and a projection close on test pairs."""
    evidence = Evidence.gather(head, pairs, specialists, progress=False)
    found = evidence.diagnosis()
    test = pairs.test[WEAK]
    before = head.score_pairs(test, progress=False).margin.double()
    ceiling = SpecialistEnsemble(specialists, pairs, progress=False).margins(test)
    assert evidence.probe is not None
    probed = before + read_states(head, test).difference @ evidence.probe
    about: dict[str, object] = {
        "harmless": head.score_pairs(test, progress=False).accuracy(),
        "helpful": head.score_pairs(pairs.test[STRONG], progress=False).accuracy(), "gap": found.gap.value,
        "probe": found.probe.value, "probe on test": closed_share(test, before, probed, ceiling).value,
        "present": found.is_present, "predicted": found.predicted.value,
    }  # fmt: skip
    for name, fit in {"realised": refit_head, "gains": fit_gains, "projection": edit_down_projection}.items():
        edit, _ = fit(head, pairs, progress=False)
        edited = head if edit is None else edit.apply(head)
        about[name] = closed_share(
            test, before, edited.score_pairs(test, progress=False).margin.double(), ceiling
        ).value
    return about


def main() -> None:
    """Print tables over all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--absent", type=int, default=5)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("mended"))
    options = parser.parse_args()
    rows, about = [], []
    for seed in range(options.first, options.first + options.models):
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
    shuffled = table.loc[table["method"] == "A head refit, shuffled", "closed"]
    print(f"shuffled labels: closed share {shuffled.mean():.3f}, from {shuffled.min():.3f} to {shuffled.max():.3f}")
    print(f"attributed gains beat all random ones in {int((attributed > random).sum())} of {options.models} models")
    seeds = range(options.absent)
    absent = pd.DataFrame(
        [try_blind(seed, options.folder) for seed in seeds]
        + [try_few(seed, share, options.folder) for share in _FEW for seed in seeds]
    )
    print(absent.round(3).to_string(index=False))
    absent.to_csv(options.folder / "absent.csv", index=False)
    # Nothing is predicted for a blind model, and nothing comes out.
    learned = absent[absent["share"] != "blind"] if len(absent) else absent
    both = pd.concat([frame[["predicted", "realised"]] for frame in (models, learned) if len(frame)]).dropna()
    residual = ((both["realised"] - both["predicted"]) ** 2).sum()
    spread = ((both["realised"] - both["realised"].mean()) ** 2).sum()
    r2 = 1 - residual / spread if spread > 0 else np.nan
    print(f"predicted against realised closed share over {len(both)} models: R2 {r2:.3f}")


if __name__ == "__main__":
    main()
