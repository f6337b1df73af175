"""Diagnose, edit by one method, and measure the edit on test pairs with controls."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._arguments import require_choice
from rmtension.bodies._native_weights import plain_copy
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.repair._ceiling import closed_share
from rmtension.repair._controls import control_table
from rmtension.repair._diagnose import Evidence, divide
from rmtension.repair._directions import remove_subspace, shape_reward
from rmtension.repair._distil import distil_ensemble
from rmtension.repair._down_projection import edit_down_projection
from rmtension.repair._edit import SITE, Edit, has_reward_row
from rmtension.repair._fine_tune import fine_tune_neurons
from rmtension.repair._gains import N_STEPS, GainFitter, fit_gains
from rmtension.repair._medians import set_to_medians
from rmtension.repair._receipt import RepairReport, check_table
from rmtension.repair._refit import refit_head
from rmtension.repair._regmean import merge_specialists
from rmtension.repair._splits import RepairPairs
from rmtension.reward_head import RewardHead

# Each takes the model, the pairs and its options.
_METHODS: dict[str, Callable[..., tuple[Edit | None, pd.DataFrame]]] = {
    "head refit": refit_head,
    "gains": fit_gains,
    "down projection": edit_down_projection,
    "distilled ensemble": distil_ensemble,
    "merged specialists": merge_specialists,
    "fine-tuning": fine_tune_neurons,
    "medians": set_to_medians,
    "reward shaping": shape_reward,
    "subspace removal": remove_subspace,
}
METHODS = tuple(_METHODS)
# What the edits of a method change, if it is not the row of the head.
_CHANGED = {
    "gains": "added",
    "down projection": "added",
    "medians": "constants",
    "fine-tuning": "parameters",
    "merged specialists": "parameters",
}
_OF_SPECIALISTS = ("distilled ensemble", "merged specialists")
# What a repair passes to its method; everything else is an option.
_PASSED = ("head", "pairs", "specialists", "states", "fitter", "progress")
EDIT, REPORT = "repair.safetensors", "repair.json"


@dataclass(frozen=True, eq=False)
class Repair:
    """A repaired model, the edit that repaired it, and what the edit did on test pairs.

    `edit` is None, and `head` the unedited model, if no candidate was better without harm.

    Examples:
        >>> from rmtension.synthetic import plant_damage
        >>> damaged = plant_damage(head, pairs["harmless"], n=4, factor=-0.5).head
        >>> mended = repair(damaged, pairs, "head refit", weak="harmless", strong="helpful", most_lost=0.4)
        >>> mended.save_pretrained("mended")
        >>> Edit.load("mended/repair.safetensors")
        Edit(head refit: 24 numbers for gpt2-2x24-heads2x12-d24)
    """

    head: RewardHead
    edit: Edit | None
    report: RepairReport

    def __repr__(self) -> str:
        return repr(self.report)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the repaired checkpoint, which plain transformers loads, with its edit and its report beside it.

        Raises `OptionError` if there is no edit.
        """
        if self.edit is None:
            raise OptionError(
                "edit: no edit was better without harm, so there is no repaired model to save. report.save(path) and "
                "write_report(report, folder) write what was found."
            )
        self.head.save_pretrained(folder)
        self.edit.save(Path(folder) / EDIT)
        self.report.save(Path(folder) / REPORT)


