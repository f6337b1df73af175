"""Whether a replication that is killed once in every stage, and started again each time, gives the same tables.

    python tests/programs/kills_of_replication.py [--rounds 1] [--seed 0]

A round starts `replicate` on a miniature, kills it (SIGKILL) at a random moment of its first stage, starts it again,
kills it in the second stage, and so on; then it lets it end. The tables, models, scores and dashboards are compared,
byte by byte, with those of an uninterrupted run. Progress is saved every twentieth of a second, so that a stage of
seconds has as many moments to resume from as one of hours.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from kills import ended, start

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from replication_place import make_place

import rmtension.store._work_folder
from rmtension.replication import Recipe, read_recipe, replicate
from rmtension.replication._stages import STAGES

rmtension.store._work_folder.EVERY, rmtension.store._work_folder._SHARE = 0.05, float("inf")

RECIPE = """
base: base
pairs: {helpful: helpful.jsonl, harmless: harmless.jsonl}
seeds: [0, 1]
max_length: 160
test_share: 0.5
validation_share: 0.1
training: {epochs: 2, learning_rate: 1e-3, batch_size: 8, trained_layers: 1, balance_length: true, eval_steps: 5}
study: {n_draws: 2, n_subsamples: 2, curve_fractions: [0.1], scores: [attribution_patching, magnitude, change]}
paper: {n_draws: 2, n_subsamples: 2, curve_fractions: [0.1]}
n_scoring: 24
n_evaluating: 24
n_single: 16
n_faithful: 6
n_sets: 12
n_neurons: 4
"""
# What holds times, or the order in which work was saved.
_TIMED = ("stages.csv", "stages.json", "plan-2-seeds.csv", "rmtension_training.json")
_COMPARED = (".csv", ".json", ".safetensors", ".txt")


def run(recipe: Recipe, out: Path, begun: Path) -> None:
    """Run the recipe, and write the name of every stage to `begun` when it begins."""

    def note(line: str) -> None:
        if line.startswith("stage"):
            with begun.open("a") as file:
                file.write(line.split(": ")[1] + "\n")

    replicate(recipe, out, progress=False, on_stage=note)


def kill_in(stage: str, seconds: float, begun: Path, child: int, draw: random.Random) -> bool:
    """Kill the child at a random moment of a stage; False if it ended before."""
    while not (begun.exists() and stage in begun.read_text().splitlines()):
        if ended(child, 0.005):
            return False
    if ended(child, draw.random() * seconds):
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def results(folder: Path) -> dict[str, bytes]:
    """The content of every file that an interrupted run must have too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _COMPARED and path.name not in _TIMED and "progress-" not in path.name
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    n_different = 0
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        recipe = read_recipe(make_place(place, RECIPE))
        whole = place / "whole"
        began = time.monotonic()
        child = start(lambda: run(recipe, whole, place / "begun-whole"))
        assert os.waitpid(child, 0)[1] == 0
        print(f"uninterrupted: {time.monotonic() - began:.0f} s", flush=True)
        seconds = json.loads((whole / "stages.json").read_text())
        expected = results(whole)
        for number in range(options.rounds):
            out = place / f"round-{number}"
            killed = []
            for stage in STAGES:
                begun = place / f"begun-{number}-{stage}"
                child = start(lambda out=out, begun=begun: run(recipe, out, begun))
                if kill_in(stage, seconds[stage], begun, child, draw):
                    killed.append(stage)
            child = start(lambda out=out, number=number: run(recipe, out, place / f"begun-{number}"))
            assert os.waitpid(child, 0)[1] == 0
            found = results(out)
            different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            n_different += len(different)
            print(
                f"round {number}: killed in {', '.join(killed)}; {len(expected) - len(different)} of {len(expected)} "
                f"files are the same{f', different: {different}' if different else ''}",
                flush=True,
            )
    return 1 if n_different else 0


if __name__ == "__main__":
    sys.exit(main())
