"""Names of checkpoints: folders of this machine come first, and a mistyped path is never sent to the hub."""

import difflib
from pathlib import Path

from rmtension.errors import ModelError, OptionError

_SHOWN = 8


def find_local(name: str | Path, revision: str | None = None) -> str:
    """The folder `name`, or `name` itself if it can only be a hub name.

    Raises `ModelError` for a missing path (with similar names that exist), and for a folder without a checkpoint. With
    a `revision`, a name that is no folder here is a hub name.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise ModelError("name_or_path: expected the folder of a checkpoint or a hub name, got an empty string.")
    if path.is_dir():
        if not any((path / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise ModelError(f"{name}: this folder has no config.json and no adapter_config.json.{contents(path)}")
        return str(path)
    if path.is_file():
        if not _is_checkpoint(path.parent):
            raise ModelError(
                f"name_or_path: expected the folder of a checkpoint or a hub name, got the file {name}. Pass the "
                "folder; a file of pairs is read with PreferencePairs.read."
            )
        raise ModelError(
            f"name_or_path: expected the folder of a checkpoint or a hub name, got the file {name}. Pass its folder, "
            f"{str(path.parent)!r}."
        )
    if isinstance(name, str) and revision is not None:
        return name
    is_path = isinstance(name, Path) or _is_path(name)
    close = _close(path)
    if not is_path and not (close and _is_checkpoint(close)):
        return str(name)
    raise ModelError(
        f"name_or_path: expected the folder of a checkpoint or a hub name, but there is no folder {name}."
        + (f" Did you mean {str(close)!r}?" if close else f" {_missing(path)}")
        + ("" if is_path and _is_certain(name) else " If it is a hub name, pass revision='main'.")
    )


def require_name(name: object) -> None:
    """Raise `OptionError` for anything but a string or path, such as a model in memory."""
    if not isinstance(name, str | Path):
        raise OptionError(
            f"name_or_path: expected the folder of a checkpoint or a hub name, got {type(name).__name__}. Open a model "
            "in memory with RewardHead.from_classifier(model, tokenizer=tokenizer)."
        )


def contents(name: str | Path) -> str:
    """A sentence about what a folder contains, for error messages; '' for a hub name."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    files = sorted(path.name for path in folder.iterdir())
    checkpoints = [file for file in files if _is_checkpoint(folder / file)]
    if checkpoints:
        example = str(folder / checkpoints[-1])
        return f" It contains the checkpoints {checkpoints[-_SHOWN:]}; pass one of them, for example {example!r}."
    if any(file.endswith(".safetensors") for file in files) and "config.json" not in files:
        return f" It contains {files[:_SHOWN]}: copy config.json and the tokenizer of the trained model into it."
    return f" It contains {files[:_SHOWN]}{' and more' if len(files) > _SHOWN else ''}."


def _is_path(name: str) -> bool:
    """Whether `name` cannot be a hub name, or its first part is a folder of this machine."""
    first, slash, _ = name.partition("/")
    return _is_certain(name) or (slash == "/" and Path(first).is_dir())


def _is_certain(name: str | Path) -> bool:
    """Whether `name` cannot be a hub name."""
    text = str(name)
    starts = isinstance(name, Path) or Path(text).is_absolute() or text.startswith((".", "~"))
    return starts or text.count("/") > 1 or "\\" in text


def _close(path: Path) -> Path | None:
    """The existing folder whose name is most similar to `path`, part by part; None if some part has no match."""
    similar = Path(path.anchor) if path.is_absolute() else Path()
    for part in path.relative_to(path.anchor).parts if path.is_absolute() else path.parts:
        if part == ".." or (similar / part).is_dir():
            similar = similar / part
            continue
        try:
            folders = [entry.name for entry in similar.iterdir() if entry.is_dir()]
        except OSError:
            return None
        near = difflib.get_close_matches(part, folders, n=1, cutoff=0.7)
        if not near:
            return None
        similar = similar / near[0]
    return similar


def _missing(path: Path) -> str:
    """The first missing part of a path, and the folders that are there instead."""
    for folder in reversed(path.parents):
        if not folder.is_dir():
            return f"There is no folder {str(folder)!r}."
    entries = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    return f"The folders in {str(path.parent)!r} are {entries[:_SHOWN]}{' and more' if len(entries) > _SHOWN else ''}."


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder contains a checkpoint, or the checkpoints of a training run."""
    kinds = ("config.json", "adapter_config.json", "checkpoint-*/config.json", "checkpoint-*/adapter_config.json")
    return any(next(folder.glob(kind), None) is not None for kind in kinds)
