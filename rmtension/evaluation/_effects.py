"""The effect of an ablation on one group of pairs, with its interval and compared with random sets."""

from collections.abc import Sequence
from typing import Any

from rmtension.evaluation._controls import NO_CONTROL, against_random
from rmtension.evaluation._intervals import bootstrap_mean
from rmtension.evaluation._metrics import item_change, item_values
from rmtension.evaluation._pair_rewards import PairRewards


def effect_beyond_random(
    after: PairRewards,
    before: PairRewards,
    random: Sequence[PairRewards],
    quantity: str,
    *,
    tie_value: float = 0.5,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of a table of effects.

    The row has the mean `before` and `after`, the `effect` with its interval over prompts, and the control: the mean
    and spread of the effects under `random`, and the effect beyond their mean with the interval of `against_random`.
    Without random sets, the control is NaN.
    """
    changes = [item_change(rewards, before, quantity, tie_value=tie_value) for rewards in (after, *random)]
    pairs = after.by_item().pairs
    effect = bootstrap_mean(changes[0], pairs, level=level, seed=seed)
    control = against_random(changes[0], changes[1:], pairs, level=level) if random else NO_CONTROL
    return {
        "before": float(item_values(before, quantity, tie_value=tie_value).mean()),
        "after": float(item_values(after, quantity, tie_value=tie_value).mean()),
        "effect": effect.value,
        "low": effect.low,
        "high": effect.high,
        "random_effect": control.random_mean,
        "random_sd": control.random_sd,
        "set_sd": control.set_sd,
        "n_draws": control.n_draws,
        "beyond_random": control.difference,
        "beyond_low": control.low,
        "beyond_high": control.high,
        "n": effect.n,
    }
