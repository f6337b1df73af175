"""Repair a real mixed model that was trained on few pairs of one objective.

    python tests/programs/mended_scarce.py smollm2.yaml --out replication --method "head refit"
    python tests/programs/mended_scarce.py smollm2.yaml --out replication --splits 10

`--out` is the folder of `rmtension replicate`, whose base and pairs are used. All helpful training pairs and those of
5% of the harmless prompts train a model with the recipe's settings, for about an hour on one core, unless it is there;
helpful validation pairs choose the checkpoint. The pairs that it did not see, most of them harmless, are divided by
prompt into fit, development and test pairs. It prints the diagnosis and the tables of the report, which is written to
--out with the repaired model. With `--splits`, the states of all pairs are read once, and head refits are chosen and
tested on that many random divisions, for several losses that are allowed.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from mended_replication import repair_and_print, without_prompts
from published_repairs import row_of
from transformers import AutoTokenizer

from rmtension import PreferencePairs, RewardHead
from rmtension.repair import RepairPairs
from rmtension.repair._choice import change_of_accuracy, correct
from rmtension.repair._diagnose import Evidence
from rmtension.repair._features import ReadStates, SplitStates, read_states
from rmtension.repair._probe import fit_probe
from rmtension.repair._refit import refit_head
from rmtension.replication import read_recipe
from rmtension.replication._prepare import PreparedPairs, prepare_base, prepare_pairs
from rmtension.replication._recipe import Recipe
from rmtension.report import write_report
from rmtension.training import train_reward_model
from rmtension.training._family_trainings import reward_arguments

PLENTY, SCARCE = "helpful", "harmless"


def seen_prompts(pairs: PreparedPairs, share: float, seed: int) -> set[str]:
    """The scarce objective's prompts in training: a share of all."""
    prompts = sorted(set(pairs.parts["train"][SCARCE].prompts))
    random.Random(seed).shuffle(prompts)
    return set(prompts[: round(share * len(prompts))])


def train(recipe: Recipe, pairs: PreparedPairs, few: set[str], base: Path, folder: Path, seed: int) -> None:
    """Train the mixed model, on this process's threads."""
    scarce = PreferencePairs(pair for pair in pairs.parts["train"][SCARCE] if pair.prompt in few)
    train_reward_model(
        pairs.parts["train"][PLENTY] + scarce,
        str(base),
        folder,
        **reward_arguments(recipe.training),
        validation=pairs.parts["validation"][PLENTY],
        max_length=recipe.max_length,
        seed=seed,
        work=folder.with_name(f"{folder.name}-training"),
        on_log=print,
    )


def refits_of_splits(head: RewardHead, pairs: dict[str, PreferencePairs], options: argparse.Namespace) -> pd.DataFrame:
    """One row per division and allowed loss: the gap, the refit that is taken, and what it does to test pairs."""
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for part in pairs.values():
        states = read_states(head, part, progress=False)
        known |= {pair.digest(): values for pair, *values in zip(part, states.difference, states.margin, strict=True)}

    def of(groups: dict[str, PreferencePairs]) -> dict[str, ReadStates]:
        found = {name: zip(*(known[pair.digest()] for pair in part), strict=True) for name, part in groups.items()}
        return {name: ReadStates(*map(torch.stack, columns)) for name, columns in found.items()}

    row = row_of(head)
    rows = []
    for seed in range(options.splits):
        given = RepairPairs.split(
            pairs, weak=SCARCE, strong=PLENTY, shares=options.shares, most_lost=max(options.most_lost), seed=seed
        )
        states, test = SplitStates(of(given.fit), of(given.development)), of(given.test)
        probe = fit_probe(states.fit[SCARCE], states.fit[PLENTY], given.fit[SCARCE])
        for most_lost in options.most_lost:
            split = replace(given, most_lost=most_lost)
            edit, path = refit_head(head, split, states=states)
            found = Evidence(head, split, states, states.margins, edit, probe, None).diagnosis()
            rows.append({"split": seed, "most_lost": most_lost, "gap": str(found.gap), "made": edit is not None})
            rows[-1] |= {"gaining": int((path[f"{SCARCE}_low"] > 0).sum()), "largest": path[f"{SCARCE}_change"].max()}
            if edit is None:
                continue
            new = row_of(edit.apply(head))
            for name, part in test.items():
                change = correct(part.margin + part.difference @ (new - row)) - correct(part.margin)
                rows[-1][f"{name} test"] = str(change_of_accuracy(change, split.test[name]))
    return pd.DataFrame(rows)


def main() -> None:
    """Train, diagnose, repair, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the training and its pairs")
    parser.add_argument("--share", type=float, default=0.05, help="of the harmless prompts in training")
    parser.add_argument("--method", default="head refit")
    parser.add_argument("--counts", type=int, nargs="+", default=(46, 230, 460), help="numbers of neurons, for gains")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.35, 0.35, 0.3), help="fit, development, test")
    parser.add_argument("--n-random", type=int, default=2, help="random sets of neurons, for gains")
    parser.add_argument("--most-lost", type=float, nargs="+", default=[0.15], help="several with --splits only")
    parser.add_argument("--longest", type=int, default=288, help="tokens of a helpful text that was not trained on")
    parser.add_argument("--splits", type=int, default=0, help="refit on this many divisions, and end")
    options = parser.parse_args()
    recipe = read_recipe(options.recipe)
    base = prepare_base(recipe.base, options.out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = prepare_pairs(recipe, tokenizer)
    few = seen_prompts(pairs, options.share, options.seed)
    folder = options.out / f"scarce-{options.share}-seed-{options.seed}"
    if not folder.exists():
        train(recipe, pairs, few, base, folder, options.seed)
    seen = few | {prompt for split in ("train", "validation") for prompt in pairs.parts[split][PLENTY].prompts}
    # Helpful pairs are the fewer ones, so longer ones are taken too.
    longer = prepare_pairs(replace(recipe, max_length=options.longest), tokenizer)
    unseen = {name: without_prompts(of.parts, name, seen) for name, of in ((PLENTY, longer), (SCARCE, pairs))}
    head = RewardHead.from_pretrained(folder)
    if options.splits:
        print(refits_of_splits(head, unseen, options).round(3).to_string(index=False))
        return
    split = RepairPairs.split(
        unseen, weak=SCARCE, strong=PLENTY, shares=options.shares, most_lost=options.most_lost[0], seed=0
    )
    print(split, flush=True)
    more = {"counts": options.counts, "shares": (0.5,), "steps": 1} if options.method == "gains" else {}
    mended = repair_and_print(head, split, options.method, n_random=options.n_random, **more)
    if mended is None:
        return
    out = folder.with_name(f"{folder.name}-{options.method.replace(' ', '-')}")
    if mended.edit is not None:
        mended.save_pretrained(out)
    write_report(mended.report, out)


if __name__ == "__main__":
    main()
