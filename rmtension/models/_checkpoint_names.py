"""Names of checkpoints: what is on this machine is looked at first, and a mistyped path never reaches a hub."""

import difflib
from pathlib import Path

from rmtension.errors import ModelError, OptionError

_SHOWN = 8


def find_local(name: str | Path, revision: str | None = None) -> str:
    """The folder that `name` is, or `name` itself where it can only be a hub's.

    Raises `ModelError` for a path that is not there (with names that are close to it), and for a folder without a
    checkpoint. A `revision` says that it is a hub's name.
    """
    path = Path(name).expanduser()
    if not str(name):
        raise ModelError("name_or_path: expected the folder of a checkpoint or a hub name, got an empty text.")
    if path.is_dir():
        if not any((path / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise ModelError(f"{name}: this folder has no config.json and no adapter_config.json.{contents(path)}")
        return str(path)
    if path.is_file():
        if not _is_checkpoint(path.parent):
            raise ModelError(
                f"name_or_path: {name} is a file, and a model is the folder of a checkpoint. Name that folder; a file "
                "of pairs goes to PreferencePairs.read."
            )
        raise ModelError(f"name_or_path: {name} is a file. Name the folder of the checkpoint, {str(path.parent)!r}.")
    if isinstance(name, str) and revision is not None:
        return name
    is_path = isinstance(name, Path) or _is_path(name)
    close = _close(path)
    if not is_path and not (close and _is_checkpoint(close)):
        return str(name)
    raise ModelError(
        f"name_or_path: expected the folder of a checkpoint or a hub name, and {name} is no folder."
        + (f" Did you mean {str(close)!r}?" if close else f" {_missing(path)}")
        + ("" if is_path and _is_certain(name) else " If it is a name on the hub, say revision='main'.")
    )


def require_name(name: object) -> None:
    """Raise `OptionError` for what is not the name of a checkpoint, such as a model in memory."""
    if not isinstance(name, str | Path):
        raise OptionError(
            f"name_or_path: expected the folder of a checkpoint or a hub name, got {type(name).__name__}. A model in "
            "memory goes to RewardHead.from_classifier(model, tokenizer=tokenizer)."
        )


def contents(name: str | Path) -> str:
    """What is in a folder, and which checkpoints are; '' for a hub name."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    found = sorted(path.name for path in folder.iterdir())
    inside = [file for file in found if _is_checkpoint(folder / file)]
    if inside:
        return f" The checkpoints in it are {inside[-_SHOWN:]}; name one, for example {str(folder / inside[-1])!r}."
    if any(file.endswith(".safetensors") for file in found) and "config.json" not in found:
        return f" It has {found[:_SHOWN]}: copy the config.json and the tokenizer of the model that was trained to it."
    return f" It has {found[:_SHOWN]}{' and more' if len(found) > _SHOWN else ''}."


def _is_path(name: str) -> bool:
    """Whether it is no hub's name, or its first part is a folder here."""
    first, slash, _ = name.partition("/")
    return _is_certain(name) or (slash == "/" and Path(first).is_dir())


def _is_certain(name: str | Path) -> bool:
    """Whether no hub could have such a name."""
    text = str(name)
    starts = isinstance(name, Path) or Path(text).is_absolute() or text.startswith((".", "~"))
    return starts or text.count("/") > 1 or "\\" in text


def _close(path: Path) -> Path | None:
    """The folder whose name is nearest to `path`, part by part; None where a part has nothing near."""
    found = Path(path.anchor) if path.is_absolute() else Path()
    for part in path.relative_to(path.anchor).parts if path.is_absolute() else path.parts:
        if part == ".." or (found / part).is_dir():
            found = found / part
            continue
        try:
            folders = [entry.name for entry in found.iterdir() if entry.is_dir()]
        except OSError:
            return None
        near = difflib.get_close_matches(part, folders, n=1, cutoff=0.7)
        if not near:
            return None
        found = found / near[0]
    return found


def _missing(path: Path) -> str:
    """The first part of a path that is not there, and what is in its place."""
    for folder in reversed(path.parents):
        if not folder.is_dir():
            return f"There is no folder {str(folder)!r}."
    entries = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    return f"The folders in {str(path.parent)!r} are {entries[:_SHOWN]}{' and more' if len(entries) > _SHOWN else ''}."


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint, or checkpoints of a training run."""
    kinds = ("config.json", "adapter_config.json", "checkpoint-*/config.json", "checkpoint-*/adapter_config.json")
    return any(next(folder.glob(kind), None) is not None for kind in kinds)
