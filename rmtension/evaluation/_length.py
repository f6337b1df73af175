"""What length alone explains: the accuracy of preferring the longer response, and pairs in which that rule fails."""

import numpy as np
import torch

from rmtension.data._chat import n_characters
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._intervals import Estimate, bootstrap_share


def length_baseline(pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Accuracy of preferring the response with more characters (equal lengths count 1/2). No model pass.

    Items of several pairs are judged as for rewards: by the shortest chosen and the longest rejected response. For
    single pairs, the accuracy of preferring the shorter response is 1 minus this value.

    Examples:
        >>> from rmtension.synthetic import preference_world
        >>> print(length_baseline(preference_world(0, n_train=48, n_test=48).test["helpful"]).value)
        0.5
    """
    values = []
    for rows in pairs.items:
        gap = min(n_characters(pairs[row].chosen) for row in rows) - max(
            n_characters(pairs[row].rejected) for row in rows
        )
        values.append(float(np.sign(gap)) / 2 + 0.5)
    return bootstrap_share(torch.tensor(values).double(), pairs.by_item, level=level, seed=seed)


def length_matched(pairs: PreferencePairs, *, caliper: float = 0.2) -> PreferencePairs:
    """Select pairs in which length says nothing about the preference.

    Each pair whose chosen response is longer is matched with a pair whose rejected response is longer by about as much:
    their log ratios of lengths differ by at most `caliper`. Matched pairs and pairs of equal length are kept, in the
    order of `pairs`; so the longer response is the chosen one in half of the kept pairs with unequal lengths, at every
    ratio. The number of matches is the largest possible. Raises `DataError` if no pair is left, and for items of
    several pairs, which do not have a single length.

    Examples:
        >>> rows = [{"prompt": "Q", "chosen": "yes", "rejected": bad} for bad in ("no!", "certainly not")]
        >>> length_matched(PreferencePairs.from_records(rows)).to_frame()["rejected"].tolist()
        ['no!']
    """
    return PreferencePairs(pairs[index] for index in length_matched_places(pairs, caliper=caliper))


def length_matched_places(pairs: PreferencePairs, *, caliper: float = 0.2) -> list[int]:
    """The indices of the pairs that `length_matched` keeps."""
    if not caliper >= 0:
        raise OptionError(f"caliper: expected a number of at least 0, got {caliper}.")
    if any(len(rows) > 1 for rows in pairs.items):
        raise DataError(
            "pairs: expected items of one pair each, got items of several pairs. Match only the single pairs of each "
            "benchmark."
        )
    # At least 1: a message that only calls tools has no characters.
    ratios = np.array([np.log(max(1, n_characters(p.chosen)) / max(1, n_characters(p.rejected))) for p in pairs])
    kept = list(np.flatnonzero(ratios == 0))
    longer = sorted(np.flatnonzero(ratios > 0), key=lambda index: ratios[index])
    shorter = sorted(np.flatnonzero(ratios < 0), key=lambda index: -ratios[index])
    i = j = 0
    # Both lists ascend in |ratio|: a pair that cannot match the smallest of the other list cannot match a later one.
    while i < len(longer) and j < len(shorter):
        gap = ratios[longer[i]] + ratios[shorter[j]]
        if abs(gap) <= caliper:
            kept += [longer[i], shorter[j]]
            i, j = i + 1, j + 1
        elif gap < 0:
            i += 1
        else:
            j += 1
    if not kept:
        raise DataError(f"pairs: no two of {len(pairs)} pairs match in length within {caliper}. Raise the caliper.")
    return sorted(map(int, kept))
