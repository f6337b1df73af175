"""Examine single neurons: score and ablate them on every objective, and find their top-activating texts."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.attribution._methods import METHODS
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_pages import NeuronExample, NeuronPages
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.attribution._top_texts import LargestActivations, count_largest, find_examples
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.interventions._ablation import check_set
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores, jackknife_stderr
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass

# A scatter with more points than these is no clearer.
_MOST_POINTS = 5000
_INDEX = ("layer", "neuron")


def examine(
    head: RewardModel,
    pairs: Mapping[str, PreferencePairs],
    neurons: NeuronSet,
    *,
    method: str = "gradient_x_activation",
    positions: str = "all",
    n_examples: int = 4,
    n_random: int | None = None,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronPages:
    """Examine single neurons of a model on the pairs of each objective.

    Scores are those of `NeuronAttribution(head, method, positions=positions)`. An effect is the mean change of the
    margin when the neuron alone is set to zero at all tokens (`single_neuron_effects`); its interval is a jackknife
    over blocks of prompts with Student's t. The control is `n_random` other neurons, in the same proportion of layers
    (default: as many as `neurons`, or as many as are left). Examples are the pairs with the largest activation, in
    magnitude, at a token of `positions` in either response; the activation of an attention head is its norm.

    Cost per objective: a forward and a backward pass for the scores, a forward pass for activations, the cost of
    `single_neuron_effects` for all these neurons, and a pass over the few pairs that are shown.

    Raises `OptionError` for an empty set or an objective without pairs, `ProvenanceError` for a set of another model.

    Examples:
        >>> from rmtension.attribution import examine
        >>> pages = examine(head, pairs, neurons, n_examples=1)
        >>> len(pages.neurons), len(pages.table), len(pages.examples)
        (2, 4, 4)
    """
    require_arguments(
        "examine(head, pairs, neurons)", head=(head, RewardModel), pairs=(pairs, Mapping), neurons=(neurons, NeuronSet)
    )
    if not len(neurons):
        raise OptionError("neurons: expected a set with at least one neuron, got an empty set. Use NeuronScores.top.")
    if not pairs or not all(len(of_objective) for of_objective in pairs.values()):
        raise OptionError("pairs: expected a mapping of objectives to PreferencePairs with at least one pair each.")
    if n_examples < 0:
        raise OptionError(f"n_examples: expected 0 or more pairs per neuron and objective, got {n_examples}.")
    check_set(head, neurons)
    random = _control(neurons, len(neurons) if n_random is None else n_random, seed)
    table = _listed(neurons, "asked for")
    if len(random):
        table = pd.concat([table, _listed(random, "random")], ignore_index=True)
    rows = pd.MultiIndex.from_frame(table[[*_INDEX]])
    scores: dict[str, pd.DataFrame] = {}
    counts: list[pd.DataFrame] = []
    examples: list[NeuronExample] = []
    for objective, of_objective in pairs.items():
        attribution = NeuronAttribution(head, method, site=neurons.site, positions=positions)
        scores[objective] = attribution.score(of_objective, progress=progress).to_frame().set_index(list(_INDEX))
        effects = single_neuron_effects(
            head, of_objective, site=neurons.site, neurons=neurons | random, progress=progress
        )
        effect = effects.to_frame().set_index(list(_INDEX))["score"].loc[rows].to_numpy()
        statistic = LargestActivations(head, len(of_objective), neurons, positions)
        largest, n_blocks = run_pass(head, of_objective, statistic, progress=progress)
        half = _half_width(effects, n_blocks, level)[
            tuple(torch.from_numpy(table[[*_INDEX]].to_numpy().T.copy()))
        ].numpy()
        table[f"{objective}_score"] = scores[objective]["score"].loc[rows].to_numpy()
        table[f"{objective}_score_stderr"] = scores[objective]["stderr"].loc[rows].to_numpy()
        table[f"{objective}_effect"] = effect
        table[f"{objective}_effect_low"], table[f"{objective}_effect_high"] = effect - half, effect + half
        table[f"{objective}_n"] = len(of_objective)
        counts.append(count_largest(neurons, objective, largest))
        examples += find_examples(head, of_objective, neurons, objective, largest, n_examples)
    about = {
        "model": head.fingerprint,
        "architecture": head.architecture,
        "site": neurons.site,
        "positions": positions,
        "method": method,
        "sign": METHODS[method].sign,
        "level": level,
        "seed": seed,
        "n_neurons": neurons.mask.numel(),
        "pairs": {name: len(of_objective) for name, of_objective in pairs.items()},
        "digests": {name: of_objective.digest for name, of_objective in pairs.items()},
    }
    distribution = pd.concat(counts, ignore_index=True)
    return NeuronPages(table, _points(scores, neurons, seed), distribution, tuple(examples), about)


# -- parts -------------------------------------------------------------------------------------------------------------


def _control(neurons: NeuronSet, n: int, seed: int) -> NeuronSet:
    """About `n` other neurons, in each layer in proportion to `neurons`, or as many as the layer has left."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros_like(neurons.mask)
    for layer, taken in enumerate(neurons.mask):
        free = (~taken).nonzero()[:, 0].numpy()
        wanted = min(len(free), round(n * int(taken.sum()) / len(neurons)))
        mask[layer, torch.from_numpy(rng.choice(free, size=wanted, replace=False))] = True
    return NeuronSet(mask, neurons.site, neurons.architecture)


def _listed(neurons: NeuronSet, name: str) -> pd.DataFrame:
    """One row per neuron of a set called `name`."""
    frame = neurons.to_frame()
    frame.insert(0, "set", name)
    return frame


def _half_width(effects: NeuronScores, n_blocks: int, level: float) -> Float[Tensor, "layer neuron"]:
    """Half the width of the interval around each effect; NaN if the pairs have a single block."""
    factor = float(stats.t.ppf((1 + level) / 2, n_blocks - 1)) if n_blocks > 1 else float("nan")
    return factor * jackknife_stderr(effects.require_blocks())


def _points(scores: Mapping[str, pd.DataFrame], neurons: NeuronSet, seed: int) -> pd.DataFrame:
    """The scores of all neurons, or of the set and a random part of the others."""
    n = neurons.mask.numel()
    shown = neurons.mask.flatten().clone()
    shown[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:_MOST_POINTS])] = True
    columns = {objective: frame["score"] for objective, frame in scores.items()}
    return pd.DataFrame(columns)[shown.numpy()].reset_index()
