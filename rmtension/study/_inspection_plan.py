"""The plan of an inspection: what runs, on how many pairs, and how long it takes on this machine."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import OptionError
from rmtension.study._speed import Speed, duration, n_read

# An inspection without a budget runs this much; a budget makes it smaller, never larger.
MOST = {"n_draws": 8, "n_neurons": 96, "n_faithful_pairs": 48, "n_dashboards": 12}
LEAST = {"n_draws": 2, "n_neurons": 12, "n_faithful_pairs": 8, "n_dashboards": 2}
# Fewer pairs per group, over both halves, say too little.
LEAST_PAIRS = 24
# The forward passes of `RewardHead.check`, over at most this many pairs.
_CHECKS, _PAIRS_CHECKED = 30, 8
# Calls per group that the dashboards make: five passes and about as many short ones for texts and tables.
_DASHBOARD_CALLS = 12
# The shares of neurons whose sets `faithfulness` ablates, and the number of random sets for each.
FAITHFUL_FRACTIONS = (0.01, 0.05)
FAITHFUL_RANDOM = 4
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.32, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.015, 0.01, 0.005, 0.0)


@dataclass(frozen=True)
class InspectionPlan:
    """What an inspection runs; print it before the run.

    `pairs` counts the pairs of every group that are used, and `available` those that there are. `steps` has one row per
    step: what it does, its cost in passes over the pairs that are used (both texts), and its predicted seconds.

    Examples:
        >>> from rmtension.study import ModelInspector
        >>> plan = ModelInspector(head, pairs["helpful"], budget="10min").plan
        >>> plan.pairs, plan.seconds < 600, list(plan.to_frame()["step"])
        ({'all pairs': 24}, True, ['checks', 'rewards', 'means', 'attribution', 'ablations', 'faithfulness', 'neurons'])
    """

    pairs: Mapping[str, int]
    available: Mapping[str, int]
    n_draws: int
    n_neurons: int
    n_faithful_pairs: int
    n_dashboards: int
    steps: pd.DataFrame

    @property
    def seconds(self) -> float:
        """The predicted time of all steps."""
        return float(self.steps["seconds"].sum())

    def to_frame(self) -> pd.DataFrame:
        """A copy of `steps`."""
        return self.steps.copy()

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, for JSON."""
        values = {name: getattr(self, name) for name in ("pairs", "available", *MOST)}
        return values | {"steps": self.steps.to_dict("records"), "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InspectionPlan":
        """The plan that `to_dict` described."""
        sizes = {name: int(values[name]) for name in MOST}
        return cls(dict(values["pairs"]), dict(values["available"]), **sizes, steps=pd.DataFrame(values["steps"]))

    def __repr__(self) -> str:
        used, there = sum(self.pairs.values()), sum(self.available.values())
        of = "" if used == there else f" of {there:,}"
        lines = [f"Inspection of {used:,}{of} pairs in {len(self.pairs)} groups, about {duration(self.seconds)}:"]
        lines += [
            f"  {row['step']:<14}{row['what']}; {row['passes']:.1f} passes, {duration(row['seconds'])}"
            for row in self.steps.to_dict("records")
        ]
        return "\n".join(lines)


def parse_budget(budget: int | float | str | None) -> float | None:
    """Seconds of a budget: a number of seconds, or a text such as "20min"; raises `OptionError` for anything else."""
    if budget is None:
        return None
    value = None
    if isinstance(budget, str):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)?\s*", budget):
            value = float(match[1]) * _UNITS[match[2] or ""]
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        value = float(budget)
    if value is None or not 0 < value < math.inf:
        raise OptionError(f"budget: expected seconds or a text such as '90s', '20min' or '1.5h', got {budget!r}.")
    return value


