"""The tables of a study: data frames in memory, CSV files on disk, and means over seeds."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension._repr_html import html_table
from rmtension.distributed import current
from rmtension.errors import OptionError, StorageError
from rmtension.evaluation._intervals import pooled_over_seeds
from rmtension.store._files import filled_whole

# What an analysis returns: tables by name.
Tables = dict[str, pd.DataFrame]

_SUMMARY = "summary.json"
# What `write_report` adds to the folder of a study.
_PAGES = ("neurons.json", "report.html", "report.md")
# Columns with names that pairs or users give, which may look like numbers.
_NAMES = {"family": str, "subset": str, "id": str}
_N_LISTED = 12  # columns of a table that the HTML view in notebooks lists
TABLES = (
    "accuracy", "subsets", "comparisons", "transferability", "confidence", "rewards", "neurons", "sets", "stability",
    "depth", "overlap", "curves", "cross_objective", "drift", "ablation", "equal_size", "collapse",
    "ablated_transferability",
)  # fmt: skip

# Table -> columns that identify a row besides the seed, and (value, low, high) columns that are averaged over seeds.
POOLED: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]] = {
    "accuracy": (("model", "objective", "measure"), (("value", "low", "high"),)),
    "subsets": (
        ("model", "objective", "subset"),
        (("accuracy", "low", "high"), ("margin", "margin_low", "margin_high")),
    ),
    "comparisons": (("first", "second", "objective", "subset"), (("difference", "low", "high"),)),
    "transferability": (("objective", "quantity"), (("value", "low", "high"),)),
    "confidence": (("model", "objective", "pairs", "quantity"), (("value", "low", "high"),)),
    "overlap": (
        ("score", "kind", "a", "b", "without_base"),
        (("jaccard", "jaccard_low", "jaccard_high"), ("beyond_chance", "beyond_low", "beyond_high")),
    ),
    "curves": (
        ("model", "score", "fraction", "objective"),
        (
            ("accuracy", "low", "high"),
            ("change", "change_low", "change_high"),
            ("margin_change", "margin_change_low", "margin_change_high"),
        ),
    ),
    "cross_objective": (("model", "score", "objective", "subset"), (("change", "low", "high"),)),
    "ablation": (
        ("set", "objective", "quantity", "control"),
        (("effect", "low", "high"), ("beyond_random", "beyond_low", "beyond_high")),
    ),
    "equal_size": (
        ("set", "objective", "quantity", "against"),
        (("effect", "low", "high"), ("difference", "difference_low", "difference_high")),
    ),
    "ablated_transferability": (("set", "objective", "quantity"), (("value", "low", "high"),)),
    "collapse": (("set", "quantity"), (("difference", "difference_low", "difference_high"),)),
}


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The tables of a study as data frames: `result.accuracy`, or `result.tables["accuracy"]`.

    Every table has the columns `family` and `seed` of its models. `summary` holds options, versions, provenance and
    counts. docs/paper.md describes each table.

    Examples:
        >>> options = StudyOptions(analyses=("accuracy",))
        >>> models = dict.fromkeys(("helpful", "harmless", "mixed"), head)
        >>> result = TensionStudy(models, pairs, options=options).run(progress=False)
        >>> result.accuracy.query("measure == 'accuracy'")[["model", "objective", "value", "n"]].head(2)
              model objective  value   n
        0   helpful   helpful    1.0  12
        2  harmless   helpful    1.0  12
    """

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]

    def __getattr__(self, name: str) -> pd.DataFrame:
        tables: Mapping[str, pd.DataFrame] = self.__dict__.get("tables", {})
        if name in tables:
            return tables[name]
        raise AttributeError(f"StudyResult has no table {name!r}; this study has {list(tables)}.")

    def to_frame(self, table: str = "accuracy") -> pd.DataFrame:
        """A copy of one table; raises `OptionError` for a table that this study does not have."""
        if table not in self.tables:
            raise OptionError(
                f"table: expected one of {list(self.tables)}, got {table!r}. Other tables need other `analyses`."
            )
        return self.tables[table].copy()

    def __repr__(self) -> str:
        # The summary of a hand-made result, as for figures, may lack these keys.
        families = ", ".join(
            f"{family['family']} (seed {family['seed']})" for family in self.summary.get("families", [])
        )
        sizes = [f"{counts['evaluating']:,} {name}" for name, counts in self.summary.get("pairs", {}).items()]
        return f"StudyResult({families or 'no models'}; {' and '.join(sizes) or 'no'} pairs; {len(self.tables)} tables)"

    def _repr_html_(self) -> str:
        """The names, sizes and first columns of the tables."""
        rows = []
        for name, frame in self.tables.items():
            listed = ", ".join(map(str, frame.columns[:_N_LISTED])) + (", ..." if frame.shape[1] > _N_LISTED else "")
            rows.append({"table": name, "rows": len(frame), "columns": listed})
        return html_table(repr(self), pd.DataFrame(rows))

    @property
    def n_seeds(self) -> int:
        """The largest number of seeds of any family."""
        models = pd.DataFrame(self.summary["families"])
        return int(models.groupby("family")["seed"].nunique().max())

    def over_seeds(self, table: str) -> pd.DataFrame:
        """The estimates of one table averaged over the seeds of each family.

        The half width of a mean's interval combines two parts in quadrature (`evaluation.over_seeds`): the mean half
        width of the seeds' intervals, as if the items' noise were the same in all seeds, and Student's half width for
        the spread between seeds. `n_seeds` counts the seeds; `min` and `max` are those of the first estimate.
        """
        if table not in POOLED:
            raise OptionError(f"table: expected one of {list(POOLED)}, got {table!r}.")
        names, estimates = POOLED[table]
        frame = self.to_frame(table)
        keys = ["family", *names]
        rows = []
        for values, part in frame.groupby(keys, sort=False, dropna=False):
            row: dict[str, Any] = dict(zip(keys, values, strict=True))
            for name, low, high in estimates:
                per_seed = part.groupby("seed")[[name, low, high]].mean()
                centres, lows, highs = (per_seed[column].tolist() for column in (name, low, high))
                level = self.summary["options"]["level"]
                pooled = pooled_over_seeds(centres, lows, highs, level, range_of(name, row))
                row |= {name: pooled.value, low: pooled.low, high: pooled.high}
            first = part.groupby("seed")[estimates[0][0]].mean().dropna()
            rows.append(row | {"min": float(first.min()), "max": float(first.max()), "n_seeds": len(first)})
        return pd.DataFrame(rows)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one CSV file per table, one per table of means if there are several seeds, and `summary.json`.

        Raises `StorageError` for a folder that holds a study unless `overwrite` is True. If several processes share the
        work, the first process writes.
        """
        if not current().is_first:
            return Path(folder)
        folder = require_no_study(folder, overwrite=overwrite)
        # Tables, neurons and pages left by an earlier study would look like those of this study.
        names = [f"{name}{end}.csv" for name in TABLES for end in ("", "_over_seeds")]
        written = {**self.summary, "tables": list(self.tables)}
        if _read_summary(folder) != json.loads(json.dumps(written)):
            names += _PAGES
        with filled_whole(folder, "study", seal=_SUMMARY, replaced=names) as filling:
            for table, frame in self.tables.items():
                frame.to_csv(filling / f"{table}.csv", index=False)
                if self.n_seeds > 1 and table in POOLED:
                    self.over_seeds(table).to_csv(filling / f"{table}_over_seeds.csv", index=False)
            (filling / _SUMMARY).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "StudyResult":
        """Read a folder that `save` wrote; raises `StorageError` if it holds no finished study."""
        folder = Path(folder)
        try:
            summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
            names = summary.pop("tables")
            tables = {
                name: pd.read_csv(folder / f"{name}.csv", dtype=_NAMES, keep_default_na=False, na_values=[""])
                for name in TABLES
                if name in names
            }
        except FileNotFoundError as error:
            missing = Path(error.filename).name
            raise StorageError(
                f"{folder} has no finished study ({missing} is missing). Run the study first."
            ) from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise StorageError(f"{folder} has no finished study ({error}). Run the study again.") from error
        return cls(tables=tables, summary=summary)


def _read_summary(folder: Path) -> object:
    """The summary of the study that a folder holds; None if there is none, or if it cannot be read."""
    try:
        return json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def range_of(column: str, row: Mapping[str, Any]) -> tuple[float, float]:
    """The range of a mean: [0, 1] for shares, unbounded for differences and rewards."""
    kind = row.get("measure") or row.get("quantity")
    is_share = column in ("accuracy", "jaccard") or (
        column == "value" and kind not in ("margin", "margin_in_spreads", "beyond accuracy")
    )
    return (0.0, 1.0) if is_share else (-math.inf, math.inf)


def require_no_study(folder: str | Path, *, overwrite: bool = False) -> Path:
    """`folder` as a path; raises `StorageError` if it holds a study that may not be overwritten."""
    folder = Path(folder)
    if (folder / _SUMMARY).exists() and not overwrite:
        raise StorageError(
            f"{folder}: already holds a study. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    return folder
