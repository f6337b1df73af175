"""How often the study finds a planted shared set: `python tests/programs/planted.py --runs 100`.

Every run makes three reward models with random weights, in which chosen neurons of the first two layers respond to the
last word of a response: some to the word that helpful pairs prefer, some to the word that harmless pairs prefer, and
some to both. The study has to find the shared neurons and measure their effect. A random set that is matched to them
has to show no effect. Each set is compared with random sets of as many neurons in every layer, and with sets that also
match the magnitudes; "both" is the share in which both intervals are on the same side of 0. "adjusted" asks that of
intervals at 99%, as a report does for the first of its five questions about sets.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny_models import WORDS, make_config, make_tokenizer

from rmtension import Mean, NeuronSet, PreferencePairs, RewardHead, StudyOptions, TensionStudy
from rmtension.plots._rows import Rows
from rmtension.report._finding import side_of
from rmtension.report._mean_row import at_level
from rmtension.study._causality import Ablations, ablation_matrix
from rmtension.study._model_runs import ModelRuns

OBJECTIVES = ("helpful", "harmless")
LAST_WORDS = {"helpful": ("sure", "cannot"), "harmless": ("sorry", "help")}
N_SHARED, N_SPECIFIC = 12, 8
LAYERS = (0, 1)
BEYOND = ("beyond_random", "beyond_low", "beyond_high")


def planted_pairs(seed: int, n: int) -> dict[str, PreferencePairs]:
    """Pairs whose responses consist of random words and a last word that says which response is preferred."""
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


def planted_neurons(seed: int) -> dict[str, list[tuple[int, int]]]:
    """The planted neurons as (layer, index), by kind."""
    order = np.random.default_rng(seed).permutation(len(LAYERS) * 128)
    neurons = [(LAYERS[number // 128], int(number % 128)) for number in order[: N_SHARED + 2 * N_SPECIFIC]]
    return {
        "shared": neurons[:N_SHARED],
        "helpful": neurons[N_SHARED : N_SHARED + N_SPECIFIC],
        "harmless": neurons[N_SHARED + N_SPECIFIC :],
    }


def planted_head(
    seed: int, name: str, tokenizer, neurons: dict[str, list[tuple[int, int]]], strength: float, background: float
):
    """A random GPT-2-shaped classifier with the shared neurons and those of objective `name` ("mixed": of both)."""
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
            for layer, neuron in neurons[kind]:
                mlp = model.transformer.h[layer].mlp
                mlp.c_fc.weight.data[:, neuron] = reads[kind]
                mlp.c_fc.bias.data[neuron] = 0
                mlp.c_proj.weight.data[neuron] = strength * row / row.norm()
    return RewardHead.from_classifier(model.eval(), tokenizer=tokenizer)


def planted_run(
    seed: int,
    tokenizer,
    *,
    n_pairs: int = 120,
    strength: float = 0.15,
    background: float = 0.03,
    n_draws: int = 16,
    positions: str = "all",
) -> dict[str, object]:
    """Precision and recall of the study's shared set; whether the intervals of three sets exclude 0, by control."""
    neurons = planted_neurons(seed)
    heads = {
        name: planted_head(3 * seed + number, name, tokenizer, neurons, strength, background)
        for number, name in enumerate((*OBJECTIVES, "mixed"))
    }
    options = StudyOptions(
        seed=seed, scores=("mean_difference",), fraction=0.06, analyses=("scores",), positions=positions
    )
    study = TensionStudy(heads, planted_pairs(seed, n_pairs), options=options)
    table = study.run(progress=False).neurons
    mixed = heads["mixed"]
    model = {"shape": (3, 128), "site": "mlp", "architecture": mixed.architecture}
    known = NeuronSet.from_indices(neurons["shared"], **model)
    planted = NeuronSet.from_indices([neuron for kind in neurons.values() for neuron in kind], **model)
    is_shared = torch.tensor(table["in_shared"].to_numpy(dtype=bool)).view(3, 128)
    sets = {
        "known": known,
        "found": NeuronSet(is_shared, "mlp", mixed.architecture),
        "random": known.matched_random(seed=10_000 + seed, exclude=planted),
    }
    runs = ModelRuns(mixed)
    means = runs.statistics(study.scoring["helpful"] + study.scoring["harmless"])
    ablations = Ablations(runs, study.evaluating, replacement=Mean(means), seed=seed)
    exclude = planted | sets["random"]
    matrix = ablation_matrix(ablations, sets, n_draws=n_draws, exclude=exclude, magnitude=means.abs_mean)
    hits = int((is_shared & known.mask).sum())
    row: dict[str, object] = {"precision": hits / max(1, int(is_shared.sum())), "recall": hits / N_SHARED}
    for (name, objective), effects in matrix.query("quantity == 'margin'").groupby(["set", "objective"], sort=False):
        sides = {effect.control: side_of(effect.beyond_low, effect.beyond_high) for effect in effects.itertuples()}
        row |= {f"{name} {objective} {control}": side != 0 for control, side in sides.items()}
        row[f"{name} {objective} both"] = agree(sides.values())
        wider = at_level(Rows(effects, 0.95), *BEYOND, level=0.99, n_draws=n_draws).frame
        row[f"{name} {objective} adjusted"] = agree(
            side_of(effect.beyond_low, effect.beyond_high) for effect in wider.itertuples()
        )
    return row


def agree(sides: Iterable[int]) -> bool:
    """Whether all intervals are on the same side of 0."""
    return set(sides) in ({1}, {-1})


def main() -> None:
    """Print the shares of intervals that exclude 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--strength", type=float, default=0.15, help="length of what a planted neuron writes")
    parser.add_argument("--background", type=float, default=0.03, help="spread of the other weights beyond GPT-2's .02")
    parser.add_argument("--draws", type=int, default=16, help="random sets of the control")
    parser.add_argument("--positions", choices=("all", "response", "last"), default="all", help="tokens for the scores")
    options = parser.parse_args()
    design = {"strength": options.strength, "background": options.background, "n_draws": options.draws}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(folder)
        runs = [planted_run(seed, tokenizer, positions=options.positions, **design) for seed in range(options.runs)]
    table = pd.DataFrame(runs)
    print(f"{options.runs} runs, {design}, positions {options.positions}: mean over runs")
    print(table.mean().round(3).to_string())


if __name__ == "__main__":
    main()
