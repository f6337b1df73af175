"""What length alone explains: the rule that prefers the longer response, and pairs in which it is of no use."""

import numpy as np
import torch

from rmtension.data._chat import n_characters
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError
from rmtension.evaluation._intervals import Estimate, bootstrap_share


def length_baseline(pairs: PreferencePairs, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Accuracy of preferring the response with more characters (equal: 1/2).

    Items of several pairs are judged as rewards are: by the shortest chosen and the longest rejected
    response. Of single pairs, one minus it is the accuracy of preferring the shorter.

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
    """The largest part of `pairs` found in which length says nothing about the preference.

    A pair whose chosen response is the longer one stays if another, whose rejected response is longer by about as
    much, stays with it: their log ratios of lengths differ by at most `caliper`. Pairs of equal length stay. So the
    longer response is chosen in exactly half of what is left, at every ratio. In the order of `pairs`; raises
    `DataError` when nothing is left, and for items of several pairs, which have no one length.

    Examples:
        >>> rows = [{"prompt": "Q", "chosen": "yes", "rejected": other} for other in ("no!", "certainly not")]
        >>> length_matched(PreferencePairs.from_records(rows)).to_frame()["rejected"].tolist()
        ['no!']
    """
    return PreferencePairs(pairs[place] for place in length_matched_places(pairs, caliper=caliper))


def length_matched_places(pairs: PreferencePairs, *, caliper: float = 0.2) -> list[int]:
    """Where the pairs are that `length_matched` keeps."""
    if not caliper >= 0:
        raise OptionError(f"caliper: expected a number from 0, got {caliper}.")
    if any(len(rows) > 1 for rows in pairs.items):
        raise DataError("pairs: expected single pairs, got items of several. Match each benchmark's single pairs.")
    # A message of tool calls alone has no characters.
    ratios = np.array([np.log(max(1, n_characters(one.chosen)) / max(1, n_characters(one.rejected))) for one in pairs])
    kept = list(np.flatnonzero(ratios == 0))
    longer = sorted(np.flatnonzero(ratios > 0), key=lambda place: ratios[place])
    shorter = sorted(np.flatnonzero(ratios < 0), key=lambda place: -ratios[place])
    one = other = 0
    # Both sorted by size: a pair that the smallest of the other side is out of reach of can match nothing later.
    while one < len(longer) and other < len(shorter):
        gap = ratios[longer[one]] + ratios[shorter[other]]
        if abs(gap) <= caliper:
            kept += [longer[one], shorter[other]]
            one, other = one + 1, other + 1
        elif gap < 0:
            one += 1
        else:
            other += 1
    if not kept:
        raise DataError(f"pairs: no two of {len(pairs)} pairs match in length within {caliper}. Raise the caliper.")
    return sorted(map(int, kept))
