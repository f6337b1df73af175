"""Collapse of one objective or drift of everything to chance: what an ablation leaves of objectives and subsets."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats

from rmtension.data._chat import prompt_text
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.evaluation._intervals import bootstrap_mean, percentile_interval, resampled_sums
from rmtension.evaluation._metrics import QUANTITIES, chance, item_values, subset_places
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.study._causality import Ablations


def collapse(ablations: Ablations, sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """What ablating each set leaves of both objectives: whether a single objective fell or both drifted to chance.

    For the margin, `retained` is the slope through the origin of the margins after ablation on those before: 1 if
    nothing changed, 0 if nothing of the ranking is left. For the accuracy, it is the share of the accuracy above chance
    that is left; NaN if the accuracy was not clearly above chance. `difference` is the first objective's share minus
    the second's: 0 if both shrink alike, however much. `spread` is the standard deviation of the rewards after ablation
    divided by that before. Intervals are bootstrapped over prompts.

    Raises `OptionError` unless there are two objectives. Cost: one pass over the pairs per set that was not run before.

    Examples:
        >>> from rmtension.study import ModelRuns
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> table = collapse(ablations, {"helpful": neurons})
        >>> table[["set", "quantity", "retained_helpful", "retained_harmless"]].round(1)
               set  quantity  retained_helpful  retained_harmless
        0  helpful  accuracy               1.0                1.0
        1  helpful    margin               0.6                1.0
    """
    first, second = _two_objectives(ablations.pairs)
    before = ablations.rewards()
    rows = []
    for name, neurons in sets.items():
        after = ablations.rewards(neurons)
        for quantity in QUANTITIES:
            row: dict[str, Any] = {"set": name, "size": len(neurons), "quantity": quantity}
            observed, draws = _retained(ablations, after, before, quantity)
            for number, objective in enumerate((first, second)):
                low, high = percentile_interval(draws[:, number], ablations.level)
                row |= {
                    f"retained_{objective}": observed[number],
                    f"retained_{objective}_low": low,
                    f"retained_{objective}_high": high,
                    f"spread_{objective}": _retained_spread(after[objective], before[objective]),
                }
            low, high = percentile_interval(draws[:, 0] - draws[:, 1], ablations.level)
            gap = {"difference": observed[0] - observed[1], "difference_low": low, "difference_high": high}
            rows.append(row | gap)
    return pd.DataFrame(rows)


def effects_by_subset(ablations: Ablations, neurons: NeuronSet) -> pd.DataFrame:
    """The effect of ablating one set on every subset of every objective's pairs (the paper's cross-objective effect).

    The table has one row per subset: accuracy before and after, the paired change with its interval, and the accuracy
    of chance. Cost: one pass over the pairs, if the set was not run before.

    Examples:
        >>> from rmtension.study import ModelRuns
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> effects = effects_by_subset(ablations, organism.truth["helpful"] | organism.truth["shared"])
        >>> effects[["objective", "subset", "before", "after", "n"]].round(2)
          objective subset  before  after   n
        0   helpful   None     1.0   1.00  24
        1  harmless   None     1.0   0.79  24
    """
    before, after = ablations.rewards(), ablations.rewards(neurons)
    rows = []
    for objective, pairs in ablations.pairs.items():
        for subset, kept in subset_places(pairs).items():
            ablated, whole = after[objective].take(kept), before[objective].take(kept)
            change = bootstrap_mean(
                ablations.change(ablated, whole, "accuracy"),
                ablated.by_item().pairs,
                level=ablations.level,
                seed=ablations.seed,
            )
            rows.append(
                {
                    "objective": objective, "subset": subset, "size": len(neurons),
                    "before": whole.accuracy(tie_value=ablations.tie_value),
                    "after": ablated.accuracy(tie_value=ablations.tie_value),
                    "change": change.value, "low": change.low, "high": change.high,
                    "chance": float(chance(ablated.pairs).mean()), "n": change.n,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def drift(effects: pd.DataFrame) -> dict[str, Any]:
    """How closely the changes by subset follow a drift to chance: the regression of `change` on `before - chance`.

    `effects` is the table of `effects_by_subset`. A slope of -1 with r = -1 means that every subset ended at chance;
    the published r = -.82 was computed this way. Noise in `before` enters `change` with the opposite sign, so small
    subsets give a negative slope even without a drift; `split_drift` takes the two from different prompts. The result
    is NaN for fewer than three subsets.

    Examples:
        >>> effects = pd.DataFrame({"before": [0.9, 0.8, 0.7], "chance": 0.5, "change": [-0.4, -0.3, -0.2]})
        >>> {name: round(value, 3) for name, value in drift(effects).items()}  # every subset ends at chance
        {'slope': -1.0, 'r': -1.0, 'n': 3}
    """
    if len(effects) < 3:
        return {"slope": math.nan, "r": math.nan, "n": len(effects)}
    above = effects["before"] - effects["chance"]
    if above.nunique() < 2:
        return {"slope": math.nan, "r": math.nan, "n": len(effects)}
    line = stats.linregress(above, effects["change"])
    return {"slope": float(line.slope), "r": float(line.rvalue), "n": len(effects)}


def split_drift(ablations: Ablations, neurons: NeuronSet) -> dict[str, float]:
    """`drift` with `before` from one half of the prompts and `change` from the other, both ways, averaged.

    The noise of one half is not in the other, so without a drift slopes are around 0; noise in `before` shrinks true
    slopes towards 0. The result is NaN if fewer than three subsets have prompts in both halves. Cost: no pass beyond
    those of `effects_by_subset`.

    Examples:
        >>> from rmtension.study import ModelRuns
        >>> ablations = Ablations(ModelRuns(head), pairs)
        >>> split_drift(ablations, neurons)  # these pairs have one subset per objective, and three are needed
        {'split_slope': nan, 'split_r': nan}
    """
    before, after = ablations.rewards(), ablations.rewards(neurons)
    tables = []
    for half in (0, 1):
        rows_of_half = {
            name: [row for row, pair in enumerate(pairs) if _half_of(prompt_text(pair.prompt)) == half]
            for name, pairs in ablations.pairs.items()
        }
        rows = {}
        for name, kept in rows_of_half.items():
            ablated, whole = after[name].take(kept), before[name].take(kept)
            change, accuracy_before = (
                ablations.change(ablated, whole, "accuracy"),
                item_values(whole, "accuracy", tie_value=ablations.tie_value),
            )
            by_item = whole.by_item().pairs
            for subset, items in subset_places(by_item).items():
                level = float(chance(by_item)[items].mean())
                rows[name, subset] = (float(accuracy_before[items].mean()), level, float(change[items].mean()))
        tables.append(rows)
    fits = []
    for first, second in (tables, tables[::-1]):
        both = [key for key in first if key in second]
        frame = pd.DataFrame(
            [(first[key][0], first[key][1], second[key][2]) for key in both], columns=["before", "chance", "change"]
        )
        fits.append(drift(frame))
    return {f"split_{name}": float(np.mean([fit[name] for fit in fits])) for name in ("slope", "r")}


def _half_of(prompt: str) -> int:
    """0 or 1 by a hash of the prompt, so that it is the same for every model."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % 2


