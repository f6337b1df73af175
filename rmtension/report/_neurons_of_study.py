"""Single neurons of a study's mixed model, selected on its scoring pairs and shown on its evaluation pairs."""

from pathlib import Path

import torch

from rmtension.attribution._make_dashboards import neuron_dashboards
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.errors import OptionError
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead
from rmtension.store._work_folder import below
from rmtension.study._model_output import ModelOutput
from rmtension.study._tension_study import TensionStudy


def study_neurons(
    study: TensionStudy, *, n: int = 16, work: str | Path | None = None, progress: bool | None = None
) -> NeuronDashboards:
    """Make dashboards of the `n` neurons of the first family's mixed model that score highest on either objective.

    The neurons are selected by gradient x activation on the scoring pairs, with each objective's scores divided by its
    largest. Their dashboards (`attribution.neuron_dashboards`) are of the evaluation pairs, so that no effect is
    measured on pairs that selected the neuron. `work` is a folder from which an interrupted run resumes. Raises
    `OptionError` for `n` below 1. Cost: that of `neuron_dashboards`, and a forward and a backward pass over the scoring
    pairs.

    Examples:
        >>> from rmtension import TensionStudy
        >>> study = TensionStudy(dict.fromkeys(("helpful", "harmless", "mixed"), head), pairs)
        >>> study_neurons(study, n=2, progress=False)
        NeuronDashboards(2 mlp neurons of gpt2-2x24-heads2x12-d24; 12 helpful, 12 harmless)
    """
    if n < 1:
        raise OptionError(f"n: expected at least one neuron, got {n}.")
    mixed, options = study.families[0].mixed, study.options
    if isinstance(mixed, ModelOutput):
        mixed = mixed.open()
    head = mixed if isinstance(mixed, RewardHead) else RewardHead.from_pretrained(mixed)
    attribution = NeuronAttribution(head, "gradient_x_activation", site=options.site, positions=options.positions)
    sizes = [
        attribution.score(part, work=below(work, f"choice-{number}"), progress=progress).values.abs()
        for number, part in enumerate(study.scoring.values())
    ]
    largest = torch.stack([size / size.max().clamp(min=1e-30) for size in sizes]).amax(dim=0)
    mask = torch.zeros(largest.shape, dtype=torch.bool)
    mask.view(-1)[largest.flatten().argsort(descending=True, stable=True)[:n]] = True
    neurons = NeuronSet(mask, options.site, head.architecture)
    return neuron_dashboards(
        head,
        neurons,
        study.evaluating,
        positions=options.positions,
        level=options.level,
        work=work,
        progress=progress,
    )
