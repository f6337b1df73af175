"""Rows of a data file, whose format is read from its content: JSON lines, a JSON array, CSV, TSV or Parquet."""

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from rmtension.errors import DataError
from rmtension.store._compression import LONGEST_LINE, read_lines

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_OTHERS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "a zip archive or an Excel sheet",
    b"\xd0\xcf\x11\xe0": "an Excel sheet",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
}
_READ = "JSON lines, a JSON array, CSV, TSV or Parquet (plain, .gz or .zst)"
_DELIMITERS = (",", "\t", ";")


def file_rows(path: Path, *, columns: Collection[str] = ("chosen", "rejected")) -> Iterator[tuple[str, Any]]:
    """Yield every row of a file as (where, row): a mapping, a line of JSON, or a `DataError` for an invalid row.

    The file may be plain, gzip'd or zstd'd. Its format is determined from its content; `columns` are the columns that
    every row has. An invalid row, such as a line of CSV with too many fields, is yielded as a `DataError` and not
    raised, so that the reader may skip it. Raises `DataError` naming the file if the rest cannot be read.
    """
    lines = read_lines(path)
    unmarked = ((number, line.removeprefix(_BYTE_ORDER_MARK)) for number, line in lines)
    start = next(((number, line) for number, line in unmarked if line.strip()), None)
    if start is None:
        return
    first = start[1]
    begun = [start, *islice(lines, 1)]
    lines = chain(begun, lines)
    if first.startswith(_PARQUET):
        yield from located(_parquet_rows(path, lines), path)
        return
    for magic, name in _OTHERS.items():
        if first.startswith(magic):
            raise DataError(f"{path}: expected {_READ}, got {name}. Unpack or convert the file first.")
    begins = first.lstrip()[:1]
    if begins == b"[":
        yield from located(_array(path, lines), path)
    elif begins != b"{" and (delimiter := _delimiter(path, [line for _, line in begun], columns)):
        yield from _table_rows(path, lines, delimiter)
    else:
        yield from _json_rows(path, lines, columns)


def parse_json(text: bytes, where: str, expected: str = "Each line must be one JSON object.") -> Any:
    """Parse JSON in UTF-8; raises `DataError` naming `where`."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error
    # Not only JSONDecodeError: a number may be too long for Python, brackets nested too deeply.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}). {expected}") from error


def without_padding(value: Any) -> Any:
    """Undo Arrow's padding: Arrow gives every struct of a column the keys of all others, with the value None.

    A message's `content` stays even if it is None.
    """
    if isinstance(value, list | tuple | np.ndarray):
        return [without_padding(item) for item in value]
    if isinstance(value, Mapping):
        return {name: without_padding(item) for name, item in value.items() if item is not None or name == "content"}
    return value


# -- formats -----------------------------------------------------------------------------------------------------------


def located(rows: Iterable[Any], source: object) -> Iterator[tuple[str, Any]]:
    """Rows with their numbers, counted from 1 as lines are."""
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _array(path: Path, lines: Iterable[tuple[int, bytes]]) -> list[Any]:
    rows = parse_json(
        b"".join(line for _, line in lines), str(path), "Expected one JSON array of objects. Fetch the file again."
    )
    assert isinstance(rows, list)
    return rows


def _is_row(value: Any, columns: Collection[str]) -> bool:
    """Whether a JSON value is one row, rather than a table stored by columns or an object with the rows under a key."""
    if not isinstance(value, dict) or not set(columns) <= set(value):
        return False
    return not any(isinstance(value[name], list) and str in map(type, value[name]) for name in columns)


def _json_rows(path: Path, lines: Iterator[tuple[int, bytes]], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines, or the single object of a file that is not JSON lines."""
    number, first = next(lines)
    try:
        parse_json(first, str(path))
    except DataError:
        rest = list(lines)
        try:
            whole = parse_json(first + b"".join(line for _, line in rest), str(path))
        except DataError:
            lines = iter(rest)
        else:
            if not _is_row(whole, columns):
                raise DataError(
                    f"{path}: expected one JSON object per row, got a single one with the keys "
                    f"{sorted(map(str, whole))[:10]}. Write an array of objects, or one object per line."
                )
            yield f"{path}, line {number}", whole
            return
    for at, line in chain([(number, first)], lines):
        if line.strip():
            yield f"{path}, line {at}", line


