"""Studies described by a YAML file: models, pairs, options and the output folder. Errors name the key."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rmtension._arguments import nearest
from rmtension.data._pairs import PreferencePairs
from rmtension.data._row_reader import FIELDS
from rmtension.errors import DataError, ModelError, OptionError, RMTensionError
from rmtension.study._family_runs import MODELS, OBJECTIVES, ModelFamily
from rmtension.study._model_output import ModelOutput
from rmtension.study._options import StudyOptions
from rmtension.study._tension_study import TensionStudy

_KEYS = ("models", "pairs", "scoring_pairs", "columns", "chat", "on_invalid", "rules", "analyses", "options", "out")
_FAMILY_KEYS = (*MODELS, "base", "name", "seed")
_OUTPUT_KEYS = ("model", "output")
_OPTION_KEYS = tuple(field.name for field in fields(StudyOptions) if field.name != "analyses")


@dataclass(frozen=True)
class StudyConfig:
    """Everything that a study needs, and the folder for its result; `make_config` returns it."""

    families: tuple[ModelFamily, ...]
    pairs: Mapping[str, PreferencePairs]
    scoring_pairs: Mapping[str, PreferencePairs] | None
    options: StudyOptions
    out: Path

    def study(self) -> TensionStudy:
        """The study, ready to run."""
        return TensionStudy(self.families, self.pairs, scoring_pairs=self.scoring_pairs, options=self.options)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, for `make_config`; raises `DataError` for an unreadable or invalid file."""
    content = load_yaml(path)
    return dict(checked_mapping(content, str(path), _KEYS))


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; raises `DataError` for an unreadable or invalid file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Check the path.") from error
    # Besides YAMLError: invalid dates, bytes that are not UTF-8, brackets nested too deeply.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error


def make_config(values: Mapping[str, Any], *, folder: Path, where: str) -> StudyConfig:
    """The study that `values` describe; `where` names them in errors, and paths are relative to `folder`.

    - `models`: a mapping of `helpful`, `harmless`, `mixed` and optionally `base` to folders of checkpoints or hub
      names; or a list of such mappings that differ in `name` or `seed`. A mapping of `model` and `output` in the place
      of a folder is one output of the model (`ModelOutput`).
    - `pairs`: a file or a list of files under `helpful` and `harmless`, in any format of `PreferencePairs.read`; or
      files whose rows have the field `objective`.
    - `scoring_pairs`: the same, to score neurons on other pairs than one half of `pairs`.
    - `columns` and `chat`: arguments of `PreferencePairs.read`, for all files.
    - `on_invalid` ("raise" or "skip"), `rules`, `analyses`, `options` (fields of `StudyOptions`), `out` (default:
      `study`).

    Reads the pairs; opens no model. Raises `OptionError`, `DataError` or `ModelError`.
    """
    checked_mapping(values, where, _KEYS, required=("models", "pairs"))
    options = read_options(values, where)
    families = _families(values["models"], f"{where}: models", folder)
    out = folder / _text(values.get("out", "study"), f"{where}: out")
    reading = {
        "columns": _columns(values.get("columns"), f"{where}: columns"),
        "chat": _yes_or_no(values.get("chat", False), f"{where}: chat"),
        "on_invalid": _text(values.get("on_invalid", "raise"), f"{where}: on_invalid"),
    }
    # Check that all files exist before reading the first, which may take a while.
    readers = {
        key: _pairs(values[key], f"{where}: {key}", folder, reading)
        for key in ("pairs", "scoring_pairs")
        if values.get(key) is not None
    }
    pairs = {key: read() for key, read in readers.items()}
    return StudyConfig(families, pairs["pairs"], pairs.get("scoring_pairs"), options, out)


# -- parts -------------------------------------------------------------------------------------------------------------


def read_options(values: Mapping[str, Any], where: str) -> StudyOptions:
    """The options given by `rules`, `analyses` and `options`; raises `OptionError` that names `where`."""
    changes = dict(checked_mapping(values.get("options") or {}, f"{where}: options", _OPTION_KEYS))
    if "analyses" in values:
        changes["analyses"] = values["analyses"]
    # YAML has lists where options are tuples.
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    try:
        return StudyOptions.of(_text(values.get("rules", "corrected"), f"{where}: rules"), **changes)
    except OptionError as error:
        raise _located(error, where) from error


def _families(value: Any, key: str, folder: Path) -> tuple[ModelFamily, ...]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise OptionError(
            f"{key}: expected a mapping of {list(MODELS)} to models, or a list of such mappings, got an empty list."
        )
    keys = [f"{key}[{index}]" for index in range(len(listed))] if isinstance(value, list) else [key]
    return tuple(_family(models, name, folder) for models, name in zip(listed, keys, strict=True))


def _family(value: Any, key: str, folder: Path) -> ModelFamily:
    given = checked_mapping(value, key, _FAMILY_KEYS, required=MODELS)
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise OptionError(f"{key}.seed: expected a whole number, got {_shown(seed)}.")
    models: dict[str, Any] = {name: _output_of_model(given[name], f"{key}.{name}", folder) for name in MODELS}
    if given.get("base") is not None:
        models["base"] = _model(given["base"], f"{key}.base", folder)
    return ModelFamily(**models, name=_text(given.get("name", "models"), f"{key}.name"), seed=seed)


