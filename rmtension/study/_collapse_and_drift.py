"""One objective fell, or everything drifted to chance? What an ablation leaves of both objectives and all subsets."""

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
from rmtension.evaluation._metrics import chance, item_values, subset_places
from rmtension.evaluation._pair_rewards import PairRewards
from rmtension.neurons._neuron_set import NeuronSet
from rmtension.study._causality import QUANTITIES, Ablations


def collapse(ablations: Ablations, sets: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Did one objective fall, or did everything drift to chance? What each set leaves of both objectives.

    `retained` of the margin is the slope of the margins after on the margins before, through the origin: 1 where
    nothing happened, 0 where nothing of the ranking is left. Of the accuracy it is the share above chance that is
    left, NaN where there was none to lose. `difference` is the first objective's minus the second's: 0 where both
    shrink alike, however much. `spread` is the standard deviation of the rewards after over that before. Intervals:
    bootstrap over prompts. Cost: a pass over the pairs for each set, none where the sets were run before.

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
                    f"spread_{objective}": _spread(after[objective]) / _spread(before[objective]),
                }
            low, high = percentile_interval(draws[:, 0] - draws[:, 1], ablations.level)
            gap = {"difference": observed[0] - observed[1], "difference_low": low, "difference_high": high}
            rows.append(row | gap)
    return pd.DataFrame(rows)


def effects_by_subset(ablations: Ablations, neurons: NeuronSet) -> pd.DataFrame:
    """The effect of ablating one set on every subset of every objective's pairs (the paper's cross-objective effect).

    One row a subset: accuracy before and after, the paired change with its interval, and what chance gives.
    """
    before, after = ablations.rewards(), ablations.rewards(neurons)
    rows = []
    for objective, pairs in ablations.pairs.items():
        for subset, kept in subset_places(pairs).items():
            one, other = after[objective].take(kept), before[objective].take(kept)
            change = bootstrap_mean(
                ablations.change(one, other, "accuracy"),
                one.by_item().pairs,
                level=ablations.level,
                seed=ablations.seed,
            )
            rows.append(
                {
                    "objective": objective, "subset": subset, "size": len(neurons),
                    "before": other.accuracy(tie_value=ablations.tie_value),
                    "after": one.accuracy(tie_value=ablations.tie_value),
                    "change": change.value, "low": change.low, "high": change.high,
                    "chance": float(chance(one.pairs).mean()), "n": change.n,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def drift(effects: pd.DataFrame) -> dict[str, Any]:
    """How far changes by subset follow a drift to chance: the regression of `change` on `before - chance`.

    A slope of -1 with r = -1 means that every subset ended at chance; this is how the published r = -.82 was computed.
    Beware: noise in `before` is in `change` with the opposite sign, which makes a negative slope out of nothing where
    subsets are small. `split_drift` takes the two from different prompts. NaN for fewer than three subsets.
    """
    if len(effects) < 3:
        return {"slope": math.nan, "r": math.nan, "n": len(effects)}
    above = effects["before"] - effects["chance"]
    if above.nunique() < 2:
        return {"slope": math.nan, "r": math.nan, "n": len(effects)}
    found = stats.linregress(above, effects["change"])
    return {"slope": float(found.slope), "r": float(found.rvalue), "n": len(effects)}


def split_drift(ablations: Ablations, neurons: NeuronSet) -> dict[str, float]:
    """`drift` with `before` from one half of the prompts and `change` from the other, both ways, averaged.

    Noise of the one is not in the other, so that nothing gives slopes around 0; true slopes are drawn towards 0 by the
    noise in `before`. NaN where fewer than three subsets have prompts in both halves. No pass that `drift` did not ask.
    """
    before, after = ablations.rewards(), ablations.rewards(neurons)
    tables = []
    for half in (0, 1):
        places = {
            name: [row for row, pair in enumerate(pairs) if _half_of(prompt_text(pair.prompt)) == half]
            for name, pairs in ablations.pairs.items()
        }
        rows = {}
        for name, kept in places.items():
            one, other = after[name].take(kept), before[name].take(kept)
            gap, was = (
                ablations.change(one, other, "accuracy"),
                item_values(other, "accuracy", tie_value=ablations.tie_value),
            )
            by_item = other.by_item().pairs
            for subset, mine in subset_places(by_item).items():
                level = float(chance(by_item)[mine].mean())
                rows[name, subset] = (float(was[mine].mean()), level, float(gap[mine].mean()))
        tables.append(rows)
    found = []
    for first, second in (tables, tables[::-1]):
        both = [key for key in first if key in second]
        frame = pd.DataFrame(
            [(first[key][0], first[key][1], second[key][2]) for key in both], columns=["before", "chance", "change"]
        )
        found.append(drift(frame))
    return {f"split_{name}": float(np.mean([one[name] for one in found])) for name in ("slope", "r")}


def _half_of(prompt: str) -> int:
    """0 or 1 by a hash of the prompt, whatever the model."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] % 2


def _two_objectives(pairs: Mapping[str, PreferencePairs]) -> tuple[str, str]:
    if len(pairs) != 2:
        raise OptionError(f"pairs: expected two objectives to tell apart, got {list(pairs)}.")
    first, second = pairs
    return first, second


def _retained(
    ablations: Ablations, after: Mapping[str, PairRewards], before: Mapping[str, PairRewards], quantity: str
) -> tuple[list[float], Float[np.ndarray, "resample 2"]]:
    """The share of each objective that is left, and its bootstrap resamples: ratios of two sums over items.

    Prompts are resampled for both objectives at once, because some have pairs of both.
    """
    parts, items = [], []
    for number, objective in enumerate(ablations.pairs):
        now, was = (item_values(one[objective], quantity, tie_value=ablations.tie_value) for one in (after, before))
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
        # Where the accuracy before is not clearly above chance, a share of what is above is no number.
        unclear = (sums[:, [1, 3]] <= 0).mean(axis=0) > (1 - ablations.level) / 2
        observed[unclear], ratios[:, unclear] = math.nan, math.nan
    return observed.tolist(), ratios


def _spread(scored: PairRewards) -> float:
    return float(torch.cat([scored.chosen, scored.rejected]).double().std())