def _parquet_rows(path: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet needs the package 'pyarrow'. Install it with `pip install pyarrow`."
        ) from error
    with path.open("rb") as raw:
        is_plain = raw.read(4) == _PARQUET
    source = path if is_plain else io.BytesIO(b"".join(line for _, line in lines))
    try:
        file = parquet.ParquetFile(source)
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                # Structs stored as JSON text have no padding: their nulls belong to the data.
                has_json = "arrow.json" in str(file.schema_arrow)
                yield _parsed(row, file.schema_arrow) if has_json else _unpadded(row)
    # ValueError: bytes that are not UTF-8, and text that is not JSON.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: the Parquet data is damaged or cut short ({' '.join(str(error).split())[:200]}). Fetch the file "
            "again."
        ) from error


def _unpadded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: without_padding(value) for name, value in row.items()}


def _parsed(value: Any, kind: Any) -> Any:
    """A value of Arrow whose JSON texts (which `datasets` stores as `Json`) are parsed."""
    from pyarrow import types

    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _parsed(item, kind.field(name).type) for name, item in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_parsed(item, kind.value_type) for item in value]
    return json.loads(value) if "arrow.json" in str(kind) else value


# -- tables ------------------------------------------------------------------------------------------------------------


def _delimiter(path: Path, begun: Sequence[bytes], columns: Collection[str]) -> str | None:
    """The delimiter of a table, determined from the first two lines of the file; None if it is not a table."""
    line = _decoded(begun[0], f"{path}, line 1")
    headers = {delimiter: _header(line, delimiter) for delimiter in _DELIMITERS}
    best = max(_DELIMITERS, key=lambda delimiter: (set(columns) <= set(headers[delimiter]), len(headers[delimiter])))
    if set(columns) <= set(headers[best]) or any(suffix in (".csv", ".tsv") for suffix in path.suffixes):
        return best
    # In JSON lines with a damaged first line, the second line is an object.
    has_rows = len(begun) > 1 and not begun[1].startswith(b"{")
    return best if has_rows and len(headers[best]) > 1 else None


def _table_rows(path: Path, lines: Iterable[tuple[int, bytes]], delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows of CSV with any delimiter, as dicts from column to text."""
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for at, line in lines:
            yield _decoded(line, f"{path}, line {at}")

    rows = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = at + 1
        try:
            row = _with_long_fields(rows)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: not valid CSV ({error}). Enclose a field that contains quotes in quotes, and "
                "double each quote inside it."
            ) from error
        where = f"{path}, line {start}"
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path}: expected unique column names, got {repeated} more than once. Rename them.")
        elif len(row) != len(header):
            yield (
                where,
                DataError(
                    f"{where}: expected {len(header)} fields as in the first line, got {len(row)}. Enclose a field "
                    f"that contains {delimiter!r}, quotes or line breaks in quotes."
                ),
            )
        elif delimiter == "\t" and any(_holds_row(cell, len(header)) for cell in row):
            yield (
                where,
                DataError(
                    f"{where}: a quoted field contains another whole line of {len(header)} fields, probably because a "
                    "quote in the text was not escaped. Enclose fields that contain quotes in quotes and double each "
                    "quote inside, or write JSON lines."
                ),
            )
        else:
            yield where, dict(zip(header, row, strict=True))


def _holds_row(cell: str, n_fields: int) -> bool:
    """Whether a later line inside a TSV field is itself a row: TSV is often written without quoting."""
    return any(not line.startswith("\t") and line.count("\t") >= n_fields - 1 for line in cell.split("\n")[1:])


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return _with_long_fields(csv.reader([line], delimiter=delimiter)) or []
    except csv.Error:
        return []


def _with_long_fields(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, without csv's limit on the length of fields; that limit is global, so it is set back afterwards."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(before)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from error


def _not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    return DataError(
        f"{where}: not valid UTF-8 at byte {error.start} of the line ({error.reason}). Re-encode the file as UTF-8."
    )