def choose_plan(
    speed: Speed,
    groups: Mapping[str, PreferencePairs],
    *,
    budget: int | float | None,
    n_all_neurons: int,
    most_pairs: int,
    n_outputs: int = 0,
    spent: float = 0.0,
) -> InspectionPlan:
    """The largest inspection within the budget; everything that there is without one.

    `most_pairs` is the number of pairs whose scores fit into memory, `n_outputs` that of outputs that are compared.
    Raises `OptionError` if the smallest inspection takes longer than the budget without the `spent` seconds, and says
    how long that is.
    """
    plans = (_plan(speed, groups, share, n_all_neurons, most_pairs, n_outputs) for share in _SHARES)
    plan = next(plans)
    while budget is not None and plan.seconds + spent > budget:
        smaller = next(plans, None)
        if smaller is None:
            raise OptionError(
                f"budget: the smallest inspection of these pairs takes about {duration(plan.seconds + spent)} on this "
                f"machine ({sum(plan.pairs.values())} pairs), got {duration(budget)}. Give at least "
                f"{math.ceil(plan.seconds + 1.2 * spent)} seconds, fewer groups, or a smaller model."
            )
        plan = smaller
    return plan


# -- parts -------------------------------------------------------------------------------------------------------------


def _plan(
    speed: Speed,
    groups: Mapping[str, PreferencePairs],
    share: float,
    n_all_neurons: int,
    most_pairs: int,
    n_outputs: int,
) -> InspectionPlan:
    share_of_pairs = min(share, most_pairs / max(1, sum(map(len, groups.values()))))
    pairs = {name: min(len(part), max(LEAST_PAIRS, round(share_of_pairs * len(part)))) for name, part in groups.items()}
    sizes = {name: max(LEAST[name], round(MOST[name] * min(1.0, math.sqrt(share) * 1.2))) for name in MOST}
    sizes["n_neurons"] = min(sizes["n_neurons"], n_all_neurons)
    available = {name: len(part) for name, part in groups.items()}
    plan = InspectionPlan(pairs, available, **sizes, steps=pd.DataFrame())
    return replace(plan, steps=_steps(speed, groups, plan, n_outputs))


def _steps(speed: Speed, groups: Mapping[str, PreferencePairs], plan: InspectionPlan, n_outputs: int) -> pd.DataFrame:
    length = {name: sum(map(n_read, part)) / max(1, len(part)) for name, part in groups.items()}
    used = sum(plan.pairs[name] * length[name] for name in groups)
    per_pair = used / max(1, sum(plan.pairs.values()))
    half = used / 2
    faithful = min(plan.n_faithful_pairs, sum(plan.pairs.values()) // 2) * per_pair
    n_sets = len(groups) + (len(groups) > 1)
    sweep = n_sets * (1 + plan.n_draws)
    few_sets = len(FAITHFUL_FRACTIONS) * (1 + FAITHFUL_RANDOM)
    n_shown = 2 * plan.n_dashboards
    neurons = "neuron" if plan.n_neurons == 1 else "neurons"
    # What it does, and seconds without and with a batch of its own.
    checked = _CHECKS * _PAIRS_CHECKED * per_pair
    rows = [
        ("checks", "rewards and hooks of this model", checked * speed.forward, _CHECKS),
        ("rewards", f"rewards of {sum(plan.pairs.values()):,} pairs", used * speed.forward, 1),
        ("means", "mean activations, which replace ablated ones", half * speed.forward, 1),
        ("attribution", "a score per neuron and pair, on one half of the prompts", half * speed.gradient, 1),
        (
            "ablations",
            f"{n_sets} sets and {n_sets * plan.n_draws} random sets, on the other half",
            half * (speed.forward + sweep * speed.ablation),
            1 + sweep // 2,
        ),
        (
            "faithfulness",
            f"{plan.n_neurons} {neurons} ablated one by one, and {few_sets} sets",
            faithful * (speed.gradient + plan.n_neurons * speed.neuron + few_sets * speed.forward),
            few_sets + 2,
        ),
        (
            "neurons",
            f"{plan.n_dashboards} neurons one by one, with texts",
            half * (speed.gradient + 3 * speed.forward + n_shown * speed.neuron),
            _DASHBOARD_CALLS * len(groups),
        ),
    ]
    if n_outputs:
        seconds = used * speed.forward + n_outputs * half * speed.gradient
        rows.insert(4, ("outputs", f"rewards and scores by {n_outputs} outputs", seconds, 1 + n_outputs))
    whole = used * speed.forward
    return pd.DataFrame(
        [
            {"step": step, "what": what, "passes": seconds / whole, "seconds": seconds + calls * speed.fixed}
            for step, what, seconds, calls in rows
        ]
    )
