"""How well rewards rank items, with intervals: accuracy, margins, refusing and responding, changes, comparisons.

All metrics judge items: a pair by itself, or all pairs that share an `item`, of which the worst counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rmtension._repr_html import html_table
from rmtension.data import subtasks
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._intervals import (
    Estimate,
    adjusted_p_values,
    bootstrap_mean,
    bootstrap_share,
    mcnemar_p_value,
    percentile_interval,
    resampled_sums,
    sign_flip_p_value,
)
from rmtension.evaluation._pair_rewards import PairRewards

# Subsets in which refusing is right, and in which responding is right: of the synthetic world, and of the benchmarks.
REFUSE_SUBSETS = ("should_refuse", *subtasks.REFUSE_SUBSETS)
RESPOND_SUBSETS = ("should_respond", *subtasks.RESPOND_SUBSETS)


def correctness(scored: PairRewards, *, tie_value: float = 0.5) -> Float[Tensor, "item"]:
    """1 for every item ranked correctly, `tie_value` for a tie, 0 otherwise."""
    items = scored.by_item()
    return items.correct.double() + tie_value * items.tied.double()


def accuracy(scored: PairRewards, *, tie_value: float = 0.5, level: float = 0.95, seed: int = 0) -> Estimate:
    """Share of items ranked correctly, with an interval over prompts; a tie counts `tie_value` (0 is the strict rule).

    If all items agree, the bootstrap has no spread, and the interval is Clopper and Pearson's with one trial per
    prompt. No model pass.

    Examples:
        >>> print(accuracy(scored))
        1.000 [0.858, 1.000]
    """
    return bootstrap_share(correctness(scored, tie_value=tie_value), scored.by_item().pairs, level=level, seed=seed)


def macro_accuracy(scored: PairRewards, *, tie_value: float = 0.5, level: float = 0.95, seed: int = 0) -> Estimate:
    """The unweighted mean of the subsets' accuracies, as benchmarks report it, with an interval over prompts.

    In a resample without any item of a subset, the mean is over the other subsets.

    Examples:
        >>> print(macro_accuracy(scored))
        1.000 [1.000, 1.000]
    """
    items = scored.by_item()
    right = correctness(scored, tie_value=tie_value)
    names = list(dict.fromkeys(pair.subset for pair in items.pairs))
    member = torch.tensor([[pair.subset == name for name in names] for pair in items.pairs], dtype=torch.float64)
    columns = torch.cat([member * right[:, None], member], dim=1)
    whole = columns.sum(dim=0)
    sums = resampled_sums(columns, items.pairs, seed=seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.nanmean(sums[:, : len(names)] / sums[:, len(names) :], axis=1)
    value = float((whole[: len(names)] / whole[len(names) :]).mean())
    n_prompts = len(items.pairs.prompts)
    low, high = percentile_interval(means, level) if n_prompts > 1 else (np.nan, np.nan)
    return Estimate(value, low, high, len(items), n_prompts, level)


def mean_margin(scored: PairRewards, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean margin of the items in the model's own reward units, with a bootstrap interval over prompts.

    Examples:
        >>> estimate = mean_margin(scored)
        >>> estimate.low <= estimate.value <= estimate.high
        True
    """
    items = scored.by_item()
    return bootstrap_mean(items.margin, items.pairs, level=level, seed=seed)


