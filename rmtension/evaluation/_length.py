"""What length alone explains: the accuracy of preferring the longer response, and pairs in which that rule fails."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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


def length_weights(pairs: PreferencePairs, *, n_bins: int = 10, most: float = 4.0) -> Float[Tensor, "pair"]:
    """Weights of pairs with which length says nothing about the preference.

    Pairs are divided into `n_bins` bins by how much the two lengths differ, as the size of the log ratio of characters.
    In each bin, the pairs whose chosen response is longer get the same total weight as those whose rejected response
    is longer, so that the weighted accuracy of preferring the longer response is 1/2. A bin with one kind only keeps
    the weight 1, and no weight is above `most`; where either applies, length still says something. At the end all
    weights are divided by their mean, so the mean weight is 1.

    Examples:
        >>> rows = [{"prompt": "Q", "chosen": "yes, certainly", "rejected": "no"}] * 3
        >>> pairs = PreferencePairs.from_records([*rows, {"prompt": "Q", "chosen": "no", "rejected": "yes, certainly"}])
        >>> length_weights(pairs, n_bins=1)
        tensor([0.6667, 0.6667, 0.6667, 2.0000], dtype=torch.float64)
    """
    if n_bins < 1 or not most >= 1:
        raise OptionError(f"n_bins, most: expected at least 1 of each, got {n_bins} and {most}.")
    ratios = _log_ratios(pairs)
    edges = np.quantile(np.abs(ratios), np.arange(1, n_bins) / n_bins) if len(pairs) else []
    bins = np.digitize(np.abs(ratios), edges)
    weights = np.ones(len(pairs))
    for number in range(n_bins):
        kinds = [(bins == number) & (ratios > 0), (bins == number) & (ratios < 0)]
        counts = [int(kind.sum()) for kind in kinds]
        if min(counts):
            for kind, count in zip(kinds, counts, strict=True):
                weights[kind] = min(most, sum(counts) / (2 * count))
    return torch.from_numpy(weights / weights.mean() if len(pairs) else weights)


def length_matched_places(pairs: PreferencePairs, *, caliper: float = 0.2) -> list[int]:
    """The indices of the pairs that `length_matched` keeps."""
    if not caliper >= 0:
        raise OptionError(f"caliper: expected a number of at least 0, got {caliper}.")
    if any(len(rows) > 1 for rows in pairs.items):
        raise DataError(
            "pairs: expected items of one pair each, got items of several pairs. Match only the single pairs of each "
            "benchmark."
        )
    ratios = _log_ratios(pairs)
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


def _log_ratios(pairs: PreferencePairs) -> Float[np.ndarray, "pair"]:
    """The logarithm of the chosen response's characters over the rejected one's, for every pair."""
    # At least 1: a message that only calls tools has no characters.
    return np.array([np.log(max(1, n_characters(p.chosen)) / max(1, n_characters(p.rejected))) for p in pairs])
