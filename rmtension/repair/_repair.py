"""Diagnose, edit by one method, and prove it on test pairs with controls."""

import math
from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._ablation import AblationContext
from rmtension.interventions._replacements import Scale
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.passes._activation_collector import ActivationCollector
from rmtension.repair._ceiling import closed_share
from rmtension.repair._choice import best_candidate
from rmtension.repair._diagnose import Evidence
from rmtension.repair._down_projection import edit_down_projection
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import SplitStates, margins_of
from rmtension.repair._gains import GAIN_SHARES, GainFitter, GainOptions
from rmtension.repair._receipt import RepairReport, check_table, control_row
from rmtension.repair._refit import refit_head
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

METHODS = ("head refit", "gains", "down projection")
# Shares of the neurons that gains are tried with.
_FRACTIONS = (0.001, 0.003, 0.01, 0.03)


def repair(
    head: RewardHead,
    pairs: RepairPairs,
    method: str = "gains",
    *,
    specialists: Mapping[str, RewardHead] | None = None,
    n_random: int = 20,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Edit | None, RepairReport]:
    """Mend the weak objective by one method, and measure it on test pairs.

    The edit is None if no candidate gains on the development pairs without harm to the strong objective; the report
    then holds what the unedited model does. Raises `OptionError` if the diagnosis shows no gap.
    """
    require_choice("method", method, METHODS)
    evidence = Evidence.gather(head, pairs, specialists, progress=progress)
    diagnosis = evidence.diagnosis(level=level, seed=seed)
    if not diagnosis.has_gap:
        raise OptionError(f"pairs: nothing to repair is shown.\n{diagnosis}")
    fitter = GainFitter(head, pairs, progress=progress) if method == "gains" else None
    edit, table = _fit(method, head, pairs, fitter, evidence.states, progress)
    edited = head if edit is None else edit.apply(head)
    scored = {
        name: {model: of.score_pairs(part, progress=progress) for model, of in (("before", head), ("after", edited))}
        for name, part in pairs.test.items()
    }
    before, after = ({name: of[model].margin.double() for name, of in scored.items()} for model in ("before", "after"))
    ceiling = evidence.ceiling(pairs.test[pairs.weak])
    rewards = tuple({name: _both(of[model]) for name, of in scored.items()} for model in ("before", "after"))
    others = {} if method == "head refit" else {"head refit": evidence.refit}
    others["shuffled labels"] = _fit(method, head, pairs.shuffled(seed), None, None, progress)[0]
    controls = []
    for name, other in others.items():
        margins = before if other is None else margins_of(other.apply(head), pairs.test, progress=progress)
        controls.append(control_row(pairs, name, before, margins, ceiling, other))
    if fitter is not None and (best := best_candidate(pairs, table)) is not None:
        assert edit is not None
        options = GainOptions(share=table.to_dict("records")[best]["share"])
        controls += _random_neurons(fitter, edit, options, before, ceiling, n_random, seed, progress)
    weak_part = pairs.test[pairs.weak]
    report = RepairReport(
        pairs.weak,
        pairs.strong,
        {"kind": method if edit is not None else "none", "numbers": 0 if edit is None else edit.n_numbers},
        closed_share(weak_part, before[pairs.weak], after[pairs.weak], ceiling, level=level, seed=seed),
        diagnosis.predicted,
        check_table(pairs, before, after, (rewards[0], rewards[1]), level=level, seed=seed),
        pd.DataFrame(controls),
    )
    return edit, report


# -- inside ------------------------------------------------------------------------------------------------------------


def _fit(
    method: str,
    head: RewardHead,
    pairs: RepairPairs,
    fitter: GainFitter | None,
    states: SplitStates | None,
    progress: bool | None,
) -> tuple[Edit | None, pd.DataFrame]:
    """The edit by one method; `fitter` and `states` are those of these pairs, if they are known."""
    if method == "head refit":
        return refit_head(head, pairs, states=states, progress=progress)
    if method == "down projection":
        return edit_down_projection(head, pairs, progress=progress)
    total = head.n_layers * head.n_neurons(SITE)
    counts = sorted({max(1, math.ceil(fraction * total)) for fraction in _FRACTIONS})
    return (fitter or GainFitter(head, pairs, progress=progress)).path(counts, GAIN_SHARES)


def _random_neurons(
    fitter: GainFitter,
    edit: Edit,
    options: GainOptions,
    before: Mapping[str, Float[Tensor, "pair"]],
    ceiling: Float[Tensor, "pair"],
    n_random: int,
    seed: int,
    progress: bool | None,
) -> list[dict[str, object]]:
    """Gains of random neurons, matched by layer and magnitude, fitted as those of the edit."""
    assert edit.gains is not None
    head, pairs = fitter.head, fitter.pairs
    neurons = NeuronSet(edit.gains != 1, SITE, head.architecture)
    both = sum(pairs.fit.values(), start=PreferencePairs([]))
    magnitude = ActivationCollector(head, site=SITE).collect(both, progress=progress).abs_mean
    rows = []
    for draw in range(n_random):
        random = neurons.matched_random(seed=seed + draw, match="magnitude", magnitude=magnitude)
        gains = fitter.fit(random, options).gains
        with AblationContext(head, random, Scale(gains)):
            margins = margins_of(head, pairs.test, progress=progress)
        of_random = Edit("gains", head.fingerprint, head.architecture, gains=gains)
        rows.append(control_row(pairs, "random neurons", before, margins, ceiling, of_random))
    return rows


def _both(scored: PairRewards) -> Float[Tensor, "2 pair"]:
    return torch.stack([scored.chosen, scored.rejected]).double()