def _output_of_model(value: Any, key: str, folder: Path) -> str | Path | ModelOutput:
    """A model, or with `model` and `output` one output of it."""
    if not isinstance(value, Mapping):
        return _model(value, key, folder)
    given = checked_mapping(value, key, _OUTPUT_KEYS, required=_OUTPUT_KEYS)
    output = given["output"]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list) else [output]
    kind: Any = int | float if isinstance(output, Mapping) else str | int
    if not parts or any(isinstance(part, bool) or not isinstance(part, kind) for part in parts):
        raise OptionError(
            f"{key}.output: expected the name or number of an output, a list of two for their difference, or a mapping "
            f"of outputs to weights, got {output!r:.80}."
        )
    output = tuple(output) if isinstance(output, list) else dict(output) if isinstance(output, Mapping) else output
    return ModelOutput(_model(given["model"], f"{key}.model", folder), output)


def _model(value: Any, key: str, folder: Path) -> str | Path:
    """The folder of a checkpoint, or a hub name: a name with at most one slash that is not a local path."""
    name = _text(value, key)
    path = folder / Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or path.exists():
        raise ModelError(
            f"{key}: expected the folder of a checkpoint or a hub name, got {name!r}; {path} is no folder. Check it."
        )
    return name


def _pairs(value: Any, key: str, folder: Path, reading: Mapping[str, Any]) -> Callable[[], dict[str, PreferencePairs]]:
    """A function that reads the pairs of both objectives; the files are checked here, before any is read."""
    if not isinstance(value, Mapping):
        files = _files(value, key, folder)
        return lambda: _by_objective(_read(files, key, reading), key)
    given = checked_mapping(value, key, OBJECTIVES, required=OBJECTIVES)
    named = {name: _files(given[name], f"{key}.{name}", folder) for name in OBJECTIVES}
    return lambda: {name: _read(files, f"{key}.{name}", reading, objective=name) for name, files in named.items()}


def _files(value: Any, key: str, folder: Path) -> list[Path]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise OptionError(f"{key}: expected a file or a list of files, got an empty list.")
    names = [f"{key}[{index}]" for index in range(len(listed))] if isinstance(value, list) else [key]
    paths = [folder / Path(_text(path, name)).expanduser() for path, name in zip(listed, names, strict=True)]
    for path, name in zip(paths, names, strict=True):
        if not path.is_file():
            raise DataError(f"{name}: expected a file of pairs, got {path}, which does not exist or is not a file.")
    return paths


def _read(files: Sequence[Path], key: str, reading: Mapping[str, Any], objective: str | None = None) -> PreferencePairs:
    try:
        parts = (PreferencePairs.read(path, objective=objective, **reading) for path in files)
        return sum(parts, start=PreferencePairs([]))
    except RMTensionError as error:
        raise _located(error, key) from error


def _by_objective(pairs: PreferencePairs, key: str) -> dict[str, PreferencePairs]:
    objectives = {pair.objective for pair in pairs}
    if objectives != set(OBJECTIVES):
        raise DataError(
            f"{key}: expected the field 'objective' of every pair to be one of {list(OBJECTIVES)}, and both to occur, "
            f"got {sorted(map(str, objectives))}. Or name the files of each: {key.split(': ')[-1]}: {{helpful: ..., "
            "harmless: ...}."
        )
    return {name: pairs.filter(objective=name) for name in OBJECTIVES}


# -- values ------------------------------------------------------------------------------------------------------------


def checked_mapping(value: Any, key: str, known: Sequence[str], required: Sequence[str] = ()) -> Mapping[str, Any]:
    """`value`, if it is a mapping with all `required` keys and none but `known`; errors name it by `key`."""
    if not isinstance(value, Mapping):
        raise OptionError(f"{key}: expected a mapping with some of the keys {list(known)}, got {_shown(value)}.")
    for name in value:
        if name not in known:
            hint = nearest(name, known)
            raise OptionError(f"{key}: unknown key {_shown(name)}; expected some of {list(known)}.{hint}")
    for name in required:
        if value.get(name) is None:
            raise OptionError(f"{key}: the key {name!r} is missing; the mapping has {list(value)}. Add it.")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{key}: expected text, got {_shown(value)}. Put quotes around numbers, dates, yes and no.")
    return value


def _yes_or_no(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{key}: expected true or false, got {_shown(value)}.")
    return value


def _columns(value: Any, key: str) -> dict[str, str | None]:
    given = checked_mapping(value or {}, key, FIELDS)
    return {name: None if column is None else _text(column, f"{key}.{name}") for name, column in given.items()}


def _shown(value: Any) -> str:
    """A value for a message; only the type of lists and mappings, which YAML aliases can make very long."""
    return type(value).__name__ if isinstance(value, list | tuple | Mapping | set) else f"{value!r:.80}"


def _located(error: RMTensionError, where: str) -> RMTensionError:
    return type(error)(f"{where}: {error}")
