"""Is a shared set found where one was planted? `python tests/programs/planted.py --runs 100`.

Every run makes three reward models with random weights in which chosen neurons of the first two layers answer to the
last word of a response: some to the word that helpful pairs prefer, some to the word of harmless pairs, some to both.
The study then has to find and measure the shared ones, and a matched random set in their place has to show nothing.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import WORDS, make_config, make_tokenizer

from rmtension import Mean, NeuronSet, PreferencePairs, RewardHead, StudyOptions, TensionStudy
from rmtension.study._causality import Ablations, ablation_matrix
from rmtension.study._model_runs import ModelRuns

OBJECTIVES = ("helpful", "harmless")
LAST_WORDS = {"helpful": ("sure", "cannot"), "harmless": ("sorry", "help")}
N_SHARED, N_SPECIFIC = 12, 8
LAYERS = (0, 1)


def planted_pairs(seed: int, n: int) -> dict[str, PreferencePairs]:
    """Pairs whose responses differ in nothing but their last word and random words before it."""
    draw = random.Random(seed)

    def response(last: str) -> str:
        return " ".join([*draw.choices(WORDS, k=draw.randint(2, 6)), last])

    return {
        name: PreferencePairs.from_records(
            {
                "prompt": f"\n\nHuman: {' '.join(draw.choices(WORDS, k=4))} {number} {name}\n\nAssistant:",
                "chosen": response(good),
                "rejected": response(bad),
                "objective": name,
            }
            for number in range(n)
        )
        for name, (good, bad) in LAST_WORDS.items()
    }


def planted_places(seed: int) -> dict[str, list[tuple[int, int]]]:
    """Where the planted neurons are."""
    order = np.random.default_rng(seed).permutation(len(LAYERS) * 128)
    places = [(LAYERS[place // 128], int(place % 128)) for place in order[: N_SHARED + 2 * N_SPECIFIC]]
    return {
        "shared": places[:N_SHARED],
        "helpful": places[N_SHARED : N_SHARED + N_SPECIFIC],
        "harmless": places[N_SHARED + N_SPECIFIC :],
    }


def planted_head(
    seed: int, name: str, tokenizer, places: dict[str, list[tuple[int, int]]], strength: float, background: float
):
    """A random GPT-2-shaped classifier with the neurons that `name` has: shared ones, and its own or both."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = make_config("gpt2", len(tokenizer), n_inner=128, n_head=1)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data += background * torch.randn_like(parameter)
        words = {
            objective: [tokenizer(f" {word}")["input_ids"][-1] for word in pair]
            for objective, pair in LAST_WORDS.items()
        }
        embedding = model.transformer.wte.weight.data
        directions = {}
        for objective, (good, bad) in words.items():
            gap = embedding[good] - embedding[bad]
            directions[objective] = gap / gap.norm()
        reads = {"shared": directions["helpful"] + directions["harmless"], **directions}
        kinds = ["shared", *(OBJECTIVES if name == "mixed" else [name])]
        row = model.score.weight.data[0]
        for kind in kinds:
            for layer, neuron in places[kind]:
                mlp = model.transformer.h[layer].mlp
                mlp.c_fc.weight.data[:, neuron] = reads[kind]
                mlp.c_fc.bias.data[neuron] = 0
                mlp.c_proj.weight.data[neuron] = strength * row / row.norm()
    return RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)


def planted_run(
    seed: int, tokenizer, *, n_pairs: int = 120, strength: float = 0.15, background: float = 0.03
) -> dict[str, object]:
    """One run: what the study finds of the planted set, and the intervals of known, found and random sets."""
    places = planted_places(seed)
    heads = {
        name: planted_head(3 * seed + number, name, tokenizer, places, strength, background)
        for number, name in enumerate((*OBJECTIVES, "mixed"))
    }
    options = StudyOptions(seed=seed, scores=("mean_difference",), fraction=0.06, analyses=("scores",))
    study = TensionStudy(heads, planted_pairs(seed, n_pairs), options=options)
    neurons = study.run(progress=False).neurons
    mixed = heads["mixed"]
    place = {"shape": (3, 128), "site": "mlp", "architecture": mixed.architecture}
    known = NeuronSet.from_indices(places["shared"], **place)
    planted = NeuronSet.from_indices([one for kind in places.values() for one in kind], **place)
    found = torch.tensor(neurons["in_shared"].to_numpy(dtype=bool)).view(3, 128)
    sets = {
        "known": known,
        "found": NeuronSet(found, "mlp", mixed.architecture),
        "random": known.matched_random(seed=10_000 + seed, exclude=planted),
    }
    runs = ModelRuns(mixed)
    means = runs.statistics(study.scoring["helpful"] + study.scoring["harmless"])
    ablations = Ablations(runs, study.evaluating, replacement=Mean(means), seed=seed)
    table = ablation_matrix(ablations, sets, n_draws=16, exclude=planted | sets["random"]).query("quantity == 'margin'")
    hits = int((found & known.mask).sum())
    row: dict[str, object] = {"precision": hits / max(1, int(found.sum())), "recall": hits / N_SHARED}
    for one in table.itertuples():
        row[f"{one.set} {one.objective}"] = bool(one.beyond_low > 0 or one.beyond_high < 0)
    return row


def main() -> None:
    """Print the shares of intervals that exclude 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--strength", type=float, default=0.15, help="length of what a planted neuron writes")
    parser.add_argument("--background", type=float, default=0.03, help="spread of the other weights beyond GPT-2's .02")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
        table = pd.DataFrame(
            [
                planted_run(seed, tokenizer, strength=options.strength, background=options.background)
                for seed in range(options.runs)
            ]
        )
    print(f"{options.runs} runs, strength {options.strength}, background {options.background}: mean over runs")
    print(table.mean().round(3).to_string())


if __name__ == "__main__":
    main()