def repair(
    head: RewardHead,
    pairs: Mapping[str, PreferencePairs] | RepairPairs,
    method: str = "gains",
    *,
    weak: str | None = None,
    strong: str | None = None,
    specialists: Mapping[str, RewardHead] | None = None,
    most_lost: float = 0.01,
    n_random: int = 20,
    level: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Repair:
    """Repair the weak objective by one method without harm to the strong one, and measure the edit on test pairs.

    `pairs` are pairs by objective, divided by `RepairPairs.split` with `seed` and `most_lost`, or a `RepairPairs`.
    Edits are fitted to the fit pairs; of all that a method tries, the smallest is taken whose gain on the development
    pairs is beyond chance and about as large as any, and which spares the strong objective. The test pairs are read
    once, at the end.

    Methods, with their `options`:

    - "head refit": another reward row, by Newton's method on the Bradley-Terry loss. `shares`, `ridges`.
    - "gains": a factor for each of the neurons that change the loss most. `counts` of neurons, `shares`, `steps`.
    - "down projection": one projection in closed form. `layers`, `steps`, `weights`, `n_tried`.
    - "distilled ensemble": the row whose margins are nearest to the `specialists`' ensemble. `ridges`.
    - "merged specialists": all weights become a merge of the `specialists`' (RegMean). `shrink`.
    - "fine-tuning": the weights of some neurons are trained on the weak pairs, in directions that the inputs of strong
      pairs do not have (extra `train`). `neurons`, or a `fraction`; `protect`, `steps`, `learning_rate`, `batch_size`.
    - "medians", "reward shaping", "subspace removal": published recipes against style biases. The first sets neurons
      that follow a surface feature to their medians (`feature`, `fractions`), the second takes the feature's direction
      out of the row (`feature`, `alphas`), the third the directions of wrongly ordered pairs (`alphas`).

    The controls are fitted by the same procedure: weak labels exchanged at random for half of the pairs, another
    method with as many numbers, a head refit, and for gains `n_random` random sets of neurons with the same layers and
    magnitudes. Cost: that of the method twice, and the controls. For all methods but gains, one control is gains of as
    many neurons, fitted up to four times. Each time it runs the fit pairs forward and backward, and the development
    pairs forward up to three times, which can take much longer than a refit. Memory: the model a second time.

    Raises `OptionError` if the diagnosis shows no gap, `CheckError` if the model fails `head.check()`, and `ModelError`
    for a model that the method cannot edit. A model whose weights TransformerLens converted, without the bias that
    "medians" needs, or with projections that are no linear layers is refused before anything runs.

    Examples:
        >>> from rmtension.synthetic import plant_damage
        >>> damaged = plant_damage(head, pairs["harmless"], n=4, factor=-0.5).head
        >>> mended = repair(damaged, pairs, "head refit", weak="harmless", strong="helpful", most_lost=0.4)
        >>> mended.report.closed.value > 0.9
        True
    """
    require_choice("method", method, METHODS)
    if method in _OF_SPECIALISTS and specialists is None:
        raise OptionError(f"specialists: {method!r} needs a model for each objective. Pass specialists=..., a dict.")
    _require_options(method, options)
    if type(n_random) is not int or n_random < 0:
        raise OptionError(f"n_random: expected a whole number from 0, got {n_random!r}.")
    if specialists is not None and not isinstance(specialists, Mapping):
        raise OptionError(f"specialists: expected a dict of objective to model, got a {type(specialists).__name__}.")
    split = divide(pairs, weak, strong, most_lost, seed)
    _require_editable(head, method)
    evidence = Evidence.gather(head, split, specialists, progress=progress)
    diagnosis = evidence.diagnosis(level=level, seed=seed)
    if not diagnosis.has_gap:
        raise OptionError(f"pairs: nothing to repair is shown.\n{diagnosis}")

    fitter = None
    if method == "gains":
        fitter = GainFitter(head, split, steps=options.get("steps", N_STEPS), progress=progress)

    def fit(divided: RepairPairs, **known: Any) -> tuple[Edit | None, pd.DataFrame]:
        passed = {"specialists": specialists, "progress": progress, **known}
        takes = inspect.signature(_METHODS[method]).parameters
        return _METHODS[method](
            head, divided, **{name: value for name, value in passed.items() if name in takes}, **options
        )

    edit, path = fit(split, states=evidence.states, fitter=fitter)
    edited = head if edit is None else edit.apply(head)
    scored = {
        name: {model: of.score_pairs(part, progress=progress) for model, of in (("before", head), ("after", edited))}
        for name, part in split.test.items()
    }
    before, after = ({name: of[model].margin.double() for name, of in scored.items()} for model in ("before", "after"))
    ceiling = evidence.ceiling(split.test[split.weak])
    rewards = tuple({name: _both(of[model]) for name, of in scored.items()} for model in ("before", "after"))
    shuffled = None if evidence.states is None else evidence.states.shuffled(split.weak, seed)
    others = {"shuffled labels": fit(split.shuffled(seed), states=shuffled)[0]}
    if has_reward_row(head):
        others["head refit"] = evidence.refit
    drawing: dict[str, Any] = {"fitter": fitter, "n_random": n_random, "seed": seed, "progress": progress}
    weak_part = split.test[split.weak]
    report = RepairReport(
        diagnosis,
        {"kind": method, "numbers": 0 if edit is None else edit.n_numbers, "made": edit is not None},
        closed_share(weak_part, before[split.weak], after[split.weak], ceiling, level=level, seed=seed),
        check_table(split, before, after, (rewards[0], rewards[1]), level=level, seed=seed),
        path.assign(closed=path[f"{split.weak}_change"] / diagnosis.gap.value),
        control_table(head, split, method, edit, path, (before, ceiling), others, **drawing),
        split.most_lost,
    )
    return Repair(edited, edit, report)


# -- inside ------------------------------------------------------------------------------------------------------------


def _require_options(method: str, options: Mapping[str, object]) -> None:
    """Raise `OptionError` for an option that a method does not have."""
    known = [
        name
        for name, parameter in inspect.signature(_METHODS[method]).parameters.items()
        if name not in _PASSED and parameter.kind != parameter.VAR_KEYWORD
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"{unknown[0]}: {method!r} has no such option. It has {', '.join(known)}.")


def _require_editable(head: RewardHead, method: str) -> None:
    """Raise `ModelError` before anything runs if the model cannot be edited as the method does.

    A copy of the model gets the smallest edit of that kind, because only the edit itself knows what it cannot change.
    """
    part = _CHANGED.get(method, "row")
    changed: Any = torch.zeros(head.d_model)
    if part == "added":
        changed = {0: torch.zeros(1, 1).expand(head.d_model, head.n_neurons(SITE))}
    elif part == "constants":
        changed = torch.zeros(head.n_layers, head.n_neurons(SITE))
        changed[0] = 1.0
    elif part == "parameters":
        base = None if head.checkpoint is None else head.checkpoint.base
        # By the name that it has without adapters.
        name, parameter = ("", torch.zeros(1)) if base is None else next(plain_copy(base).named_parameters())
        changed = {name: torch.zeros(parameter.shape)}
    Edit(method, head.fingerprint, head.architecture, **{part: changed}).apply(head)


def _both(scored: PairRewards) -> Float[Tensor, "2 pair"]:
    return torch.stack([scored.chosen, scored.rejected]).double()
