"""One row of a study's table, as its mean over seeds."""

from dataclasses import replace
from typing import Any

import pandas as pd
from scipy import stats

from rmtension.errors import OptionError
from rmtension.plots._rows import Rows, count
from rmtension.study._result import StudyResult


def mean_row(
    result: StudyResult,
    family: str,
    table: str,
    where: dict[str, Any],
    columns: tuple[str, str, str],
    extra: tuple[str, ...],
    *,
    level: float | None = None,
) -> Any:
    """The mean over seeds of the row that `where` selects; None if the study has no such row.

    Seeds without a control are left out if others have one, so that all numbers of the row are of the same seeds. The
    interval is at the study's level, or at `level` (`at_level`).
    """
    if table not in result.tables:
        return None
    try:
        rows = Rows.of(result, table, (*where, *columns, *extra), family=family).where(**where)
    except OptionError:
        return None
    rows = replace(rows, frame=with_control(rows.frame))
    if level is not None:
        n_draws = result.summary["options"]["n_draws"] if table == "ablation" else float("inf")
        rows = at_level(rows, *columns, level=level, n_draws=n_draws)
    return rows.means(list(where), *columns, extra=extra).iloc[0]


def with_control(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose random sets could be drawn; all of them if that is true of none, or if they have no such sets."""
    if "random_effect" not in rows or rows["random_effect"].isna().all():
        return rows
    return rows[rows["random_effect"].notna()]


def n_of(row: Any) -> str:
    """The number of items of a row of `mean_row`, or its range over seeds, as text."""
    return "-" if row.get("n") is None else count(*row["n"])


def at_level(rows: Rows, value: str, low: str, high: str, *, level: float, n_draws: int | float) -> Rows:
    """The rows with intervals at another level, whose half widths grow as the quantiles of Student's distribution.

    An interval beyond random sets has at least as many degrees of freedom as it has random sets, less one. With that
    number, at a higher level, it is at least as wide as one that is computed at that level. `n_draws` is the number of
    random sets if the table does not have it; an infinite number stands for the normal distribution.
    """
    frame = rows.frame
    degrees = frame.get("n_draws", n_draws) - 1
    factor = stats.t.ppf((1 + level) / 2, degrees) / stats.t.ppf((1 + rows.level) / 2, degrees)
    ends = {end: frame[value] + factor * (frame[end] - frame[value]) for end in (low, high)}
    return replace(rows, frame=frame.assign(**ends), level=level)
