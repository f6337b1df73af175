"""Work folders, which store a long run's progress so that it can resume after an interruption with the same result.

A folder belongs to one run: it records the run's settings and refuses a run with others. One process at a time may use
it.
"""

import json
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from rmtension.distributed import current
from rmtension.errors import StorageError
from rmtension.store._files import SUFFIX, advice, write_text
from rmtension.store._storage import read_result, write_tensors

# An interruption loses at most this many seconds of work, unless writing takes longer than `_SHARE` of them.
EVERY = 30.0
_SHARE = 0.05
_INPUTS = "inputs.json"
_T = TypeVar("_T")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; raises `StorageError` if another process holds the lock.

    The operating system releases the lock when a process ends, even if it is killed. Files that a killed process had
    not finished writing are removed. Inside `sharded()` each process has its own lock.
    """
    lock = FileLock(folder / f".lock-{current().rank}", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"{folder}: another process works in this folder. Wait until it has ended, or use another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        what = advice(error) if isinstance(error, OSError) else "Its file system has no locks: use another folder"
        raise StorageError(f"{folder}: cannot serve as a work folder ({error}). {what}.") from error
    try:
        _sweep(folder)
        yield
    finally:
        lock.release()


def _sweep(folder: Path) -> None:
    """Remove partial files of earlier runs of this process, but not those that other processes may be writing."""
    shard = current()
    for partial in list(folder.rglob(f".*{SUFFIX}")):
        is_progress = partial.name.startswith(".progress-")
        if partial.name.startswith(f".progress-{shard.rank}.") or (shard.is_first and not is_progress):
            with suppress(OSError):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def below(folder: str | Path | None, name: str) -> Path | None:
    """The folder of one pass in the work folder of several; None without a work folder."""
    return None if folder is None else Path(folder) / name


def unclaim(folder: Path) -> None:
    """Forget which run a folder belongs to; its files stay."""
    if current().is_first:
        (folder / _INPUTS).unlink(missing_ok=True)


def claim(folder: Path, inputs: Mapping[str, Any], *, optional: Container[str] | None = ()) -> None:
    """Record the inputs of a run in `folder`, or compare them with the inputs recorded there.

    A name that only one of them has is a difference, except for the names in `optional` (None: all names), which are
    compared if both have them. Raises `StorageError` naming the inputs that differ.
    """
    path = folder / _INPUTS
    now = json.loads(json.dumps(inputs))
    if not path.exists():
        if current().is_first:
            write_text(path, json.dumps(now, indent=2) + "\n", "list of inputs")
        return
    recorded = _read_json(path, dict)
    names = [name for name, value in now.items() if recorded.get(name, value) != value]
    if optional is not None:
        names += [name for name in {**recorded, **now} if (name in recorded) != (name in now) and name not in optional]
    if names:
        listed = "; ".join(f"{name}={_shown(recorded, name)} there, {_shown(now, name)} now" for name in names)
        raise StorageError(
            f"{folder}: this folder belongs to a run with other settings: {listed}. Use a new folder, or delete this "
            "one."
        )


def _shown(inputs: Mapping[str, Any], name: str) -> str:
    return repr(inputs[name]) if name in inputs else "nothing"


def remembered(folder: Path, name: str, value: list[str]) -> list[str]:
    """The value that the first attempt in `folder` recorded under `name`; the first attempt records `value`."""
    path = folder / f"{name}.json"
    if not path.exists():
        if current().is_first:
            write_text(path, json.dumps(value) + "\n", name)
        return value
    recorded: list[str] = _read_json(path, list)
    if not all(isinstance(text, str) for text in recorded):
        raise StorageError(f"{path}: damaged: expected a list of texts. Empty the folder, or use another.")
    return recorded


def _read_json(path: Path, kind: type[_T]) -> _T:
    """The value that an earlier attempt wrote to a JSON file of a work folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: damaged ({error}). Empty the folder, or use another.") from error
    if not isinstance(value, kind):
        raise StorageError(f"{path}: damaged: expected a {kind.__name__}. Empty the folder, or use another.")
    return value


class Progress:
    """The saved state of one run: tensors that it adds to, and its position (`place`).

    Enter `locked(folder)` and call `claim` first.

    Args:
        folder: the work folder.
        state: name -> tensor. The run changes these tensors in place; if the folder holds a saved state, it is copied
            into them here.
    """

    def __init__(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        shard = current()
        self._path = folder / f"progress-{shard.rank}.safetensors"
        self._state = state
        self._written = time.monotonic()
        self._took = 0.0
        self.place: dict[str, Any] = {}
        if self._path.exists():
            spec = {name: " ".join(["any", *map(str, tensor.shape)]) for name, tensor in state.items()}
            tensors, values = read_result(self._path, "progress", tensors=spec, values={"place": dict})
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
            self.place = values["place"]

    @property
    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._written >= max(EVERY, self._took / _SHARE)

    def save(self, place: Mapping[str, Any]) -> None:
        """Save the state together with `place`, the position of the run."""
        start = time.monotonic()
        write_tensors(self._path, "progress", self._state, {"place": dict(place)})
        self._written = time.monotonic()
        self._took = self._written - start