def chance(pairs: PreferencePairs) -> Float[Tensor, "item"]:
    """The probability that random rewards rank each item correctly: 1 / C(m + n, m) for m chosen and n rejected.

    1/2 for a pair by itself.

    Examples:
        >>> row = {"prompt": "2 + 2?", "chosen": "4", "item": "sum"}
        >>> of_three = PreferencePairs.from_records([row | {"rejected": wrong} for wrong in ("5", "6", "7")])
        >>> chance(of_three), chance(pairs["helpful"][:2])
        (tensor([0.2500], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    values = []
    for rows in pairs.items:
        chosen = len({pairs[row].chosen for row in rows})
        rejected = len({pairs[row].rejected for row in rows})
        values.append(1 / comb(chosen + rejected, chosen))
    return torch.tensor(values, dtype=torch.float64)


def by_subset(scored: PairRewards, *, tie_value: float = 0.5, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Accuracy and mean margin of every subset, with intervals, chance accuracy and n: one row per subset.

    Subsets are in order of appearance.

    Examples:
        >>> by_subset(scored)[["subset", "accuracy", "chance", "n"]]
          subset  accuracy  chance   n
        0   None       1.0     0.5  24
    """
    rows = []
    for subset, part in _subsets(scored):
        right = accuracy(part, tie_value=tie_value, level=level, seed=seed)
        margin = mean_margin(part, level=level, seed=seed)
        rows.append(
            {
                "subset": subset,
                "accuracy": right.value,
                "low": right.low,
                "high": right.high,
                "chance": float(chance(part.pairs).mean()),
                "margin": margin.value,
                "margin_low": margin.low,
                "margin_high": margin.high,
                "n": right.n,
                "n_prompts": right.n_prompts,
            }
        )
    return pd.DataFrame(rows)


