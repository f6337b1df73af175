"""The controls of a repair: what the same procedure closes with other labels, other neurons and other methods."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Scale
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.repair._ceiling import closed_share
from rmtension.repair._choice import best_candidate, correct
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import GroupMargins, margins_of
from rmtension.repair._gains import GainFitter, GainOptions
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead


def control_table(
    head: RewardHead,
    pairs: RepairPairs,
    method: str,
    edit: Edit | None,
    path: pd.DataFrame,
    measured: tuple[GroupMargins, Float[Tensor, "pair"]],
    others: Mapping[str, Edit | None],
    *,
    fitter: GainFitter | None,
    n_random: int,
    seed: int,
    progress: bool | None,
) -> pd.DataFrame:
    """One row per control: its closed share on test pairs, the strong objective's change, and how many numbers it has.

    `measured` are the test pairs' margins before the edit, and the weak ones' at the ceiling. `others` are edits by the
    same procedure with exchanged labels, and by a head refit. For gains, `n_random` random sets of neurons follow, or
    one row of NaN if a layer has too few other neurons. For other edits, one row of gains follows, of as many neurons
    as the edit has numbers, or of all neurons if there are fewer. `fitter`, if given, fits these gains.
    """
    before, ceiling = measured

    def row(control: str, after: GroupMargins, numbers: int) -> dict[str, Any]:
        share = closed_share(pairs.test[pairs.weak], before[pairs.weak], after[pairs.weak], ceiling)
        lost = correct(after[pairs.strong]) - correct(before[pairs.strong])
        return {"control": control, "closed": share.value, "strong_change": float(lost.mean()), "numbers": numbers}

    rows = []
    for control, other in others.items():
        if control != method:
            after = before if other is None else margins_of(other.apply(head), pairs.test, progress=progress)
            rows.append(row(control, after, 0 if other is None else other.n_numbers))
    best = best_candidate(pairs, path)
    if edit is None or best is None:
        return pd.DataFrame(rows)
    fitter = fitter or GainFitter(head, pairs, progress=progress)
    share = path.to_dict("records")[best].get("share", GainOptions().share)
    if edit.gains is not None and method == "gains":
        neurons = NeuronSet(edit.gains != 1, SITE, head.architecture)
        both = sum(pairs.fit.values(), start=PreferencePairs([]))
        magnitude = ActivationCollector(head, site=SITE).collect(both, progress=progress).abs_mean
        name = "random neurons"
        try:
            sets = {
                draw: neurons.matched_random(seed=seed + draw, match="magnitude", magnitude=magnitude)
                for draw in range(n_random)
            }
        except OptionError:
            # More than half of a layer's neurons have gains, so that no other set of this size is left.
            nan = float("nan")
            rows.append({"control": "random neurons", "closed": nan, "strong_change": nan, "numbers": len(neurons)})
            sets = {}
    else:
        n_neurons = min(edit.n_numbers, head.n_layers * head.n_neurons(SITE))
        sets, name = {0: fitter.strongest(share, n_neurons)}, "gains of as many neurons"
    for drawn in sets.values():
        gains = fitter.fit(drawn, GainOptions(share=share)).gains
        with AblationContext(head, drawn, Scale(gains)):
            after = margins_of(head, pairs.test, progress=progress)
        rows.append(row(name, after, int((gains != 1).sum())))
    return pd.DataFrame(rows)
