"""Train a base and three reward models on your own preference pairs, and study them. Everything runs offline.

    python examples/real_pairs.py --helpful a.jsonl.gz b.jsonl --harmless c.jsonl.gz --out real-pairs

Each line of a file is a JSON object with "prompt", "chosen" and "rejected". Pairs without a response, and pairs with a
response longer than the context, are left out and counted. A fifth of the prompts is kept for testing. The base is a
small GPT-2-shaped model trained from scratch on the text of the training pairs; every seed trains three reward models
from it. Sizes, steps and seeds are options. A second run trains and runs only what is missing in `--out`.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from rmtension import PreferencePairs, StudyOptions, TensionStudy
from rmtension.data import encode_pairs
from rmtension.report import to_text, write_report
from rmtension.training import FamilySettings, train_base_model, train_seeds, train_tokenizer

OBJECTIVES = ("helpful", "harmless")


def read(paths: list[Path], objective: str) -> PreferencePairs:
    """All pairs of some files, without repetitions and without pairs that lack a response."""
    pairs = PreferencePairs([])
    for path in paths:
        pairs = pairs + PreferencePairs.read(path, on_invalid="skip", objective=objective)
    distinct = {pair.digest(): pair for pair in pairs}
    print(f"{objective}: {pairs!r}; {len(pairs) - len(distinct)} repeated")
    return PreferencePairs(distinct.values())


def fitting(pairs: PreferencePairs, tokenizer: object, max_length: int) -> PreferencePairs:
    """The pairs whose responses both fit the context, because a response that is cut is another response."""
    whole = encode_pairs(tokenizer, pairs, max_length=sys.maxsize)
    longest = [
        max(len(text) - text.response_start for text in both) for both in zip(whole.chosen, whole.rejected, strict=True)
    ]
    return PreferencePairs(pair for pair, length in zip(pairs, longest, strict=True) if length <= max_length)


def divide(
    pairs: dict[str, PreferencePairs], seed: int
) -> tuple[dict[str, PreferencePairs], dict[str, PreferencePairs]]:
    """Training and test pairs by objective; a prompt that both objectives have is on one side for both."""
    everything = pairs["helpful"] + pairs["harmless"]
    sides = everything.split(0.2, seed=seed)
    train, test = ({name: side.filter(objective=name) for name in OBJECTIVES} for side in sides)
    return train, test


def train_base(texts: list[str], tokenizer: object, folder: Path, options: argparse.Namespace) -> Path:
    """Train a small GPT-2-shaped language model from scratch on the preferred texts of both objectives."""
    config = transformers.GPT2Config(
        vocab_size=options.vocab_size,
        n_positions=options.max_length,
        n_layer=options.layers,
        n_embd=options.d_model,
        n_head=options.heads,
    )
    return train_base_model(
        texts,
        config,
        tokenizer,
        folder,
        seed=0,
        epochs=options.base_epochs,
        learning_rate=options.base_learning_rate,
        overwrite=options.overwrite,
        resume=True,
    )


def settings_of(options: argparse.Namespace) -> StudyOptions:
    """The study's options that the command line sets."""
    fractions = tuple(options.curve_fractions)
    return StudyOptions(
        n_draws=options.draws,
        n_subsamples=options.subsamples,
        curve_fractions=fractions,
        positions=options.positions,
    )


def main() -> None:
    """Read the pairs, train the models, run the study and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helpful", type=Path, nargs="+", required=True)
    parser.add_argument("--harmless", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("real-pairs"))
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--train-pairs", type=int, default=2000, help="largest number per objective")
    parser.add_argument("--test-pairs", type=int, default=600, help="largest number per objective")
    parser.add_argument("--base-epochs", type=float, default=0.5)
    parser.add_argument("--reward-epochs", type=float, default=2.0)
    parser.add_argument("--base-learning-rate", type=float, default=1e-3)
    parser.add_argument("--reward-learning-rate", type=float, default=3e-4)
    parser.add_argument("--draws", type=int, default=8, help="random control sets")
    parser.add_argument("--subsamples", type=int, default=8, help="subsamples of each set at equal size")
    parser.add_argument("--curve-fractions", type=float, nargs="+", default=[0.05, 0.1, 0.3], help="of the neurons")
    parser.add_argument("--positions", choices=("all", "response", "last"), default="all", help="tokens for the scores")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    settings = FamilySettings(
        max_length=options.max_length,
        reward_epochs=options.reward_epochs,
        reward_learning_rate=options.reward_learning_rate,
    )
    start = time.monotonic()
    pairs = {name: read(getattr(options, name), name) for name in OBJECTIVES}
    train, test = divide(pairs, seed=0)
    texts = [pair.text("chosen") for part in train.values() for pair in part]
    tokenizer = train_tokenizer(texts[::2], options.vocab_size, max_length=options.max_length)
    sides = []
    for side, most in ((train, options.train_pairs), (test, options.test_pairs)):
        fit = {name: fitting(part, tokenizer, options.max_length) for name, part in side.items()}
        sides.append({name: part.sample(most, seed=0) for name, part in fit.items()})
        for name in OBJECTIVES:
            print(f"{len(fit[name])} of {len(side[name])} pairs fit; used: {name} {sides[-1][name]!r}", flush=True)
    train, test = sides
    texts = sorted({pair.text("chosen") for part in train.values() for pair in part})
    base = train_base(texts, tokenizer, options.out / "models" / "base", options)
    print(f"base trained after {time.monotonic() - start:.0f} s", flush=True)
    families = train_seeds(
        train,
        options.out / "models",
        range(options.seeds),
        base=base,
        settings=settings,
        name="real pairs",
        overwrite=options.overwrite,
    )
    print(f"reward models trained after {time.monotonic() - start:.0f} s", flush=True)
    study = TensionStudy(families, test, options=settings_of(options))
    result = study.run(folder=options.out)
    result.save(options.out, overwrite=True)
    write_report(result, options.out)
    print(to_text(result), flush=True)
    record = {name: str(value) for name, value in vars(options).items() if name not in ("helpful", "harmless", "out")}
    (options.out / "options.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"Written to {options.out} in {time.monotonic() - start:.0f} s; {study.n_run} passes run, {study.n_read} read."
    )


if __name__ == "__main__":
    main()
