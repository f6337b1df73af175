"""The rows that a figure shows: one family, averaged over its seeds, with the level of the intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from rmtension.errors import OptionError
from rmtension.evaluation._intervals import check_level, pooled_over_seeds
from rmtension.plots._drawing import as_text
from rmtension.study._result import StudyResult, range_of

Source = pd.DataFrame | StudyResult
_LEVEL = 0.95
INTERVAL = ("value", "low", "high")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one table and one family. `name` is the family's name for titles, if the table has several families.

    `plain` rows are averaged without the spread between seeds.
    """

    frame: pd.DataFrame
    level: float
    name: str = ""
    plain: bool = False

    @classmethod
    def of(
        cls,
        source: Source,
        table: str,
        columns: Sequence[str],
        *,
        family: str | None = None,
        level: float | None = None,
    ) -> "Rows":
        """The rows of `family` in a study's table or a similar frame; raises `OptionError` if `columns` are missing."""
        if isinstance(source, StudyResult):
            frame, known = source.to_frame(table), source.summary["options"]["level"]
        elif isinstance(source, pd.DataFrame):
            frame, known = source.copy(), None
        else:
            raise OptionError(f"table: expected a StudyResult or its table {table!r}, got {type(source).__name__}.")
        absent = [column for column in columns if column not in frame]
        if absent:
            raise OptionError(
                f"table: expected columns like those of StudyResult.{table}; {absent} are not among "
                f"{[str(column) for column in frame]}."
            )
        if frame.empty:
            raise OptionError(f"table: expected rows like those of StudyResult.{table}, got none.")
        if known is None and "level" in frame:
            known = float(frame["level"].iloc[0])
        if level is not None and known is not None and level != known:
            raise OptionError(f"level: the intervals of this table are at {known:g}, got {level:g}. Leave out level.")
        level = known or level or _LEVEL
        check_level(level)
        # A frame made outside a study is taken as one family with one seed.
        frame = frame.assign(**{column: 0 for column in ("family", "seed") if column not in frame})
        if "subset" in frame:
            # Pandas reads the name "None" from a CSV as a missing value.
            frame["subset"] = frame["subset"].fillna("None")
        names = list(dict.fromkeys(frame["family"]))
        if len(names) > 1 and family is None:
            raise OptionError(f"family: this table has several families. Select one with family=..., out of {names}.")
        rows = cls(frame, level).where(family=family)
        return replace(rows, name=str(rows.frame["family"].iloc[0])) if len(names) > 1 else rows

    def where(self, **chosen: object) -> "Rows":
        """The rows with these values in these columns; None selects all rows."""
        frame = self.frame
        for column, value in chosen.items():
            if value is None:
                continue
            # Compared as text, because a CSV file turns a family called "7" into a number.
            selected = frame[frame[column].astype(str) == str(value)]
            if selected.empty:
                raise OptionError(f"{column}: expected one of {self.names(column)}, got {value!r}.")
            frame = selected
        return replace(self, frame=frame)

    def names(self, column: str) -> list[str]:
        """The values of a column in order of appearance."""
        return [str(value) for value in dict.fromkeys(self.frame[column])]

    @property
    def n_seeds(self) -> int:
        """The number of seeds of the family in these rows."""
        return int(self.frame["seed"].nunique())

    def means(
        self, keys: Sequence[str], value: str = "value", low: str = "low", high: str = "high", extra: Sequence[str] = ()
    ) -> pd.DataFrame:
        """One row per value of `keys`: the mean over seeds as `value`, `low`, `high`, by `StudyResult.over_seeds`.

        `each` is a tuple of the seeds' values, `n` the smallest and largest number of items if the table has them, and
        the columns of `extra` are averaged. Rows of the same seed (draws) are averaged first. The ends of the interval
        of `plain` rows are the means of the seeds' ends.
        """
        columns = list(dict.fromkeys([value, low, high, *extra]))
        # A seed has several rows only for draws.
        whole = self.frame.groupby([*keys, "seed"], sort=False, dropna=False)[columns].mean().reset_index()
        groups = (frame.groupby(list(keys), sort=False, dropna=False) for frame in (self.frame, whole))
        rows = []
        for (names, part), (_, per_seed) in zip(*groups, strict=True):
            mean = per_seed[columns].mean()
            row = dict(zip(keys, names, strict=True)) | {column: float(mean[column]) for column in extra}
            if self.plain:
                row |= {"value": float(mean[value]), "low": float(mean[low]), "high": float(mean[high])}
            else:
                centres, lows, highs = (per_seed[column].tolist() for column in (value, low, high))
                pooled = pooled_over_seeds(centres, lows, highs, self.level, range_of(value, {**part.iloc[0]}))
                row |= {"value": pooled.value, "low": pooled.low, "high": pooled.high}
            n = (int(part["n"].min()), int(part["n"].max())) if "n" in part else None
            rows.append(row | {"each": tuple(per_seed[value]), "n": n, "n_seeds": len(per_seed)})
        return pd.DataFrame(rows)

    def title(
        self,
        what: str,
        *how: str,
        seeds: str = "mean of {} seeds, single seeds faint",
        intervals: str = "{} intervals",
    ) -> str:
        """A title of two lines: what is shown; how seeds are drawn, the level of the intervals, and notes in `how`."""
        parts = [
            seeds.format(self.n_seeds) if self.n_seeds > 1 else "",
            intervals.format(f"{100 * self.level:g}%"),
            *how,
        ]
        second = "; ".join(part for part in parts if part)
        first = f"{as_text(self.name)}: {what}" if self.name else what
        return f"{first}\n{second[:1].upper()}{second[1:]}" if second else first


def count(lowest: int, highest: int) -> str:
    """A number of items or neurons, or its range over seeds, as text."""
    return str(lowest) if lowest == highest else f"{lowest}-{highest}"


def sized(name: str, n: tuple[int, int] | None) -> str:
    """A name with its number of items, if that is known."""
    return name if n is None else f"{name} (n = {count(*n)})"
