"""Faithfulness: how well scores predict the effects of ablating single neurons, and sets of growing size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch

from rmtension._arguments import require_arguments
from rmtension.attribution._ablated_sets import ablate_sets, plan_sets
from rmtension.attribution._faithfulness_result import Faithfulness
from rmtension.attribution._single_effects import EFFECT, single_neuron_effects
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._check_replacement import check_replacement
from rmtension.interventions._replacement import Replacement, SingleTextReplacement
from rmtension.interventions._replacements import Zero
from rmtension.neurons._neuron_scores import NeuronScores, top_size
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.neurons._score_agreement import agreement
from rmtension.reward_head import RewardHead
from rmtension.store._provenance import METHOD_FIELDS

_SAME_MODEL = ("architecture", "model", "site")
_COLUMNS = ("layer", "neuron", "effect", "stderr")
# Share of neurons that `top_precision` takes.
_TOP_SHARE = 0.1


def faithfulness(
    head: RewardHead,
    pairs: PreferencePairs,
    scores: NeuronScores | Mapping[str, NeuronScores],
    replacement: Replacement = Zero(),
    *,
    positions: str | None = None,
    sample: int | None = None,
    true_effects: NeuronScores | None = None,
    set_fractions: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2),
    n_random: int = 8,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Faithfulness:
    """Compare scores with the true effects of ablating this model's neurons on the margins of `pairs`.

    The predicted effect is `NeuronScores.as_effects`: for methods that score contributions, minus the score, because
    ablating a neuron removes its contribution. Intervals resample blocks of prompts (jointly for scores and true
    effects that come from the same pairs). Resampling adds noise that lowers every agreement, so the resamples are
    shifted to have the observed value as their mean. For a sample of neurons, the neurons are resampled too, within
    layers.

    Cost: that of `single_neuron_effects`, plus one forward pass without ablation and 1 + `n_random` forward passes per
    method and fraction. A pass runs both texts of every pair.

    Args:
        head: the model that was scored.
        pairs: the pairs to measure effects on: the scored pairs or others.
        scores: the scores of one method, or a mapping of names to scores.
        replacement: what replaces the activations. If the scores used a replacement, pass the same one. With
            `OtherResponse()`, no sets are ablated.
        positions: the tokens whose activations are replaced; default: the positions of the scores.
        sample: how many neurons to ablate, drawn evenly from all layers; default: all. With fewer than two neurons per
            layer, intervals treat all layers as one.
        true_effects: the result of `single_neuron_effects` for the same model, pairs and ablation, to avoid running it.
        set_fractions: sizes of the sets as shares of all neurons; pass () to ablate no sets.
        n_random: number of random sets per set.
        level: level of the intervals.
        seed: seed of the sample, the random sets and the resamples.
        progress: show progress bars.

    Raises `ProvenanceError` for scores of another model or true effects of another ablation, and `OptionError` for
    invalid options and for a model that skips pairs (`on_nonfinite="skip"`); both before the model runs.

    Examples:
        >>> result = faithfulness(head, pairs["helpful"], scores, set_fractions=())
        >>> result.summary[["method", "n", "spearman", "sign_agreement"]].round(2)
                          method   n  spearman  sign_agreement
        0  gradient_x_activation  48       1.0             1.0
    """
    named = {scores.provenance.label: scores} if isinstance(scores, NeuronScores) else scores
    require_arguments(
        "faithfulness(head, pairs, scores)",
        head=(head, RewardHead),
        pairs=(pairs, PreferencePairs),
        scores=(named, Mapping),
    )
    check_level(level)
    if n_random < 0:
        raise OptionError(f"n_random: expected 0 or more sets, got {n_random}.")
    head.require_all_pairs()
    site, positions = _check_scores(head, named, positions)
    check_replacement(replacement, head, site)
    neurons = None if sample is None else sample_neurons(head, site, sample, seed=seed)
    planned = plan_sets(named, set_fractions, n_random, seed) if isinstance(replacement, SingleTextReplacement) else []
    if true_effects is None:
        measured = (
            torch.ones(head.n_layers, head.n_neurons(site), dtype=torch.bool) if neurons is None else neurons.mask
        )
    else:
        if sample is not None:
            raise OptionError(
                "sample: true_effects fixes which neurons are compared. Pass sample or true_effects, not both."
            )
        n_tokens = true_effects.provenance.n_tokens
        expected = head.provenance(pairs.digest, len(pairs), n_tokens, site=site, positions=positions, method=EFFECT)
        expected = replace(expected, aggregate="signed", replacement=replacement.label)
        true_effects.provenance.require_same(
            expected, (*_SAME_MODEL, "positions", *METHOD_FIELDS, "data"), what="true_effects of faithfulness"
        )
        measured = torch.isfinite(true_effects.as_effects())
    if int(measured.sum()) < 3:
        raise OptionError(f"sample: expected at least 3 neurons to compare, got {int(measured.sum())}.")
    if true_effects is None:
        true_effects = single_neuron_effects(
            head,
            pairs,
            replacement=replacement,
            site=site,
            positions=positions,
            neurons=neurons,
            progress=progress,
        )
    rows = []
    for name, of_method in named.items():
        measures = agreement(of_method, true_effects, measured, top=_TOP_SHARE, level=level, seed=seed)
        n = int(measured.sum())
        rows.append({"method": name, "n": n, "top": top_size(_TOP_SHARE, n), **measures})
    predicted = {name: of_method.as_effects()[measured].numpy() for name, of_method in named.items()}
    table = (
        true_effects.to_frame()
        .rename(columns={"score": "effect"})[[*_COLUMNS]]
        .dropna(subset="effect")
        .assign(**predicted)
    )
    ablate = partial(AblationContext, head, replacement=replacement, positions=positions)
    sets = ablate_sets(head, planned, pairs, ablate, level, seed, progress)
    return Faithfulness(pd.DataFrame(rows), table.reset_index(drop=True), sets, true_effects.provenance, level)


def sample_neurons(head: RewardHead, site: str, n: int, *, seed: int = 0) -> NeuronSet:
    """Draw `n` neurons of a site at random, equally many from every layer; layers drawn at random get the remainder.

    Raises `OptionError` unless `n` is between 1 and the number of neurons.

    Examples:
        >>> sample_neurons(head, "mlp", 7).n_per_layer
        [4, 3]
    """
    layers, width = head.n_layers, head.n_neurons(site)
    if not 0 < n <= layers * width:
        raise OptionError(f"sample: expected 1 to {layers * width} neurons, got {n}.")
    generator = np.random.default_rng(seed)
    sizes = np.full(layers, n // layers)
    sizes[generator.permutation(layers)[: n % layers]] += 1
    mask = torch.zeros(layers, width, dtype=torch.bool)
    for layer, size in enumerate(sizes):
        mask[layer, torch.from_numpy(generator.permutation(width)[:size])] = True
    return NeuronSet(mask, site, head.architecture)


def _check_scores(head: RewardHead, named: Mapping[str, NeuronScores], positions: str | None) -> tuple[str, str]:
    """The site and positions of all scores; raises unless they are of this model and keep blocks of prompts."""
    if not named:
        raise OptionError("scores: expected at least one NeuronScores, got none.")
    if reserved := sorted(set(named) & set(_COLUMNS)):
        raise OptionError(f"scores: {reserved} are names of columns of the result. Give these methods other names.")
    first = next(iter(named.values())).provenance
    expected = replace(first, architecture=head.architecture, model=head.fingerprint)
    for name, scores in named.items():
        scores.provenance.require_same(expected, _SAME_MODEL, what=f"faithfulness of {name}")
        scores.require_blocks()
    scored_at = {scores.provenance.positions for scores in named.values()}
    if positions is None and len(scored_at) > 1:
        raise OptionError(
            f"positions: the scores are of {sorted(scored_at)} tokens. Pass positions=... to say where activations are "
            "replaced, or compare scores of the same positions."
        )
    return first.site, scored_at.pop() if positions is None else positions
