"""Reads the JSON in a result's header back into tables and records, and refuses anything else."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

import pandas as pd

from rmtension.errors import StorageError

_T = TypeVar("_T")
_CELLS = (str, int, float, bool, type(None))


def read_record(path: Path, kind: type[_T], values: Any) -> _T:
    """A dataclass whose fields are numbers, texts and lists; raises `StorageError` unless `values` fits it exactly."""
    types: dict[str, Any] = {field.name: get_origin(field.type) or field.type for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) != set(types):
        raise _damaged(path, f"expected a {kind.__name__} with {sorted(types)}")
    for name, expected in types.items():
        fits = isinstance(values[name], (int, float) if expected is float else expected)
        if not fits or isinstance(values[name], bool) != (expected is bool):
            raise _damaged(path, f"{name} of a {kind.__name__} should be {expected.__name__}, got {values[name]!r}")
    return kind(**values)


def read_numbers(path: Path, kind: type[_T], values: Any, names: Iterable[str]) -> dict[str, _T]:
    """An object with one number under each of `names`, and nothing else."""
    expected: Any = (int, float) if kind is float else kind
    wanted = list(names)
    if not isinstance(values, dict) or set(values) != set(wanted):
        raise _damaged(path, f"expected an object with {wanted}, got {values!r:.80}")
    if any(not isinstance(number, expected) or isinstance(number, bool) for number in values.values()):
        raise _damaged(path, f"expected numbers under {wanted}, got {values!r:.80}")
    return values


def read_objects(path: Path, values: Any) -> list[dict[str, Any]]:
    """A list of objects."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise _damaged(path, f"expected a list of objects, got {values!r:.80}")
    return values


def written_tables(**tables: pd.DataFrame) -> dict[str, Any]:
    """The tables as JSON values, each as `read_table` reads it."""
    return {name: table.to_dict("split", index=False) for name, table in tables.items()}


def read_table(path: Path, values: Any, columns: Iterable[str]) -> pd.DataFrame:
    """A table that was written as an object of "columns" and "data", with at least `columns` or no column at all."""
    if not isinstance(values, dict) or set(values) != {"columns", "data"}:
        raise _damaged(path, f"expected a table with columns and data, got {values!r:.80}")
    names, rows = values["columns"], values["data"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise _damaged(path, f"expected names of columns, got {names!r:.80}")
    if names and not set(columns) <= set(names):
        raise _damaged(path, f"expected the columns {sorted(set(columns) - set(names))} too, got {names}")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        raise _damaged(path, f"expected rows of {len(names)} cells, got {rows!r:.80}")
    if not all(isinstance(cell, _CELLS) for row in rows for cell in row):
        raise _damaged(path, "expected numbers and texts in the cells of a table")
    return pd.DataFrame(rows, columns=names)


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(f"{path}: damaged: {what}. Compute and save the result again.")
