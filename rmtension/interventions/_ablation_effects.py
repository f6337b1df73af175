"""What ablating neurons changes in each group of pairs, compared with random sets: one table."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from rmtension._arguments import require_arguments
from rmtension.data._groups import ALL, GroupBy, named_groups
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._effects import effect_beyond_random
from rmtension.evaluation._intervals import check_level
from rmtension.evaluation._metrics import QUANTITIES
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.interventions._sweep import score_without
from rmtension.models._reward_model import RewardModel
from rmtension.neurons._matched_sets import matched_sets
from rmtension.neurons._neuron_set import NeuronSet, check_seed


def ablation_effects(
    head: RewardModel,
    neurons: NeuronSet | Mapping[str, NeuronSet],
    pairs: PreferencePairs,
    replacement: Replacement = Zero(),
    *,
    by: GroupBy | None = None,
    positions: str = "all",
    n_draws: int = 8,
    exclude: NeuronSet | None = None,
    level: float = 0.95,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The effect of ablating neurons on the accuracy and margin of each group of pairs, compared with random sets.

    Every set is compared with `n_draws` random sets that have as many neurons in every layer and none of the set's own
    (`NeuronSet.matched_random`). The table has one row per set, group and quantity:

    - `set`, `size`, `group`, `quantity` ("accuracy" or "margin"), `n` (items in the group);
    - `before`, `after` and `effect`, their paired difference, with its bootstrap interval over prompts (`low`, `high`);
    - `random_effect`, `random_sd`, `n_draws`: the mean effect of the random sets, its standard deviation between sets,
      and the number of sets;
    - `beyond_random`: the effect minus the mean random effect, with an interval over prompts and draws (`beyond_low`,
      `beyond_high`). If the set is itself a random draw, this interval covers 0 with the probability `level`.

    Cost: at most one forward pass over the pairs, both texts, per set and random set, and one without ablation; mostly
    about half of that (see `score_without`). Without enough neurons to draw from, the control is NaN and an
    `RMTensionWarning` is issued.

    Args:
        head: the model.
        neurons: a set, or sets by name.
        pairs: the pairs.
        replacement: what replaces the activations, for example `Mean(statistics)`.
        by: the groups: "objective", "subset" or another label of the pairs; a sequence with one label per pair; a
            function from a pair to its label. Default: the objectives if the pairs have several, else the subsets if
            they have several, else no groups. The group "all pairs" always comes first.
        positions: the tokens whose activations are replaced.
        n_draws: the number of random sets per set; 0 for no control.
        exclude: neurons that no random set contains, for example those of other top sets.
        level: level of the intervals.
        seed: seed of the random sets and the resamples.
        work: a folder that keeps the work, to resume after an interruption.
        progress: show a progress bar.

    Raises `OptionError` for one random set, an unknown label, or no pairs, and the errors of `AblationContext`.

    Examples:
        >>> from rmtension import PreferencePairs
        >>> both = pairs["helpful"] + pairs["harmless"]
        >>> table = ablation_effects(head, organism.truth["helpful"], both, by="objective", n_draws=4)
        >>> margins = table[table["quantity"] == "margin"]
        >>> margins[["group", "before", "after", "effect", "random_effect"]].round(2)
               group  before  after  effect  random_effect
        1  all pairs    4.19   3.17   -1.02            0.0
        3    helpful    5.15   3.10   -2.04            0.0
        5   harmless    3.23   3.23    0.00            0.0
    """
    named = {"neurons": neurons} if isinstance(neurons, NeuronSet) else neurons
    require_arguments(
        "ablation_effects(head, neurons, pairs)",
        head=(head, RewardModel),
        neurons=(named, Mapping),
        pairs=(pairs, PreferencePairs),
    )
    if not named:
        raise OptionError("neurons: expected at least one set, got none.")
    for name, chosen in named.items():
        require_arguments("ablation_effects(head, neurons, pairs)", **{f"neurons[{name!r}]": (chosen, NeuronSet)})
    check_level(level)
    check_seed(seed)
    if n_draws < 0 or n_draws == 1:
        raise OptionError(f"n_draws: expected at least 2 random sets, to measure their spread, or 0, got {n_draws}.")
    if not len(pairs):
        raise OptionError("pairs: expected at least one pair, got none.")
    groups = named_groups(pairs, by)
    draws = {
        name: matched_sets(chosen, n_draws, exclude=exclude, seed=seed) if n_draws else []
        for name, chosen in named.items()
    }
    sets = [neuron_set for name, chosen in named.items() for neuron_set in (chosen, *draws[name])]
    empty = next(iter(named.values())) & ~next(iter(named.values()))
    before, *after = score_without(
        head, pairs, [empty, *sets], replacement, positions=positions, work=work, progress=progress
    )
    rows = []
    results = iter(after)
    groups = {ALL: list(range(len(before.pairs)))} | kept_rows(groups, pairs, before.pairs)
    for name, chosen in named.items():
        ablated, *random = (next(results) for _ in range(1 + len(draws[name])))
        rows += _rows(name, chosen, groups, before, ablated, random, level, seed)
    return pd.DataFrame(rows)


def kept_rows(groups: Mapping[str, list[int]], pairs: PreferencePairs, kept: PreferencePairs) -> dict[str, list[int]]:
    """The rows of the groups among the pairs that a pass kept, which skips pairs that produce NaN or infinity."""
    if len(kept) == len(pairs):
        return dict(groups)
    new_rows: dict[int, int] = {}
    for row, pair in enumerate(pairs):
        if len(new_rows) < len(kept) and pair is kept[len(new_rows)]:
            new_rows[row] = len(new_rows)
    left = {name: [new_rows[row] for row in members if row in new_rows] for name, members in groups.items()}
    return {name: rows for name, rows in left.items() if rows}


def _rows(
    name: str,
    neurons: NeuronSet,
    groups: Mapping[str, list[int]],
    before: PairRewards,
    after: PairRewards,
    random: list[PairRewards],
    level: float,
    seed: int,
) -> list[dict[str, object]]:
    rows = []
    for group, members in groups.items():
        whole, ablated, *drawn = (rewards.take(members) for rewards in (before, after, *random))
        for quantity in QUANTITIES:
            effect = effect_beyond_random(ablated, whole, drawn, quantity, level=level, seed=seed)
            del effect["set_sd"]
            rows.append({"set": name, "size": len(neurons), "group": group, "quantity": quantity, **effect})
    return rows
