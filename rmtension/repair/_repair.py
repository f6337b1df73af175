"""Diagnose, edit by one method, and prove it on test pairs with controls."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

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
from rmtension.repair._ceiling import SpecialistEnsemble, closed_share
from rmtension.repair._diagnose import diagnose
from rmtension.repair._down_projection import edit_down_projection
from rmtension.repair._edit import SITE, Edit
from rmtension.repair._features import read_states
from rmtension.repair._gains import GainFitter, GainOptions, fit_gains
from rmtension.repair._receipt import RepairReport, check_table, control_row, shuffled_labels
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
    diagnosis = diagnose(head, pairs, specialists=specialists, level=level, seed=seed, progress=progress)
    if not diagnosis.has_gap:
        raise OptionError(f"pairs: nothing to repair is shown.\n{diagnosis}")
    edit, table = _fit(method, head, pairs, progress)
    edited = head if edit is None else edit.apply(head)
    scored = {
        name: {model: of.score_pairs(part, progress=progress) for model, of in (("before", head), ("after", edited))}
        for name, part in pairs.test.items()
    }
    before, after = ({name: of[model].margin.double() for name, of in scored.items()} for model in ("before", "after"))
    ceiling = _ceiling(head, pairs, specialists, before, progress)
    rewards = tuple({name: _both(of[model]) for name, of in scored.items()} for model in ("before", "after"))
    controls = []
    fits: dict[str, Callable[[], Edit | None]] = {
        "head refit": lambda: refit_head(head, pairs, progress=progress)[0],
        "shuffled labels": lambda: _fit(method, head, _shuffled(pairs, seed), progress)[0],
    }
    for name, fit in fits.items():
        if name != method:
            other = fit()
            margins = before if other is None else _margins(other.apply(head), pairs.test, progress)
            controls.append(control_row(pairs, name, before, margins, ceiling, other))
    if edit is not None and edit.gains is not None:
        controls += _random_neurons(head, pairs, edit, table, before, ceiling, n_random, seed, progress)
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


def _fit(method: str, head: RewardHead, pairs: RepairPairs, progress: bool | None) -> tuple[Edit | None, pd.DataFrame]:
    if method == "head refit":
        return refit_head(head, pairs, progress=progress)
    if method == "down projection":
        return edit_down_projection(head, pairs, progress=progress)
    total = head.n_layers * head.n_neurons(SITE)
    counts = sorted({max(1, math.ceil(fraction * total)) for fraction in _FRACTIONS})
    return fit_gains(head, pairs, counts=counts, progress=progress)


def _ceiling(
    head: RewardHead,
    pairs: RepairPairs,
    specialists: Mapping[str, RewardHead] | None,
    before: Mapping[str, Float[Tensor, "pair"]],
    progress: bool | None,
) -> Float[Tensor, "pair"]:
    """The margins of the weak test pairs at the ceiling."""
    part = pairs.test[pairs.weak]
    if specialists is not None:
        return SpecialistEnsemble(specialists, pairs, progress=progress).margins(part)
    refit, _ = refit_head(head, pairs, progress=progress)
    if refit is None or refit.row is None:
        return before[pairs.weak]
    return before[pairs.weak] + read_states(head, part, progress=progress).difference @ refit.row.double()


def _random_neurons(
    head: RewardHead,
    pairs: RepairPairs,
    edit: Edit,
    table: pd.DataFrame,
    before: Mapping[str, Float[Tensor, "pair"]],
    ceiling: Float[Tensor, "pair"],
    n_random: int,
    seed: int,
    progress: bool | None,
) -> list[dict[str, object]]:
    """Gains of random neurons, matched by layer and magnitude, fitted as those of the edit."""
    assert edit.gains is not None
    neurons = NeuronSet(edit.gains != 1, SITE, head.architecture)
    both = sum(pairs.fit.values(), start=PreferencePairs([]))
    magnitude = ActivationCollector(head, site=SITE).collect(both, progress=progress).abs_mean
    fitter = GainFitter(head, pairs, progress=progress)
    allowed = table[table["neurons"] == len(neurons)]
    options = GainOptions(share=float(allowed.iloc[0]["share"]))
    rows = []
    for draw in range(n_random):
        random = neurons.matched_random(seed=seed + draw, match="magnitude", magnitude=magnitude)
        fitted = fitter.fit(random, options)
        with AblationContext(head, random, Scale(fitted.gains)):
            margins = _margins(head, pairs.test, progress)
        of_random = Edit("gains", head.fingerprint, head.architecture, gains=fitted.gains)
        rows.append(control_row(pairs, "random neurons", before, margins, ceiling, of_random))
    return rows


def _shuffled(pairs: RepairPairs, seed: int) -> RepairPairs:
    """The same splits, with the weak labels of fit and development pairs exchanged at random."""
    changed = {
        split: {**groups, pairs.weak: shuffled_labels(groups[pairs.weak], seed)}
        for split, groups in (("fit", pairs.fit), ("development", pairs.development))
    }
    return replace(pairs, fit=changed["fit"], development=changed["development"])


def _margins(
    head: RewardHead, groups: Mapping[str, PreferencePairs], progress: bool | None
) -> dict[str, Float[Tensor, "pair"]]:
    return {name: head.score_pairs(part, progress=progress).margin.double() for name, part in groups.items()}


def _both(scored: PairRewards) -> Float[Tensor, "2 pair"]:
    return torch.stack([scored.chosen, scored.rejected]).double()