def _two_objectives(pairs: Mapping[str, PreferencePairs]) -> tuple[str, str]:
    if len(pairs) != 2:
        raise OptionError(f"pairs: expected two objectives, to compare what is left of each, got {list(pairs)}.")
    first, second = pairs
    return first, second


def _retained(
    ablations: Ablations, after: Mapping[str, PairRewards], before: Mapping[str, PairRewards], quantity: str
) -> tuple[list[float], Float[np.ndarray, "resample 2"]]:
    """The share of each objective that is left, and its bootstrap resamples: ratios of two sums over items.

    Prompts are resampled for both objectives together, because a prompt can have pairs of both.
    """
    parts, items = [], []
    for number, objective in enumerate(ablations.pairs):
        now, was = (
            item_values(rewards[objective], quantity, tie_value=ablations.tie_value) for rewards in (after, before)
        )
        if quantity == "margin":
            now, was = now * was, was * was
        else:
            level = chance(ablations.pairs[objective])
            now, was = now - level, was - level
        columns = torch.zeros(len(now), 4, dtype=torch.float64)
        columns[:, 2 * number], columns[:, 2 * number + 1] = now, was
        parts.append(columns)
        items.append(ablations.pairs[objective].by_item)
    table = torch.cat(parts)
    sums = resampled_sums(table, items[0] + items[1], seed=ablations.seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[:, [0, 2]] / sums[:, [1, 3]]
        observed = table.sum(dim=0).numpy()[[0, 2]] / table.sum(dim=0).numpy()[[1, 3]]
    if quantity == "accuracy":
        # If the accuracy before is not clearly above chance, a share of what is above it is undefined.
        unclear = (sums[:, [1, 3]] <= 0).mean(axis=0) > (1 - ablations.level) / 2
        observed[unclear], ratios[:, unclear] = math.nan, math.nan
    return observed.tolist(), ratios


def _retained_spread(after: PairRewards, before: PairRewards) -> float:
    """The standard deviation of all rewards, as a share of that before; NaN if all were equal."""
    now, then = (torch.cat([scored.chosen, scored.rejected]).double().std() for scored in (after, before))
    return float(now / then) if then else math.nan
