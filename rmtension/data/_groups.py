"""Groups of pairs: by objective, by subset, or by labels of the user's own."""

from collections.abc import Callable, Sequence
from typing import Any

from rmtension._arguments import nearest
from rmtension.data._pair import PreferencePair
from rmtension.data._pairs import PreferencePairs
from rmtension.errors import DataError, OptionError

# The name of the group of all pairs in tables.
ALL = "all pairs"

GroupBy = str | Sequence[Any] | Callable[[PreferencePair], Any]


def group_rows(pairs: PreferencePairs, by: GroupBy) -> dict[str, list[int]]:
    """The indices of every group's pairs, by name, in order of first appearance; pairs without a label are left out.

    `by` is "objective", "subset" or another label that the pairs were read with (`PreferencePair.labels`); a sequence
    with one label per pair; or a function from a pair to its label. Labels become text; None and "" are no label.

    Raises `OptionError` for a name that no pair has a label for and for a sequence of another length, and `DataError`
    if every pair of an item is not in the same group.
    """
    labels = _labels(pairs, by)
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(row)
    for rows in pairs.items:
        if len({labels[row] for row in rows}) > 1:
            pair = pairs[rows[0]]
            listed = ", ".join(dict.fromkeys(sorted(str(labels[row]) for row in rows)))
            raise DataError(
                f"by: the pairs of item {pair.item!r} have different labels ({listed}), but an item is "
                "judged as a whole. Give all its pairs the same label."
            )
    if not groups:
        raise OptionError(f"by: no pair has a label by {by!r}.")
    return groups


def _labels(pairs: PreferencePairs, by: GroupBy) -> list[str | None]:
    if isinstance(by, str):
        return _named(pairs, by)
    if callable(by):
        values = [by(pair) for pair in pairs]
    else:
        values = list(by)
        if len(values) != len(pairs):
            raise OptionError(f"by: expected one label per pair ({len(pairs)}), got {len(values)} labels.")
    return [None if value is None or str(value) == "" else str(value) for value in values]


def _named(pairs: PreferencePairs, by: str) -> list[str | None]:
    if by in ("objective", "subset"):
        values: list[str | None] = [getattr(pair, by) for pair in pairs]
    else:
        values = [pair.labels.get(by) for pair in pairs]
    if not any(values):
        known = [name for name in ("objective", "subset") if any(getattr(pair, name) for pair in pairs)]
        known += sorted({name for pair in pairs for name in pair.labels})
        listed = ", ".join(map(repr, known))
        has = f"Labels of these pairs: {listed}." if known else "No pair has any label: name a column of short texts."
        raise OptionError(f"by: no pair has a label {by!r}.{nearest(by, known)} {has}")
    return values
