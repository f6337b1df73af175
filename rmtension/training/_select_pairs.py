"""The pairs that a reward model is trained on: all, those of one objective, or a mixture of objectives."""

import math
from collections.abc import Mapping

from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError


def select_pairs(
    pairs: PreferencePairs | Mapping[str, PreferencePairs],
    *,
    objective: str | None = None,
    proportions: Mapping[str, float] | None = None,
    n_pairs: int | None = None,
    seed: int = 0,
) -> PreferencePairs:
    """The pairs that `train_reward_model` trains on: all, those of one objective, or a mixture by `proportions`.

    Proportions are positive, sum to 1 and hold up to rounding (largest remainder). `seed` determines the draw. Raises
    `OptionError` for invalid or unknown objectives and proportions, `DataError` for too few pairs.

    Examples:
        >>> len(select_pairs(pairs, proportions={"helpful": 0.75, "harmless": 0.25}))
        32
    """
    if objective is not None and proportions is not None:
        raise OptionError("objective, proportions: expected one of the two, got both. Leave one out.")
    if isinstance(pairs, PreferencePairs):
        if objective is None and proportions is None:
            return _drawn(pairs, n_pairs, seed, "pairs")
        pairs = {name: pairs.filter(objective=name) for name in pairs.objectives}
    if objective is None and proportions is None:
        raise OptionError(
            f"pairs: got a mapping with the objectives {sorted(pairs)}. Pass objective=... to train on one, or "
            "proportions={...} to mix several."
        )
    unknown = {objective} - set(pairs) if proportions is None else set(proportions) - set(pairs)
    if unknown:
        raise OptionError(f"objective, proportions: expected some of {sorted(pairs)}, got {sorted(map(str, unknown))}.")
    if proportions is None:
        return _drawn(pairs[str(objective)], n_pairs, seed, f"{objective} pairs")
    if min(proportions.values(), default=0.0) <= 0 or not math.isclose(sum(proportions.values()), 1, abs_tol=1e-6):
        raise OptionError(f"proportions: expected positive numbers that sum to 1, got {dict(proportions)}.")
    # Without 1e-9, rounding errors would turn 0.1 * 30 into 2.
    most = math.floor(min(len(pairs[name]) / share for name, share in proportions.items()) + 1e-9)
    total = most if n_pairs is None else n_pairs
    if not 0 < total <= most:
        raise DataError(f"n_pairs: expected 1 to {most}, the most these proportions allow, got {total}.")
    exact = {name: total * share for name, share in proportions.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[name] += 1
    parts = [pairs[name].sample(count, seed=seed) for name, count in counts.items() if count]
    return PreferencePairs(pair for part in parts for pair in part)


def _drawn(pairs: PreferencePairs, n_pairs: int | None, seed: int, name: str) -> PreferencePairs:
    if not len(pairs) or (n_pairs is not None and not 0 < n_pairs <= len(pairs)):
        raise DataError(
            f"n_pairs: expected a number from 1 to the number of {name}, which is {len(pairs)}, got {n_pairs}."
        )
    return pairs if n_pairs is None else pairs.sample(n_pairs, seed=seed)
