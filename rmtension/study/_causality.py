"""Effects of ablating sets of neurons: the matrix of sets and objectives, and sets compared at equal size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._effects import effect_beyond_random
from rmtension.evaluation._intervals import Estimate, bootstrap_mean, over_seeds
from rmtension.evaluation._metrics import QUANTITIES, item_change
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.interventions._replacement import Replacement
from rmtension.interventions._replacements import Zero
from rmtension.neurons._matched_sets import draw_seed, matched_sets
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.study._model_runs import ModelRuns

Advance = Callable[[], object]


def _no_progress() -> None:
    """The default of `advance`, which does nothing."""


@dataclass(frozen=True, eq=False)
class Ablations:
    """One model, the pairs of each objective, and how neurons are ablated: the input of the causal analyses.

    `runs` is the model with its cached passes, `pairs` maps objectives to pairs. Accuracies count a tie as `tie_value`.
    `level` and `seed` are those of the bootstrap intervals. `advance` is called after every evaluation, for progress
    bars.

    Examples:
        >>> from rmtension.study import ModelRuns
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> {name: scored.accuracy() for name, scored in ablations.rewards(without=neurons).items()}
        {'helpful': 1.0, 'harmless': 1.0}
    """

    runs: ModelRuns
    pairs: Mapping[str, PreferencePairs]
    replacement: Replacement = Zero()
    tie_value: float = 0.5
    level: float = 0.95
    seed: int = 0
    advance: Advance = _no_progress

    def rewards(self, without: NeuronSet | None = None) -> dict[str, PairRewards]:
        """The rewards of every objective's pairs, by the whole model or without a set. Cost: a pass over the pairs."""
        rewards = {
            name: self.runs.rewards(part, without=without, replacement=self.replacement)
            for name, part in self.pairs.items()
        }
        self.advance()
        return rewards

    def prepare(self, sets: Sequence[NeuronSet]) -> None:
        """Run the ablations of several sets together, for later calls of `rewards`; cached results do not run."""
        for part in self.pairs.values():
            self.runs.prepare(part, sets, replacement=self.replacement)

    def change(self, after: PairRewards, before: PairRewards, quantity: str) -> Float[Tensor, "item"]:
        """The change of `quantity` in every item."""
        return item_change(after, before, quantity, tie_value=self.tie_value)

    def estimate(self, values: Float[Tensor, "item"], objective: str) -> Estimate:
        """The mean of one value per item of an objective, with its interval."""
        return bootstrap_mean(values, self.pairs[objective].by_item, level=self.level, seed=self.seed)


def ablation_matrix(
    ablations: Ablations,
    sets: Mapping[str, NeuronSet],
    *,
    n_draws: int = 8,
    exclude: NeuronSet | None = None,
    magnitude: Float[Tensor, "layer neuron"] | None = None,
) -> pd.DataFrame:
    """The effect of ablating every set on the accuracy and margin of every objective, compared with random sets.

    Random sets have the same number of neurons in every layer (`control` "layer"). With `magnitude`, a second control
    ("magnitude") also matches the neurons' magnitudes; `set_magnitude` and `random_magnitude` report the means of both.
    Random sets contain no neuron of `exclude`. The table has one row per set, objective, quantity and control: before,
    after, the effect with its interval over prompts, the effect per neuron, the mean random effect and the spread
    between draws, and the effect beyond random with the interval of `evaluation.against_random`. If too few neurons are
    left to match a set, the control is NaN and an `RMTensionWarning` is issued.

    Raises `OptionError` for fewer than two draws. Cost: one pass over the pairs per set, and one per random set
    (`n_draws` per set and control).

    Examples:
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> matrix = ablation_matrix(ablations, {"its own": neurons}, n_draws=2)
        >>> matrix.query("quantity == 'margin' and control == 'layer'")[["set", "objective", "effect"]].round(1)
               set objective  effect
        1  its own   helpful    -2.0
        3  its own  harmless     0.0
    """
    if n_draws < 2:
        raise OptionError(f"n_draws: expected at least 2 random sets, to measure their spread, got {n_draws}.")
    controls = ["layer", *(["magnitude"] if magnitude is not None else [])]
    before = ablations.rewards()
    rows = []
    for name, neurons in sets.items():
        drawn = {
            control: matched_sets(
                neurons, n_draws, match=control, exclude=exclude, magnitude=magnitude, seed=ablations.seed
            )
            for control in controls
        }
        ablations.prepare([neurons, *(draw for draws in drawn.values() for draw in draws)])
        after = ablations.rewards(neurons)
        for control, draws in drawn.items():
            random = [ablations.rewards(draw) for draw in draws]
            for _ in range(n_draws - len(draws)):
                ablations.advance()
            for objective in ablations.pairs:
                for quantity in QUANTITIES:
                    row: dict[str, Any] = {
                        "set": name,
                        "objective": objective,
                        "quantity": quantity,
                        "control": control,
                    }
                    if magnitude is not None:
                        row["set_magnitude"] = _mean_over(magnitude, [neurons])
                        row["random_magnitude"] = _mean_over(magnitude, draws)
                    effect = effect_beyond_random(
                        after[objective],
                        before[objective],
                        [rewards[objective] for rewards in random],
                        quantity,
                        tie_value=ablations.tie_value,
                        level=ablations.level,
                        seed=ablations.seed,
                    )
                    rows.append(row | _per_neuron(effect, len(neurons)))
    return pd.DataFrame(rows)


