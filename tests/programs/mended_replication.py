"""Repair one side of the mixed model of a replication, with its specialists as the ceiling.

    rmtension replicate smollm2.yaml --out replication
    python tests/programs/mended_replication.py smollm2.yaml --out replication --method "head refit" --longest 288

The pairs are those of the recipe's files whose prompts no model was trained or selected on, also pairs that were too
long for training, up to --longest tokens; refusals are labelled as in the replication. They are divided by prompt into
fit, development and test pairs. With `--weak shorter`, the weak objective is the pairs whose chosen response is the
shorter one, the strong one the others, of both objectives together, and a probe is the ceiling. It prints the
diagnosis and the report, and writes the report to repair-WEAK-METHOD-LONGEST.json in --out; with --diagnose-only it
ends after the diagnosis. With --anyway, the diagnosis is followed by what the head refit with the largest gain on
development pairs does to test pairs, whether or not it would be taken, and one that is fitted to shuffled labels.

With `--damage N FACTOR`, the model is damaged first, as by `plant_damage`: N neurons that contribute to the weak
objective and little to the strong one count FACTOR times, and the model without damage is the ceiling. It prints how
many of these neurons a repair by gains has found.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from published_repairs import by_length
from transformers import AutoTokenizer

from rmtension import PreferencePairs, RewardHead
from rmtension.errors import OptionError
from rmtension.repair import Repair, RepairPairs, repair
from rmtension.repair._choice import change_of_accuracy, correct
from rmtension.repair._diagnose import Evidence
from rmtension.repair._features import SplitStates, read_states
from rmtension.repair._refit import refit_head, refit_row
from rmtension.repair._repair import METHODS
from rmtension.repair._row_edits import RIDGES
from rmtension.replication import read_recipe
from rmtension.replication._prepare import SPLITS, prepare_pairs
from rmtension.replication._recipe import Recipe
from rmtension.synthetic import DamagedModel, plant_damage

OBJECTIVES = ("helpful", "harmless")
# Pairs by split and objective.
Parts = Mapping[str, Mapping[str, PreferencePairs]]


def unseen_pairs(recipe: Recipe, longest: int, folder: Path) -> dict[str, PreferencePairs]:
    """Pairs of up to `longest` tokens whose prompts are not among those of training and validation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = prepare_pairs(recipe, tokenizer).parts
    seen = {prompt for split in ("train", "validation") for part in parts[split].values() for prompt in part.prompts}
    every = prepare_pairs(replace(recipe, max_length=longest), tokenizer).parts
    return {name: without_prompts(every, name, seen) for name in OBJECTIVES}


def without_prompts(parts: Parts, name: str, seen: set[object]) -> PreferencePairs:
    """The pairs of an objective in all splits, without those of some prompts."""
    return PreferencePairs(pair for split in SPLITS for pair in parts[split][name] if pair.prompt not in seen)


def repair_and_print(head: RewardHead, split: RepairPairs, method: str, **options: Any) -> Repair | None:
    """Repair, and print the diagnosis and the tables of the report; None if no gap is shown, which is printed."""
    try:
        mended = repair(head, split, method, progress=False, **options)
    except OptionError as error:  # no gap is shown
        print(error)
        return None
    print(mended.report.diagnosis)
    print(mended)
    for table in ("checks", "path", "controls"):
        print(f"\n{table}\n{mended.report.to_frame(table).round(3).to_string(index=False)}")
    return mended


def damage(head: RewardHead, split: RepairPairs, n: int, factor: float) -> DamagedModel:
    """Damage a copy, and print the accuracy on test pairs without and with the damage."""
    damaged = plant_damage(head, split.fit[split.weak], n=n, factor=factor, spare=split.fit[split.strong])
    for name, part in split.test.items():
        before, after = (model.score_pairs(part, progress=False).accuracy() for model in (head, damaged.head))
        print(
            f"{name} test pairs: {before:.3f} before the damage of {n} neurons by {factor:g}, {after:.3f} after",
            flush=True,
        )
    return damaged


