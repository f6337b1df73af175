"""Neuron dashboards as one JSON file; reading checks every field."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rmtension.errors import StorageError
from rmtension.store._records import read_numbers, read_objects, read_table

_KIND, _FORMAT = "NeuronDashboards", 1
_INDEX = ("layer", "neuron")
_ENDS = ("score", "score_stderr", "effect", "effect_low", "effect_high", "n")
# Frame -> columns that it must have.
_FRAMES = {
    "table": ("set", *_INDEX),
    "scatter": _INDEX,
    "distribution": (*_INDEX, "group", "side", "low", "high", "texts"),
    "correlated": (*_INDEX, *(f"other_{name}" for name in _INDEX), "correlation"),
    "tokens": (*_INDEX, "kind", "token", "weight"),
    "descriptions": (*_INDEX, "description", "reason"),
}
# Frame -> columns of numbers besides those of the groups.
_NUMBERS = {
    "correlated": ("other_layer", "other_neuron", "correlation"),
    "tokens": ("weight",),
    "descriptions": ("auroc", "low", "high", "shuffled", "shuffled_low", "shuffled_high", "n_active", "n_inactive"),
    "distribution": ("low", "high", "texts"),
}
_ABOUT = {
    "model": str,
    "architecture": str,
    "site": str,
    "positions": str,
    "method": str,
    "sign": int,
    "level": float,
    "seed": int,
    "n_tokens": int,
    "no_weights": str,
    "no_tokens": str,
}
_TEXT = dict.fromkeys(("tokens", "activations", "special"), list) | dict.fromkeys(
    ("first", "peak", "response_start", "n_tokens"), int
)
_EXAMPLE = {"layer": int, "neuron": int, "group": str, "pair": str, "chosen": dict, "rejected": dict}


def dashboards_to_json(
    frames: Mapping[str, pd.DataFrame], examples: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """The text of the file; NaN is written as null."""
    tables = {
        name: {
            "columns": list(frame.columns),
            "data": frame.astype(object).where(frame.notna(), None).to_numpy().tolist(),
        }
        for name, frame in frames.items()
    }
    return json.dumps({"kind": _KIND, "format": _FORMAT, **tables, "examples": list(examples), "about": dict(about)})


def read_dashboards(path: Path) -> tuple[dict[str, pd.DataFrame], list[dict[str, Any]], dict[str, Any]]:
    """The frames, the examples and `about`; raises `StorageError` for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot read neuron dashboards from this file ({error}). Check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise StorageError(f"{path}: expected a file that NeuronDashboards.save wrote, got another kind of file.")
    if content.get("format") != _FORMAT:
        raise StorageError(
            f"{path}: expected format {_FORMAT}, got {content.get('format')!r:.80}. Install the version of rmtension "
            "that wrote the file, or save the dashboards again."
        )
    frames = {name: read_table(path, content.get(name), columns) for name, columns in _FRAMES.items()}
    about = _fields(path, content.get("about"), {**_ABOUT, "n_neurons": int, "pairs": dict, "digests": dict})
    if about["sign"] not in (1, -1):
        raise _damaged(path, f"sign should be 1 or -1, got {about['sign']!r:.80}")
    groups = list(about["pairs"])
    read_numbers(path, int, about["pairs"], groups)
    if list(about["digests"]) != groups or not all(isinstance(digest, str) for digest in about["digests"].values()):
        raise _damaged(path, "expected one digest per group")
    numbers = [f"{name}_{end}" for name in groups for end in _ENDS]
    for frame, columns in (("table", ["direct_weight", *numbers]), ("scatter", [f"{name}_score" for name in groups])):
        if not {*columns, *_FRAMES[frame]} <= set(frames[frame].columns):
            raise _damaged(path, f"expected the columns {columns} in {frame}")
        frames[frame][columns] = _as_numbers(path, frames[frame][columns])
    for name, of_numbers in _NUMBERS.items():
        if not {*of_numbers, *_FRAMES[name]} <= set(frames[name].columns):
            raise _damaged(path, f"expected the columns {list(of_numbers)} in {name}")
        frames[name][[*of_numbers]] = _as_numbers(path, frames[name][[*of_numbers]])
    for frame, column in (("tokens", "token"), ("descriptions", "description"), ("descriptions", "reason")):
        if not all(isinstance(text, str) for text in frames[frame][column]):
            raise _damaged(path, f"expected texts as {column} in {frame}")
    for name in _FRAMES:
        frames[name][[*_INDEX]] = _as_numbers(path, frames[name][[*_INDEX]])
    examples = [_example(path, fields) for fields in read_objects(path, content.get("examples"))]
    return frames, examples, about


def _as_numbers(path: Path, columns: pd.DataFrame) -> pd.DataFrame:
    try:
        numbers: pd.DataFrame = columns.apply(pd.to_numeric)
    except (ValueError, TypeError, OverflowError) as error:
        raise _damaged(path, f"expected numbers in a table: {error}") from error
    return numbers


def _example(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    example = _fields(path, values, _EXAMPLE)
    for side in ("chosen", "rejected"):
        text = _fields(path, example[side], _TEXT)
        tokens, activations = text["tokens"], text["activations"]
        if len(tokens) != len(activations) or not all(isinstance(token, str) for token in tokens):
            raise _damaged(path, "expected one activation per token, and strings for tokens")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in activations):
            raise _damaged(path, "expected numbers for activations")
        if not all(math.isfinite(value) for value in activations):
            raise _damaged(path, "expected finite activations")
        if not 0 <= text["peak"] < len(tokens) or not set(text["special"]) <= set(range(len(tokens))):
            raise _damaged(path, "expected the most active token and special tokens among the tokens")
        example[side] = text | {
            "special": tuple(text["special"]),
            "tokens": tuple(tokens),
            "activations": tuple(map(float, activations)),
        }
    return example


def _fields(path: Path, values: Any, types: Mapping[str, type]) -> dict[str, Any]:
    """Check that an object has exactly these fields, and return it."""
    if not isinstance(values, dict) or set(values) != set(types):
        raise _damaged(path, f"expected an object with {sorted(types)}, got {values!r:.80}")
    for name, kind in types.items():
        if not isinstance(values[name], (int, float) if kind is float else kind) or isinstance(values[name], bool):
            raise _damaged(path, f"{name} should be {kind.__name__}, got {values[name]!r:.80}")
    return dict(values)


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(f"{path}: damaged: {what}. Save the neuron dashboards again.")