def equal_size_effects(
    ablations: Ablations, sets: Mapping[str, NeuronSet], *, against: str, n_subsamples: int = 8
) -> pd.DataFrame:
    """Effects of sets compared at the size of the smallest set, by random subsamples of the larger ones.

    `size` neurons of every set are drawn `n_subsamples` times; a set of exactly that size is taken whole, once. The
    effect is the mean over subsamples; its interval is that over prompts, widened by the spread between subsamples.
    `difference` is the effect minus that of the set named `against`, paired by item. Empty sets are left out. The table
    has one row per set, objective and quantity.

    Raises `OptionError` for fewer than two subsamples, and if `against` names no set. Cost: one pass over the pairs per
    subsample.

    Examples:
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> sets = {"own": neurons, "all": organism.truth["helpful"] | organism.truth["shared"]}
        >>> table = equal_size_effects(ablations, sets, against="own", n_subsamples=2)
        >>> table.query("quantity == 'margin'")[["set", "objective", "effect"]].round(1)
           set objective  effect
        1  own   helpful    -2.0
        3  own  harmless     0.0
        5  all   helpful    -2.1
        7  all  harmless    -0.5
    """
    if n_subsamples < 2:
        raise OptionError(f"n_subsamples: expected at least 2, to measure their spread, got {n_subsamples}.")
    if against not in sets:
        raise OptionError(f"against: expected one of the sets {list(sets)}, got {against!r}.")
    filled = {name: neurons for name, neurons in sets.items() if len(neurons)}
    if against not in filled:
        return pd.DataFrame(columns=_EQUAL_SIZE)
    size = min(map(len, filled.values()))
    before = ablations.rewards()
    changes: dict[tuple[str, str, str], Float[Tensor, "draw item"]] = {}
    for name, neurons in filled.items():
        draws = (
            [neurons]
            if len(neurons) == size
            else [
                neurons.subsample(size, seed=draw_seed(ablations.seed, draw, "subsample", neurons.mask))
                for draw in range(n_subsamples)
            ]
        )
        ablations.prepare(draws)
        after = [ablations.rewards(draw) for draw in draws]
        for _ in range(n_subsamples - len(draws)):
            ablations.advance()
        for objective in ablations.pairs:
            for quantity in QUANTITIES:
                changes[name, objective, quantity] = torch.stack(
                    [ablations.change(rewards[objective], before[objective], quantity) for rewards in after]
                )
    rows = []
    for (name, objective, quantity), values in changes.items():
        reference = changes[against, objective, quantity]
        effect = _over_draws(ablations, [values], objective)
        gap = _over_draws(ablations, [values, -reference], objective)
        if name == against:
            gap = replace(gap, value=0.0, low=0.0, high=0.0)
        rows.append(
            {
                "set": name, "objective": objective, "quantity": quantity, "size": size, "n_subsamples": len(values),
                "effect": effect.value, "low": effect.low, "high": effect.high, "per_neuron": effect.value / size,
                "against": against, "difference": gap.value, "difference_low": gap.low, "difference_high": gap.high,
                "n": effect.n,
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=_EQUAL_SIZE)


_EQUAL_SIZE = [
    "set", "objective", "quantity", "size", "n_subsamples", "effect", "low", "high", "per_neuron", "against",
    "difference", "difference_low", "difference_high", "n",
]  # fmt: skip


# -- inside ------------------------------------------------------------------------------------------------------------


def _mean_over(magnitude: Float[Tensor, "layer neuron"], sets: Sequence[NeuronSet]) -> float:
    """The mean magnitude of the neurons of some sets; NaN for no sets."""
    values = torch.cat([magnitude[neurons.mask] for neurons in sets]) if sets else torch.empty(0)
    return float(values.double().mean())


def _per_neuron(effect: dict[str, Any], size: int) -> dict[str, Any]:
    """The row of an effect with the set's size, and the effects divided by it."""
    per_neuron = 1 / size if size else math.nan
    row = {"size": size}
    for name, value in effect.items():
        row[name] = value
        if name == "high":
            row["per_neuron"] = effect["effect"] * per_neuron
        elif name == "beyond_high":
            row["beyond_per_neuron"] = effect["beyond_random"] * per_neuron
    return row


def _over_draws(ablations: Ablations, parts: Sequence[Float[Tensor, "_ item"]], objective: str) -> Estimate:
    """The sum of the parts' means over draws, with an interval over prompts widened by the parts' spread over draws."""
    estimate = ablations.estimate(torch.stack([part.mean(dim=0) for part in parts]).sum(dim=0), objective)
    for part in parts:
        estimate = over_seeds(estimate, part.mean(dim=1).tolist())
    return estimate
