"""Rows of data files and hub data sets, each with its location, and their fields: errors name file, row and field."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rmtension.data._data_files import file_rows, located, parse_json
from rmtension.errors import DataError

_PACKED = ("", ".gz", ".zst")
_JSON = tuple(kind + packed for kind in (".json", ".jsonl") for packed in _PACKED)
_OTHERS = tuple(kind + packed for kind in (".csv", ".tsv", ".parquet") for packed in _PACKED)
# Names of splits that a file name may begin with; any other file belongs to every split.
_SPLITS = ("filtered", "raw", "test", "train", "validation")
_TYPES = {str: "text", list: "a list", Mapping: "an object", int | str: "a number or text"}


def source_rows(
    source: str | Path, *, split: str | None = None, data_dir: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a local file or folder, or else of the hub data set of that name; JSON lines as bytes.

    A file may have any format that `file_rows` reads. A folder is read with its sub-folders: all JSON files, except
    those whose names begin with another split; `datasets` reads a folder without JSON files. Only a name that is not a
    local path, and does not look like one, is looked up on the hub. Raises `DataError` if nothing can be read.
    """
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or path.name.endswith(_JSON + _OTHERS) or str(source).startswith((".", "~"))
    if path.is_dir():
        yield from _folder_rows(path, split)
    elif path.is_file():
        yield from _file_rows(path)
    elif isinstance(source, Path) or looks_local:
        raise DataError(
            f"source: expected a file, a folder or the name of a hub data set, got {path}, which does not exist. "
            "Correct the path."
        )
    else:
        rows = hub_rows(source, data_dir=data_dir, split=split, revision=revision)
        yield from located(rows, " ".join(filter(None, (source, data_dir, split))))


def hub_rows(name: str, **options: str | None) -> Iterable[Mapping[str, Any]]:
    """The rows of `datasets.load_dataset(name, **options)`; raises `DataError` if it fails."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"data set {name!r}: needs the package 'datasets'. Install it with `pip install datasets`."
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(name, **options)
    except Exception as error:  # datasets raises a dozen unrelated types for a missing data set
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise DataError(f"data set {name!r}: could not load it ({given}): {error}") from error
    return rows


def read_object(row: Any, where: str) -> Mapping[str, Any]:
    """A row, or a part of a row, that must be an object; a line of JSON is parsed first."""
    if isinstance(row, DataError):
        raise row
    value = parse_json(row, where) if isinstance(row, bytes) else row
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_field(row: Mapping[str, Any], field: str, kind: Any, where: str) -> Any:
    """The value of a field, which must be present and of type `kind`: `str`, `list`, `Mapping` or `int | str`."""
    if field not in row:
        raise DataError(
            f"{where}: field {field!r} is missing; fields present: {sorted(map(str, row))}. Check that the file is of "
            'the expected format, or load with on_invalid="skip".'
        )
    if not isinstance(row[field], kind):
        raise DataError(
            f"{where}: field {field!r} should be {_TYPES[kind]}, got {type(row[field]).__name__}. Correct the row, or "
            'load with on_invalid="skip".'
        )
    return row[field]


def read_texts(row: Mapping[str, Any], field: str, where: str, n: int | None = None) -> list[str]:
    """A field's list of texts, none of them empty: exactly `n` texts if `n` is given, otherwise at least one."""
    texts: list[str] = read_field(row, field, list, where)
    if (len(texts) != n) if n else not texts:
        raise DataError(
            f"{where}: field {field!r} should have {n or 'at least one'} responses, got {len(texts)}. Correct the row, "
            'or load with on_invalid="skip".'
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            got = "an empty text" if isinstance(text, str) else type(text).__name__
            raise DataError(
                f"{where}: field {field!r} should have text at index {index}, got {got}. Correct the row, or load "
                'with on_invalid="skip".'
            )
    return texts


def _folder_rows(folder: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    inside = [path for path in sorted(folder.rglob("*")) if path.name.endswith(_JSON) and path.is_file()]
    # Hidden folders hold caches and version control.
    files = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        if not any(folder.rglob("*.parquet")):
            raise DataError(
                f"{folder}: expected files ending in {', '.join((*_JSON, '.parquet'))}, got a folder without such "
                "files. Name the folder that holds them."
            )
        return located(hub_rows(str(folder), split=split), f"{folder} {split}")
    kept = [path for path in files if split is None or not _is_of_another_split(path, split)]
    if not kept:
        names = sorted({path.name for path in files})
        raise DataError(f"{folder}: expected a file of the split {split!r}, got {names}. Pass one of their splits.")
    by_content: dict[Path, list[str]] = {}
    for path in kept:
        by_content.setdefault(path.with_name(_unpacked(path.name)), []).append(path.name)
    for path, names in by_content.items():
        if len(names) > 1:
            raise DataError(
                f"{path.parent}: {' and '.join(names)} are one file, compressed and not. Its rows would count twice: "
                "remove one of them, or pass the path of the file."
            )
    return chain.from_iterable(map(_file_rows, kept))


def _is_of_another_split(path: Path, split: str) -> bool:
    return not path.name.startswith(split) and path.name.startswith(_SPLITS)


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = file_rows(path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: expected a JSON array or JSON lines, got an empty file. Fetch the file again.")
    return chain([first], rows)


def _unpacked(name: str) -> str:
    """The name of a file without the ending of its compression."""
    for packed in filter(None, _PACKED):
        name = name.removesuffix(packed)
    return name
