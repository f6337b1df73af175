"""How fast a model runs on this machine, measured on a few pairs, for plans."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rmtension.attribution._faithfulness import sample_neurons
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.data._chat import n_characters, prompt_text
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.interventions._sweep import score_without
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.reward_head import RewardHead

# A model that runs a batch faster than this, in seconds, is timed on several batches, because one says less.
_FAST, _BATCHES = 0.5, 4
# A model that runs a batch slower than this is timed on fewer pairs, because timing takes about 30 forward passes.
_SLOW = 2.0
# Neurons ablated one by one to time one more of them.
_NEURONS = 4


@dataclass(frozen=True)
class Speed:
    """Seconds per character of text on this machine, and fixed seconds, measured on one batch of pairs.

    `forward` and `gradient` are passes over both texts of the pairs, `ablation` one more ablated set in a sweep, and
    `neuron` one more neuron ablated alone. `fixed` is what one call costs however few pairs it gets.
    """

    forward: float
    gradient: float
    ablation: float
    neuron: float
    fixed: float


def duration(seconds: int | float) -> str:
    """A time as a reader says it: "40 s", "12 min", "1.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def measure_speed(head: RewardHead, pairs: PreferencePairs, *, site: str, fraction: float, seed: int) -> Speed:
    """Time one batch of pairs in every way that an inspection runs the model; a few batches of a fast model."""
    n = _pairs_per_batch(head, pairs)
    few = pairs.sample(n, seed=seed)
    head.score_pairs(few, progress=False)  # the first run of a model allocates and compiles
    forward = _seconds(lambda: head.score_pairs(few, progress=False))
    if forward < _FAST and len(pairs) > n:
        few = pairs.sample(min(len(pairs), _BATCHES * n), seed=seed)
        forward = _seconds(lambda: head.score_pairs(few, progress=False))
    elif forward > _SLOW:
        few = few[: max(1, round(n * _SLOW / forward))]
        forward = _seconds(lambda: head.score_pairs(few, progress=False))
    size = sum(map(n_read, few))
    one = few[:1]
    fixed = _seconds(lambda: head.score_pairs(one, progress=False))
    attribution = NeuronAttribution(head, "gradient_x_activation", site=site)
    gradient = _seconds(lambda: attribution.per_pair(few, progress=False))
    random = [_random_set(head, site, fraction, seed + number) for number in range(4)]
    sweep = _seconds(lambda: score_without(head, few, random, progress=False))
    once = _seconds(lambda: score_without(head, few, random[:1], progress=False))
    # A neuron's cost is proportional to the number of layers above it: on average, that of the middle layer.
    few_neurons, more_neurons = (_of_middle_layer(head, site, number) for number in (1, 1 + _NEURONS))
    single = _seconds(lambda: single_neuron_effects(head, few, site=site, neurons=few_neurons, progress=False))
    more = _seconds(lambda: single_neuron_effects(head, few, site=site, neurons=more_neurons, progress=False))
    rate = (forward - fixed) / size if forward > fixed else forward / size
    return Speed(
        forward=rate,
        gradient=max(gradient - fixed, 0.5 * gradient) / size,
        ablation=max((sweep - once) / 3, 0.05 * forward) / size,
        neuron=max((more - single) / max(1, len(more_neurons) - 1), 1e-3 * forward) / size,
        fixed=fixed,
    )


def n_read(pair: PreferencePair) -> int:
    """The characters that a model reads of a pair: the prompt and both responses."""
    return len(prompt_text(pair.prompt)) + n_characters(pair.chosen) + n_characters(pair.rejected)


# -- inside ------------------------------------------------------------------------------------------------------------


def _pairs_per_batch(head: RewardHead, pairs: PreferencePairs) -> int:
    few = pairs[:16]
    encoded = head.encode(few)
    tokens = sum(len(text) for text in (*encoded.chosen, *encoded.rejected)) / len(few)
    return min(len(pairs), max(4, int(head.tokens_together(keeps_layers=True) / max(1.0, tokens))))


def _random_set(head: RewardHead, site: str, fraction: float, seed: int) -> NeuronSet:
    n = max(head.n_layers, math.ceil(fraction * head.n_layers * head.n_neurons(site)))
    return sample_neurons(head, site, min(n, head.n_layers * head.n_neurons(site)), seed=seed)


def _of_middle_layer(head: RewardHead, site: str, n: int) -> NeuronSet:
    """The first neurons of the middle layer, at most `n`."""
    mask = torch.zeros(head.n_layers, head.n_neurons(site), dtype=torch.bool)
    mask[head.n_layers // 2, :n] = True
    return NeuronSet(mask, site, head.architecture)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