def refit_anyway(head: RewardHead, split: RepairPairs, states: SplitStates, ridges: Sequence[float]) -> None:
    """Print what the refit with the largest development gain does to test pairs, and one to shuffled labels."""
    test = {name: read_states(head, part, progress=False) for name, part in split.test.items()}
    for labels, pairs, known in (
        ("given", split, states),
        ("shuffled", split.shuffled(0), states.shuffled(split.weak, 0)),
    ):
        _, path = refit_head(head, pairs, ridges=ridges, states=known)
        best = path.sort_values(f"{split.weak}_change").iloc[-1]
        fit = (known.fit[split.weak], known.fit[split.strong])
        row = refit_row(*fit, share=best["share"], ridge=best["ridge"])
        print(f"refit to {labels} labels: {best[f'{split.weak}_change']:+.3f} on {split.weak} development pairs")
        for name, part in test.items():
            change = correct(part.margin + part.difference @ row) - correct(part.margin)
            print(f"  on {name} test pairs: {change_of_accuracy(change, split.test[name])}")


def main() -> None:
    """Diagnose, repair, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the models")
    parser.add_argument("--weak", choices=[*OBJECTIVES, "shorter"], default="helpful")
    parser.add_argument("--method", choices=METHODS, default="head refit")
    parser.add_argument("--longest", type=int, default=288, help="tokens of a text")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.3, 0.35, 0.35), help="fit, development, test")
    parser.add_argument("--most-lost", type=float, default=0.02)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of neurons, for gains")
    parser.add_argument("--steps", type=int, default=1, help="for gains")
    parser.add_argument("--n-random", type=int, default=2)
    parser.add_argument("--no-specialists", action="store_true", help="a probe is the ceiling")
    parser.add_argument("--diagnose-only", action="store_true")
    parser.add_argument("--anyway", action="store_true", help="apply the refit with the largest gain, no other method")
    parser.add_argument("--damage", nargs=2, metavar=("N", "FACTOR"), help="repair a copy that is damaged like this")
    parser.add_argument("--ridges", type=float, nargs="+", default=RIDGES, help="penalties of --anyway")
    options = parser.parse_args()
    models = options.out / "models" / f"seed-{options.seed}"
    pairs = unseen_pairs(read_recipe(options.recipe), options.longest, options.out / "base")
    if options.weak == "shorter":
        pairs = by_length(sum(pairs.values(), start=PreferencePairs([])))
    (strong,) = set(pairs) - {options.weak}
    split = RepairPairs.split(
        pairs, weak=options.weak, strong=strong, shares=options.shares, most_lost=options.most_lost, seed=0
    )
    print(split, flush=True)
    head = RewardHead.from_pretrained(models / "mixed")
    specialists = None
    if options.damage is not None:
        if not options.no_specialists:
            specialists = dict.fromkeys(split.fit, head)
        damaged = damage(head, split, int(options.damage[0]), float(options.damage[1]))
        head = damaged.head
    elif options.weak in OBJECTIVES and not options.no_specialists:
        specialists = {name: RewardHead.from_pretrained(models / name) for name in OBJECTIVES}
    if options.diagnose_only or options.anyway:
        evidence = Evidence.gather(head, split, specialists, progress=False)
        print(evidence.diagnosis())
        if options.anyway:
            refit_anyway(head, split, evidence.states, options.ridges)
        return
    more = {}
    if options.method == "gains":
        more = {"counts": options.counts, "shares": (0.5,), "steps": options.steps}
    mended = repair_and_print(head, split, options.method, specialists=specialists, n_random=options.n_random, **more)
    if mended is None:
        return
    if options.damage is not None and mended.edit is not None and mended.edit.gains is not None:
        changed = (mended.edit.gains != 1).cpu()
        n_found = int((changed & damaged.neurons.mask).sum())
        print(f"gains of {int(changed.sum())} neurons changed, {n_found} of them damaged")
    kind = "repair" if options.damage is None else "repair-damaged"
    name = f"{kind}-{options.weak}-{options.method.replace(' ', '_')}-{options.longest}.json"
    mended.report.save(options.out / name)


if __name__ == "__main__":
    main()
