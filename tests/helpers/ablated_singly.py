"""Single ablations, which sweeps are compared with."""

import torch

from rmtension import (
    AblationContext,
    NeuronSet,
    Zero,
)


def some_sets(head, site="mlp"):
    """In the first layer and all others, the middle one, the last two, the last; and an empty one."""
    random = torch.rand(head.n_layers, head.n_neurons(site), generator=torch.Generator().manual_seed(0)) < 0.3
    random[:, 0] = True
    sets = []
    for layers in (range(head.n_layers), [1], [1, head.n_layers - 1], [head.n_layers - 1], []):
        mask = torch.zeros_like(random)
        mask[list(layers)] = random[list(layers)]
        sets.append(NeuronSet(mask, site, head.architecture))
    return sets


def one_by_one(head, pairs, sets, replacement=Zero(), **options):
    found = []
    for one in sets:
        with AblationContext(head, one, replacement, **options):
            found.append(head.score_pairs(pairs))
    return found
