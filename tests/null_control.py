"""What a study says about reward models that were never trained: run with `python tests/null_control.py --studies 20`.

Three independent random models share no neurons and know no preference, so overlap should be what chance gives in each
layer, effects of "their" neurons those of random ones, and accuracy a coin's. The test suite runs a small part of it.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from conftest import make_config

from rmtension import PreferencePairs, RewardHead, StudyOptions, StudyResult, TensionStudy
from rmtension.organisms import preference_world
from rmtension.training import train_tokenizer


def untrained_study(
    seed: int, folder: Path, *, shuffle: bool = False, n_test: int = 192, n_draws: int = 8
) -> StudyResult:
    """A study of three random GPT-2-shaped models on the embedded world, with labels shuffled or not."""
    import transformers

    world = preference_world(seed, n_train=48, n_test=n_test)
    tokenizer = train_tokenizer(world.texts, 512)
    heads = {}
    for number, name in enumerate(("helpful", "harmless", "mixed")):
        with torch.random.fork_rng():
            torch.manual_seed(3 * seed + number)
            config = make_config("gpt2", len(tokenizer), n_positions=256)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        heads[name] = RewardHead.from_pretrained(folder / name)
    pairs = {name: shuffled(part, seed) if shuffle else part for name, part in world.test.items()}
    return TensionStudy(heads, pairs, options=StudyOptions(seed=seed, n_draws=n_draws)).run(progress=False)


def shuffled(pairs: PreferencePairs, seed: int) -> PreferencePairs:
    """Every preference turned round or not by a coin."""
    turn = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return PreferencePairs(pair.swapped() if flip else pair for pair, flip in zip(pairs, turn, strict=True))


def coverage(results: list[StudyResult]) -> dict[str, float]:
    """Shares of intervals that cover "nothing", and what overlap there is beside what chance expects."""
    ablation = pd.concat([result.ablation for result in results])
    overlap = pd.concat([result.overlap for result in results])
    accuracy = pd.concat([result.accuracy for result in results])
    accuracy = accuracy[(accuracy["measure"] == "accuracy") & (accuracy["model"] != "length only")]
    per_model = accuracy.groupby("objective")["value"]
    error = float(per_model.std().max() / np.sqrt(per_model.count().min()))
    return {
        "studies": len(results),
        "ablation intervals": len(ablation),
        "beyond random covers 0": float(((ablation["beyond_low"] <= 0) & (ablation["beyond_high"] >= 0)).mean()),
        "comparisons of sets": len(overlap),
        "mean Jaccard": float(overlap["jaccard"].mean()),
        "expected by chance": float(overlap["expected_jaccard"].mean()),
        "expected by chance in each layer": float(overlap["layer_expected_jaccard"].mean()),
        "p <= 0.05": float((overlap["p_value"] <= 0.05).mean()),
        "p in each layer <= 0.05": float((overlap["layer_p_value"] <= 0.05).mean()),
        "accuracy intervals": len(accuracy),
        "accuracy interval covers 1/2": float(((accuracy["low"] <= 0.5) & (accuracy["high"] >= 0.5)).mean()),
        "mean accuracy, helpful": float(per_model.mean()["helpful"]),
        "mean accuracy, harmless": float(per_model.mean()["harmless"]),
        "standard error over models": error,
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = {}
    for shuffle, title in ((False, "the world's labels"), (True, "labels by a coin")):
        with tempfile.TemporaryDirectory() as folder:
            results = [
                untrained_study(seed, Path(folder) / str(seed), shuffle=shuffle) for seed in range(options.studies)
            ]
        columns[title] = coverage(results)
    print(pd.DataFrame(columns).round(3).to_string())


if __name__ == "__main__":
    main()
