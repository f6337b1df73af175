"""Single neurons of a study's mixed model, chosen on one half of its pairs and looked at on the other."""

import torch

from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_pages import NeuronPages, examine
from rmtension.errors import OptionError
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead
from rmtension.study._tension_study import TensionStudy


def study_neurons(study: TensionStudy, *, n: int = 16, progress: bool | None = None) -> NeuronPages:
    """`examine` the `n` neurons of the first family's mixed model that score highest on either objective.

    Chosen by gradient x activation on the scoring pairs, each objective's scores in units of its largest; examined on
    the evaluation pairs, so that no effect is measured on pairs that chose the neuron. Cost: that of `examine`, and a
    forward and a backward pass over the scoring pairs.
    """
    if n < 1:
        raise OptionError(f"n: expected at least one neuron, got {n}.")
    mixed, options = study.families[0].mixed, study.options
    head = mixed if isinstance(mixed, RewardHead) else RewardHead.from_pretrained(mixed)
    attribution = NeuronAttribution(head, "gradient_x_activation", site=options.site, positions=options.positions)
    sizes = [attribution.score(some, progress=progress).values.abs() for some in study.scoring.values()]
    height = torch.stack([size / size.max().clamp(min=1e-30) for size in sizes]).amax(dim=0)
    mask = torch.zeros(height.shape, dtype=torch.bool)
    mask.view(-1)[height.flatten().argsort(descending=True, stable=True)[:n]] = True
    neurons = NeuronSet(mask, options.site, head.architecture)
    return examine(head, study.evaluating, neurons, positions=options.positions, level=options.level, progress=progress)
