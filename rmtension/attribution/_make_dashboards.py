"""Make dashboards of single neurons: score, ablate and describe them on every group of pairs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rmtension._arguments import require_arguments
from rmtension.attribution._correlated import CorrelationSums, correlations, most_correlated, no_sums
from rmtension.attribution._dashboard_data import DashboardData, NeuronExample
from rmtension.attribution._describe import Describe, describe_neurons, no_descriptions
from rmtension.attribution._methods import METHODS
from rmtension.attribution._neuron_attribution import NeuronAttribution
from rmtension.attribution._neuron_dashboards import NeuronDashboards
from rmtension.attribution._single_effects import single_neuron_effects
from rmtension.attribution._top_texts import LargestActivations, count_largest, find_examples
from rmtension.attribution._written import written
from rmtension.data._groups import ALL, GroupBy, named_groups
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError, ProvenanceError
from rmtension.evaluation._intervals import check_level
from rmtension.interventions._ablation import check_set
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._neuron_scores import NeuronScores, jackknife_stderr
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._pair_pass import run_pass
from rmtension.store._work_folder import below

# A scatter with more points than these is no clearer.
_MOST_POINTS = 5000
_N_CORRELATED = 5
_INDEX = ("layer", "neuron")


def neuron_dashboards(
    head: RewardModel,
    neurons: NeuronSet,
    pairs: PreferencePairs | Mapping[str, PreferencePairs],
    *,
    by: GroupBy | None = None,
    method: str = "gradient_x_activation",
    positions: str = "all",
    n_examples: int = 4,
    level: float = 0.95,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> NeuronDashboards:
    """Make dashboards of single neurons of a model: what each reads, what it writes, and what ablating it does.

    A notebook shows them; `save_html(path)` writes one page. For every neuron and every group of pairs they have:

    - the score of `NeuronAttribution(head, method, positions=positions)`;
    - the effect: the mean change of the margin when the neuron alone is set to zero at all tokens
      (`single_neuron_effects`), with a jackknife interval over blocks of prompts (Student's t);
    - a histogram of its largest activation per text, and the pairs with the largest activation, in magnitude, at a
      token of `positions` in either response; the activation of an attention head is its norm;
    - its direct weight on the reward, the tokens whose logits it promotes and suppresses most, and the neurons whose
      activations correlate most with its own over all tokens of all groups.

    The control is as many random other neurons in every layer as `neurons` has there, or as many as the layer has left.

    Args:
        head: the model.
        neurons: the neurons.
        pairs: the pairs, or groups of pairs by name.
        by: the groups of `pairs`, as in `ablation_effects`: "objective", "subset" or another label, one label per pair,
            or a function from a pair to its label. Default: the objectives if there are several, else the subsets if
            there are several, else one group of all pairs. Pairs without a label are left out.
        method: an attribution method.
        positions: the tokens of scores, histograms and examples.
        n_examples: the number of pairs per neuron and group.
        level: the level of the intervals.
        seed: seed of the random neurons, and of the held-out texts of descriptions.
        work: a folder that keeps the progress of the passes: after an interruption, the same call resumes them.
        progress: show a progress bar.

    Cost per group: a forward and a backward pass for the scores, two forward passes for activations, the cost of
    `single_neuron_effects` for all these neurons, and a pass over the few pairs that are shown. Memory, in
    float64: (asked + random neurons) x all neurons of the site.

    Raises `OptionError` for an empty set, a group without pairs, or an unknown label, `ProvenanceError` for a set of
    another model, and with `work` the errors of `run_pass`.

    Examples:
        >>> from rmtension.attribution import neuron_dashboards
        >>> both = pairs["helpful"] + pairs["harmless"]
        >>> dashboards = neuron_dashboards(head, neurons, both, by="objective", n_examples=1)
        >>> dashboards.groups, len(dashboards.neurons), len(dashboards.table), len(dashboards.examples)
        (('helpful', 'harmless'), 2, 4, 4)
        >>> bool((dashboards.table["direct_weight"][:2] > 0).all())
        True
    """
    require_arguments(
        "neuron_dashboards(head, neurons, pairs)",
        head=(head, RewardModel),
        neurons=(neurons, NeuronSet),
        pairs=(pairs, PreferencePairs if not isinstance(pairs, Mapping) else Mapping),
    )
    if not len(neurons):
        raise OptionError("neurons: expected a set with at least one neuron, got an empty set. Use NeuronScores.top.")
    groups = _groups(pairs, by)
    if n_examples < 0:
        raise OptionError(f"n_examples: expected 0 or more pairs per neuron and group, got {n_examples}.")
    check_level(level)
    check_set(head, neurons)
    random = _control(neurons, seed)
    both = neurons | random
    table = _listed(neurons, "asked for")
    if len(random):
        table = pd.concat([table, _listed(random, "random")], ignore_index=True)
    rows = pd.MultiIndex.from_frame(table[[*_INDEX]])
    scores: dict[str, pd.DataFrame] = {}
    counts: list[pd.DataFrame] = []
    examples: list[NeuronExample] = []
    largest: dict[str, Float[Tensor, "pair 2 wanted"]] = {}
    of_tokens, n_tokens = no_sums(both)
    for number, (group, of_group) in enumerate(list(groups.items())):
        attribution = NeuronAttribution(head, method, site=neurons.site, positions=positions)
        found = attribution.score(of_group, work=below(work, f"{number}-scores"), progress=progress)
        scores[group] = found.to_frame().set_index(list(_INDEX))
        effects = single_neuron_effects(
            head, of_group, site=neurons.site, neurons=both, work=below(work, f"{number}-effects"), progress=progress
        )
        effect = effects.to_frame().set_index(list(_INDEX))["score"].loc[rows].to_numpy()
        statistic = LargestActivations(head, len(of_group), neurons, positions)
        largest[group], n_blocks, kept = run_pass(
            head, of_group, statistic, work=below(work, f"{number}-activations"), progress=progress
        )
        of_group = groups[group] = PreferencePairs(of_group[row] for row in kept)
        more, n_more = run_pass(
            head, of_group, CorrelationSums(head, both), work=below(work, f"{number}-correlations"), progress=progress
        )
        of_tokens, n_tokens = of_tokens + more, n_tokens + n_more
        half = _half_width(effects, n_blocks, level)[
            tuple(torch.from_numpy(table[[*_INDEX]].to_numpy().T.copy()))
        ].numpy()
        table[f"{group}_score"] = scores[group]["score"].loc[rows].to_numpy()
        table[f"{group}_score_stderr"] = scores[group]["stderr"].loc[rows].to_numpy()
        table[f"{group}_effect"] = effect
        table[f"{group}_effect_low"], table[f"{group}_effect_high"] = effect - half, effect + half
        table[f"{group}_n"] = len(of_group)
        counts.append(count_largest(neurons, group, largest[group]))
        examples += find_examples(head, of_group, neurons, group, largest[group], positions, n_examples)
    weights, tokens, reasons = written(head, next(iter(groups.values()))[:1], neurons.site, list(rows))
    table["direct_weight"] = weights
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
        "n_tokens": int(n_tokens),
        **reasons,
        "pairs": {name: len(of_group) for name, of_group in groups.items()},
        "digests": {name: of_group.digest for name, of_group in groups.items()},
    }
    return NeuronDashboards(
        table=table,
        scatter=_points(scores, neurons, seed),
        distribution=pd.concat(counts, ignore_index=True),
        correlated=most_correlated(both, correlations(both, of_tokens, n_tokens), _N_CORRELATED),
        tokens=tokens,
        descriptions=no_descriptions(),
        examples=tuple(examples),
        about=about,
    )


def describe_dashboards(
    dashboards: NeuronDashboards,
    head: RewardModel,
    pairs: PreferencePairs | Mapping[str, PreferencePairs],
    describe: Describe,
    *,
    by: GroupBy | None = None,
    progress: bool | None = None,
) -> NeuronDashboards:
    """Describe the neurons of dashboards in words, and return the dashboards with the descriptions and their scores.

    `describe` is any callable from a prompt to an answer, such as a language model. It describes each neuron from up to
    8 texts on which it is most active. The description is scored on texts of other prompts: for each text, the callable
    is asked whether the description applies, and the AUROC says how well its answers tell texts on which the neuron is
    active from as many on which it is not. The control is the AUROC of another neuron's description on the same texts.
    With fewer than 5 texts of either kind, nothing is described. "Active" means that the largest activation has the
    sign of the largest on all texts and at least a quarter of its size.

    `head`, `pairs` and `by` must be those that the dashboards were made with; others raise `ProvenanceError`. An answer
    other than a number from 0 to 10, yes or no raises `DataError`. Cost: a forward pass over the pairs, and up to 81
    calls of `describe` per neuron.

    Examples:
        >>> from rmtension.attribution import describe_dashboards, neuron_dashboards
        >>> dashboards = neuron_dashboards(head, neurons, pairs, n_examples=0, progress=False)
        >>> described = describe_dashboards(dashboards, head, pairs, lambda prompt: "yes", progress=False)
        >>> len(described.descriptions)
        2
    """
    about = dashboards.about
    groups = _groups(pairs, by)
    neurons = NeuronSet.from_indices(
        dashboards.neurons,
        shape=(head.n_layers, head.n_neurons(about["site"])),
        site=about["site"],
        architecture=about["architecture"],
    )
    check_set(head, neurons)
    _require_given("model", head.fingerprint, about["model"])
    largest: dict[str, Float[Tensor, "pair 2 wanted"]] = {}
    for group, of_group in list(groups.items()):
        statistic = LargestActivations(head, len(of_group), neurons, about["positions"])
        largest[group], _, kept = run_pass(head, of_group, statistic, progress=progress)
        groups[group] = PreferencePairs(of_group[row] for row in kept)
    # The dashboards are of the pairs that were not skipped, which only the pass knows.
    _require_given("pairs", {name: part.digest for name, part in groups.items()}, about["digests"])
    descriptions = describe_neurons(
        head, groups, neurons, largest, describe,
        positions=about["positions"], level=about["level"], seed=about["seed"], progress=progress,
    )  # fmt: skip
    fields = {name: getattr(dashboards, name) for name in DashboardData.__dataclass_fields__}
    return NeuronDashboards(**fields | {"descriptions": descriptions})


# -- parts -------------------------------------------------------------------------------------------------------------


def _require_given(what: str, now: object, then: object) -> None:
    """Raise `ProvenanceError` if the model or the pairs are not those of the dashboards."""
    if now != then:
        raise ProvenanceError(f"{what}: the dashboards are of {then}, got {now}. Pass the {what} they were made with.")


def _groups(pairs: PreferencePairs | Mapping[str, PreferencePairs], by: GroupBy | None) -> dict[str, PreferencePairs]:
    """The groups by name; all pairs are a group only if there is no other."""
    if isinstance(pairs, Mapping):
        if by is not None:
            raise OptionError(
                "by: expected None, because pairs is a mapping of groups, got a grouping. Pass one of them."
            )
        if not pairs or not all(len(of_group) for of_group in pairs.values()):
            raise OptionError("pairs: expected a mapping of groups to PreferencePairs with at least one pair each.")
        return dict(pairs)
    if not len(pairs):
        raise OptionError("pairs: expected at least one pair, got none.")
    rows = named_groups(pairs, by)
    if not rows:
        return {ALL: pairs}
    return {name: PreferencePairs([pairs[row] for row in members]) for name, members in rows.items()}


def _control(neurons: NeuronSet, seed: int) -> NeuronSet:
    """As many other neurons in each layer as `neurons` has there, or as many as the layer has left."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros_like(neurons.mask)
    for layer, taken in enumerate(neurons.mask):
        free = (~taken).nonzero()[:, 0].numpy()
        wanted = min(len(free), int(taken.sum()))
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
    columns = {f"{group}_score": frame["score"] for group, frame in scores.items()}
    return pd.DataFrame(columns)[shown.numpy()].reset_index()
