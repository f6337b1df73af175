"""A few neurons of a model."""

import torch

from rmtension import NeuronSet


def some(head, site):
    """A few neurons of every layer."""
    mask = torch.zeros(head.n_layers, head.n_neurons(site), dtype=torch.bool)
    mask[:, :: max(1, head.n_neurons(site) // 3)] = True
    return NeuronSet(mask, site, head.architecture)
