"""Ablations of one set at a time, which sweeps are compared with."""

import torch

from rmtension import AblationContext, NeuronSet, Zero


def some_sets(head, site="mlp"):
    """Sets in all layers, in the middle layer, in the middle and last layer, in the last layer; and an empty set."""
    random = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.3
    random[:, 0] = True
    sets = []
    for layers in (range(head.n_layers), [1], [1, head.n_layers - 1], [head.n_layers - 1], []):
        mask = torch.zeros_like(random)
        mask[list(layers)] = random[list(layers)]
        sets.append(NeuronSet(mask, site, head.architecture))
    return sets


def one_by_one(head, pairs, sets, replacement=Zero(), **options):
    scored = []
    for neurons in sets:
        with AblationContext(head, neurons, replacement, **options):
            scored.append(head.score_pairs(pairs))
    return scored
