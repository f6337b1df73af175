"""The answer of an inspection in sentences: effects of ablation, conflict of groups, and faithfulness of the scores."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from rmtension.data._groups import ALL
from rmtension.evaluation._intervals import with_interval

# With more groups, the sentences name those with the largest effects.
_MOST_NAMED = 3


def findings(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Sentences with numbers, intervals and controls, the most important first."""
    outputs = tables.get("output_maps", pd.DataFrame())
    return [
        *_failed(tables["checks"]),
        *_effects(tables["effects"]),
        *_maps(tables["maps"]),
        *_maps(outputs, "Outputs "),
        *_trust(tables),
    ]


def undecided(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the pairs do not show, as sentences."""
    own = own_effects(tables["effects"])
    sentences = []
    for row in own.to_dict("records"):
        if row["size"] and pd.isna(row["random_effect"]):
            sentences.append(
                f"{row['group']}: too few neurons outside its top set are left in its layers for random sets of that "
                "size, so its effect has no control."
            )
        elif row["size"] and not (row["beyond_low"] > 0 or row["beyond_high"] < 0):
            beyond = _interval(row, "beyond_random", abs(row["before"]), "beyond_low", "beyond_high")
            sentences.append(
                f"{row['group']}: without its top set, the margin changes by {beyond} beyond random sets "
                f"(n = {row['n']}), so these pairs do not show a direction."
            )
    notes = tables["groups"].drop_duplicates("group")
    sentences += [
        f"{row['group']} ({row['n']} pairs): {row['note']}." for row in notes.to_dict("records") if row["note"]
    ]
    for row in tables["maps"].to_dict("records"):
        if row["low"] <= 0 <= row["high"]:
            sentences.append(
                f"{row['first']} and {row['second']}: the cosine of their attributions is {_interval(row, 'cosine')}; "
                "its interval contains 0."
            )
    sentences.append("Effects are those of one model on these pairs; another training or other prompts can differ.")
    return sentences


def own_effects(effects: pd.DataFrame) -> pd.DataFrame:
    """The rows in which a group's own top set is ablated, for the margin; the largest effect beyond random first."""
    own = effects[(effects["group"] == effects["set"]) & (effects["quantity"] == "margin")]
    order = own["beyond_random"].abs().sort_values(ascending=False, kind="stable").index
    return own.loc[order]


# -- sentences ---------------------------------------------------------------------------------------------------------


def _failed(checks: pd.DataFrame) -> list[str]:
    failed = checks[~checks["passed"].astype(bool)]
    if failed.empty:
        return []
    names = ", ".join(failed["check"])
    return [
        f"{len(failed)} of {len(checks)} checks of this model did not pass ({names}), so numbers below may be wrong. "
        "See the table of checks."
    ]


def _effects(effects: pd.DataFrame) -> list[str]:
    sentences = []
    margins = effects[effects["quantity"] == "margin"]
    for row in own_effects(effects).head(_MOST_NAMED).to_dict("records"):
        if not row["size"]:
            sentences.append(f"No neuron supports {row['group']} in the half of the pairs that scores neurons.")
            continue
        scale = abs(row["before"])
        which = "neuron that most supports" if row["size"] == 1 else f"{row['size']:,} neurons that most support"
        sentence = (
            f"Ablating the {which} {row['group']} changes its mean margin from {_number(row['before'], scale)} to "
            f"{_number(row['after'], scale)} ({_interval(row, 'effect', _scale(row))}); {_random(row, _scale(row))}."
        )
        others = margins[(margins["set"] == row["set"]) & ~margins["group"].isin([row["group"], ALL])]
        if len(others):
            other = others.iloc[int(others["effect"].abs().to_numpy().argmax())].to_dict()
            most = "" if len(others) == 1 else ", the other group that changes most,"
            sentence += (
                f" The margin of {other['group']}{most} changes by {_interval(other, 'effect', _scale(other))}; "
                f"{_random(other, _scale(other))}."
            )
        sentences.append(sentence)
    return sentences


def _maps(maps: pd.DataFrame, what: str = "") -> list[str]:
    if maps.empty:
        return []
    row = maps.iloc[int(maps["cosine"].abs().to_numpy().argmax())].to_dict()
    against = row["first_against_second"] + row["second_against_first"]
    counts = (
        f"{_counted(row['support_both'])} {'supports' if row['support_both'] == 1 else 'support'} both, "
        f"{row['oppose_both']} oppose both, and {against} support one "
        "and oppose the other"
    )
    cosine = _interval(row, "cosine")
    return [
        f"{what}{row['first']} and {row['second']}: {counts}. The cosine of their attributions is {cosine}; "
        f"with random signs per prompt it lies in [{row['random_signs_low']:.2f}, {row['random_signs_high']:.2f}]."
    ]


def _trust(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    summary, sets = tables["faithfulness"], tables["faithfulness_sets"]
    if summary.empty:
        return []
    row = summary.iloc[0].to_dict()
    if pd.isna(row["spearman"]):
        return []
    interval = with_interval(row["spearman"], row["spearman_low"], row["spearman_high"], form=".2f")
    sentence = (
        f"On {row['n']} neurons ablated one by one, scores and true effects have a Spearman correlation of {interval}"
    )
    if len(sets):
        largest = sets.iloc[-1].to_dict()
        scale = abs(largest["effect"])
        predicted, effect = (_number(largest[name], scale, sign=True) for name in ("predicted", "effect"))
        sentence += (
            f"; for the top {_counted(largest['size'])} of these pairs, the scores predict that ablating them changes "
            f"the margin by {predicted}, and the true change is {effect}"
        )
    return [sentence + "."]


def _random(row: Mapping[Any, Any], scale: float) -> str:
    if pd.isna(row["random_effect"]):
        return "there is no random set to compare with"
    return f"random sets of this size change it by {_number(row['random_effect'], scale, sign=True)}"


def _scale(row: Mapping[Any, Any]) -> float:
    """The size that an effect is shown by: its own, but not less than a hundredth of the margin's."""
    return float(max(abs(row["effect"]), abs(row["before"]) / 100))


def _interval(row: Mapping[Any, Any], value: str, scale: float = 1.0, low: str = "low", high: str = "high") -> str:
    shown, *ends = (_number(row[name], scale, sign=True) for name in (value, low, high))
    if pd.isna(row[low]):
        return f"{shown} (no interval: too few prompts)"
    return f"{shown} [{', '.join(ends)}]"


def _number(value: float, scale: float = 1.0, *, sign: bool = False) -> str:
    """A number with three digits of a quantity of this size, so that rounding noise is 0."""
    digits = max(0, 2 - math.floor(math.log10(scale))) if 0 < scale < math.inf else 2
    text = f"{round(value, digits) + 0.0:+.{digits}f}"
    is_zero = float(text) == 0
    return text.lstrip("+-") if is_zero or (not sign and value > 0) else text


def _counted(n: int) -> str:
    return f"{n:,} neuron" if n == 1 else f"{n:,} neurons"