def balance(
    scored: PairRewards,
    *,
    refuse: Iterable[str] = REFUSE_SUBSETS,
    respond: Iterable[str] = RESPOND_SUBSETS,
    tie_value: float = 0.5,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Accuracy where refusing is right (`refusing`), where responding is right (`responding`), and their mean.

    A model that always refuses gets 1, 0 and 0.5. The dict is empty if either kind of subset is absent.

    Examples:
        >>> from dataclasses import replace
        >>> subsets = ("should_refuse", "should_respond")
        >>> labelled = [replace(pair, subset=subsets[number % 2]) for number, pair in enumerate(pairs["harmless"])]
        >>> {name: estimate.value for name, estimate in balance(head.score_pairs(labelled)).items()}
        {'refusing': 1.0, 'responding': 1.0, 'balanced': 1.0}
    """
    parts = [scored.filter(subset=subsets) for subsets in (refuse, respond)]
    if not all(len(part) for part in parts):
        return {}
    refusing, responding = (accuracy(part, tie_value=tie_value, level=level, seed=seed) for part in parts)
    # The interval of a mean from those of its parts (Zou and Donner 2008); it keeps its width where a part is 0 or 1.
    # The two kinds of subset have different prompts, so the parts are independent.
    mean = (refusing.value + responding.value) / 2
    below = float(np.hypot(refusing.value - refusing.low, responding.value - responding.low)) / 2
    above = float(np.hypot(refusing.high - refusing.value, responding.high - responding.value)) / 2
    sizes = (refusing.n + responding.n, refusing.n_prompts + responding.n_prompts)
    balanced = Estimate(mean, mean - below, mean + above, *sizes, level)
    return {"refusing": refusing, "responding": responding, "balanced": balanced}


def change(
    after: PairRewards, before: PairRewards, *, quantity: str = "accuracy", level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean change of accuracy or margin from `before` to `after`, paired by item, with an interval over prompts.

    `quantity` is "accuracy" (a tie counts 1/2) or "margin". Raises `DataError` unless both hold the same pairs in the
    same order.

    Examples:
        >>> with AblationContext(head, neurons):
        ...     after = head.score_pairs(pairs["helpful"])
        >>> change(after, scored, quantity="margin").high < 0
        True
    """
    values = item_change(after, before, quantity)
    return bootstrap_mean(values, after.by_item().pairs, level=level, seed=seed)


def item_change(
    after: PairRewards, before: PairRewards, quantity: str, *, tie_value: float = 0.5
) -> Float[Tensor, "item"]:
    """The change of every item; raises `DataError` unless both hold the same pairs in the same order."""
    check_quantity(quantity)
    if after.pairs != before.pairs:
        raise DataError(
            "change: expected rewards of the same pairs in the same order. Score both models on the same pairs."
        )
    return item_values(after, quantity, tie_value=tie_value) - item_values(before, quantity, tie_value=tie_value)


def item_values(scored: PairRewards, quantity: str, *, tie_value: float = 0.5) -> Float[Tensor, "item"]:
    """Every item's correctness, or its margin."""
    check_quantity(quantity)
    return scored.by_item().margin.double() if quantity == "margin" else correctness(scored, tie_value=tie_value)


@dataclass(frozen=True)
class Comparison:
    """Accuracy of the first model minus that of the second on the same items, with its p-value; see `compare`.

    `test` is "McNemar" (exact) if every prompt has one item and there are no ties, otherwise "sign flip" over prompts.
    `n_gained` counts items that the first model ranks better than the second (a tie is between right and wrong),
    `n_lost` those that it ranks worse.

    Examples:
        >>> comparison = compare(scored, scored)
        >>> print(comparison.difference, comparison.p_value)
        0.000 [0.000, 0.000] 1.0
    """

    difference: Estimate
    p_value: float
    test: str
    n_gained: int
    n_lost: int

    def _repr_html_(self) -> str:
        return html_table("Comparison: accuracy of the first minus the second", pd.DataFrame([comparison_row(self)]))


def compare(
    first: PairRewards, second: PairRewards, *, tie_value: float = 0.5, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Paired comparison of two models' accuracies on the same pairs: difference, interval over prompts, p-value.

    Raises `DataError` unless both hold the same pairs in the same order.

    Examples:
        >>> before = head.score_pairs(pairs["harmless"])
        >>> with AblationContext(head, organism.truth["harmless"]):
        ...     after = head.score_pairs(pairs["harmless"])
        >>> comparison = compare(after, before)
        >>> comparison.test, comparison.n_gained, comparison.n_lost
        ('McNemar', 0, 4)
    """
    gap = item_change(first, second, "accuracy", tie_value=tie_value)
    pairs = first.by_item().pairs
    difference = bootstrap_mean(gap, pairs, level=level, seed=seed)
    gained, lost = int((gap > 0).sum()), int((gap < 0).sum())
    independent = len(pairs.prompts) == len(pairs) and bool((gap == gap.round()).all())
    p_value = mcnemar_p_value(gained, lost) if independent else sign_flip_p_value(gap, pairs, seed=seed)
    return Comparison(difference, p_value, "McNemar" if independent else "sign flip", gained, lost)


def compare_by_subset(
    first: PairRewards, second: PairRewards, *, tie_value: float = 0.5, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """`compare` in every subset: one row per subset, with `q_value`, the p-value adjusted for the number of subsets.

    The adjustment is Benjamini and Hochberg's (1995).

    Examples:
        >>> compare_by_subset(scored, scored)[["subset", "difference", "p_value", "q_value", "n"]]
          subset  difference  p_value  q_value   n
        0   None         0.0      1.0      1.0  24
    """
    if first.pairs != second.pairs:
        raise DataError("compare: expected rewards of the same pairs in the same order. Score both on the same pairs.")
    rows = []
    for (subset, of_first), (_, of_second) in zip(_subsets(first), _subsets(second), strict=True):
        comparison = compare(of_first, of_second, tie_value=tie_value, level=level, seed=seed)
        rows.append({"subset": subset, **comparison_row(comparison)})
    frame = pd.DataFrame(rows)
    return frame.assign(q_value=adjusted_p_values(frame["p_value"].tolist()))


def comparison_row(comparison: Comparison) -> dict[str, object]:
    """A comparison as one row of a table."""
    estimate = comparison.difference
    return {
        "difference": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "p_value": comparison.p_value,
        "test": comparison.test,
        "n_gained": comparison.n_gained,
        "n_lost": comparison.n_lost,
        "n": estimate.n,
    }


# What an ablation may change.
QUANTITIES = ("accuracy", "margin")


def check_quantity(quantity: str) -> None:
    """Raise `OptionError` unless `quantity` is "accuracy" or "margin"."""
    if quantity not in QUANTITIES:
        raise OptionError(f"quantity: expected 'accuracy' or 'margin', got {quantity!r}.")


def subset_places(pairs: PreferencePairs) -> dict[str, list[int]]:
    """The indices of each subset's pairs, in order of appearance; pairs without a subset are in "None"."""
    indices: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        indices.setdefault(str(pair.subset), []).append(index)
    return indices


def _subsets(scored: PairRewards) -> list[tuple[str, PairRewards]]:
    return [(name, scored.take(indices)) for name, indices in subset_places(scored.pairs).items()]
