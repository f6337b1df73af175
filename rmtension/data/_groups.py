"""Groups of pairs: by objective, by subset, or by labels of the user's own."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from rmtension._arguments import nearest
from rmtension.data._pair import PreferencePair, is_missing
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError, RMTensionWarning

# The name of the row of all pairs in tables; no group has it.
ALL = "all pairs"

GroupBy = str | Iterable[Any] | Callable[[PreferencePair], Any]


def group_rows(pairs: PreferencePairs, by: GroupBy) -> dict[str, list[int]]:
    """The indices of every group's pairs, by name, in order of first appearance.

    `by` is "objective", "subset" or another label that the pairs were read with (`PreferencePair.labels`); a sequence
    with one label per pair; or a function from a pair to its label. Labels become text; None, NaN and "" are no label.
    Pairs without a label are in no group; if some pairs have one, an `RMTensionWarning` says how many have none.

    Raises `OptionError` for a name that no pair has a label for, for a sequence of another length, and for the label
    "all pairs", and `DataError` if the pairs of an item are not all in the same group.
    """
    labels = [None if is_missing(label) or str(label) == "" else str(label) for label in _labels(pairs, by)]
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(row)
    if not groups:
        raise (
            _unknown(pairs, by)
            if isinstance(by, str)
            else OptionError(f"by: no pair has a label by {by!r:.80}. Give at least one pair a text.")
        )
    if ALL in groups:
        raise OptionError(f"by: expected other labels than {ALL!r}, which is the row of all pairs. Rename this label.")
    for rows in pairs.items:
        if len({labels[row] for row in rows}) > 1:
            listed = ", ".join(dict.fromkeys(sorted(str(labels[row]) for row in rows)))
            raise DataError(
                f"by: the pairs of item {pairs[rows[0]].item!r} have different labels ({listed}), but an item is "
                "judged as a whole. Give all its pairs the same label."
            )
    if n_without := labels.count(None):
        message = f"by: {n_without:,} of {len(pairs):,} pairs have no label and are in no group."
        warnings.warn(message, RMTensionWarning, stacklevel=3)
    return groups


def default_groups(pairs: PreferencePairs) -> dict[str, list[int]]:
    """The groups if none are asked for: objectives if there are several, else subsets if there are several, else none.

    Items whose pairs have several labels are not divided.
    """
    for by, labels in (("objective", pairs.objectives), ("subset", pairs.subsets)):
        if len(labels) > 1:
            try:
                return group_rows(pairs, by)
            except DataError:
                continue
    return {}


def named_groups(pairs: PreferencePairs, by: GroupBy | None) -> dict[str, list[int]]:
    """The groups by `by`, or the default groups; an empty dict if the pairs are one group."""
    return default_groups(pairs) if by is None else group_rows(pairs, by)


def _labels(pairs: PreferencePairs, by: GroupBy) -> list[Any]:
    if isinstance(by, str):
        if by in ("objective", "subset"):
            return [getattr(pair, by) for pair in pairs]
        return [pair.labels.get(by) for pair in pairs]
    if callable(by):
        return [by(pair) for pair in pairs]
    labels = list(by)
    if len(labels) != len(pairs):
        raise OptionError(
            f"by: expected one label per pair ({len(pairs)}), got {len(labels)} labels. Use None for no label."
        )
    return labels


def _unknown(pairs: PreferencePairs, by: str) -> OptionError:
    known = [name for name in ("objective", "subset") if any(getattr(pair, name) for pair in pairs)]
    known += sorted({name for pair in pairs for name in pair.labels})
    listed = ", ".join(map(repr, known))
    has = f"Labels of these pairs: {listed}." if known else "No pair has any label: name a column of short texts."
    return OptionError(f"by: no pair has a label {by!r:.80}.{nearest(by, known)} {has}")
