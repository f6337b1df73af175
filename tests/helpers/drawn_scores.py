"""Scores, sets and rewards drawn at random, with a provenance."""

import torch

from rmtension import NeuronScores, NeuronSet, PairRewards, PreferencePairs
from rmtension.store._provenance import Provenance


def scored_of(margins, *, prompts=None, subsets=None):
    """Pairs with the given margins."""
    rows = [
        {
            "prompt": f"Q{number if prompts is None else prompts[number]}",
            "chosen": f"a{number}",
            "rejected": f"bb{number}",
            "subset": None if subsets is None else subsets[number],
        }
        for number in range(len(margins))
    ]
    chosen = torch.as_tensor(margins, dtype=torch.float64)
    return PairRewards(chosen, torch.zeros_like(chosen), PreferencePairs.from_records(rows), provenance())


def provenance(**changes):
    fields = {
        "architecture": "toy",
        "model": "m",
        "site": "mlp",
        "positions": "all",
        "method": "mean_difference",
        "dtype": "float32",
        "data": "d",
        "n_pairs": 10,
        "n_tokens": 100,
        "version": "0",
    }
    return Provenance(**fields | changes)


def scores_of(values, **changes):
    return NeuronScores(values, torch.ones_like(values), provenance(**changes))


def random_set(seed, shape=(4, 25), share=0.3):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    return NeuronSet(mask, "mlp", "toy")
