"""Work folders: what a long run has done so far, kept so that after an interruption it goes on and ends the same.

A folder is for one run. It knows what it is a run of, and refuses another; and one process at a time may use it.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from rmtension.distributed import current
from rmtension.errors import StorageError
from rmtension.store._files import SUFFIX, advice, write_text
from rmtension.store._storage import read_result, write_tensors

# Seconds of work that an interruption costs at most, unless writing takes longer than `_SHARE` of them.
EVERY = 30.0
_SHARE = 0.05
_INPUTS = "inputs.json"
_T = TypeVar("_T")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only this process works in `folder`; raises `StorageError` where another one does.

    The operating system gives the lock back when a process ends, however it ends. What a killed process was writing is
    removed. Of processes that share the work, each has a lock of its own.
    """
    lock = FileLock(folder / f".lock-{current().rank}", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StorageError(
            f"{folder}: another process works in this folder. Wait until it has ended, or name another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        what = advice(error) if isinstance(error, OSError) else "Its file system has no locks: name another folder"
        raise StorageError(f"{folder}: cannot serve as a work folder ({error}). {what}.") from error
    try:
        _sweep(folder)
        yield
    finally:
        lock.release()


def _sweep(folder: Path) -> None:
    """Remove what this process's forerunners left half written; others of those that share the work may be writing."""
    shard = current()
    for left in list(folder.rglob(f".*{SUFFIX}")):
        is_progress = left.name.startswith(".progress-")
        if left.name.startswith(f".progress-{shard.rank}.") or (shard.is_first and not is_progress):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def claim(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Write down in `folder`, or compare with what is written there, what the work in it is done on.

    Only names that both have are compared. Raises `StorageError` naming those that differ.
    """
    path = folder / _INPUTS
    here = json.loads(json.dumps(inputs))
    if not path.exists():
        if current().is_first:
            write_text(path, json.dumps(here, indent=2) + "\n", "list of inputs")
        return
    there = _written_down(path, dict)
    names = [name for name, value in here.items() if there.get(name, value) != value]
    if names:
        listed = "; ".join(f"{name}={there[name]!r} there, {here[name]!r} now" for name in names)
        raise StorageError(
            f"{folder}: this folder belongs to a run with other settings: {listed}. Use a new folder, or delete it."
        )


def remembered(folder: Path, name: str, value: list[str]) -> list[str]:
    """What the first attempt in `folder` wrote down under `name`: this `value`, if it is the first."""
    path = folder / f"{name}.json"
    if not path.exists():
        if current().is_first:
            write_text(path, json.dumps(value) + "\n", name)
        return value
    found: list[str] = _written_down(path, list)
    if not all(isinstance(one, str) for one in found):
        raise StorageError(f"{path}: damaged: expected a list of texts. Empty the folder, or name another.")
    return found


def _written_down(path: Path, kind: type[_T]) -> _T:
    """What an earlier attempt wrote to a JSON file of a work folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: damaged ({error}). Empty the folder, or name another.") from error
    if not isinstance(found, kind):
        raise StorageError(f"{path}: damaged: expected a {kind.__name__}. Empty the folder, or name another.")
    return found


class Progress:
    """The state of one run in its folder: tensors that it adds to, and where it is.

    Enter `locked(folder)` and `claim` it first.

    Args:
        folder: the work folder.
        state: name -> tensor, changed in place by the run, and here to what was kept.
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
        """Keep the state, and `place` with it."""
        start = time.monotonic()
        write_tensors(self._path, "progress", self._state, {"place": dict(place)})
        self._written = time.monotonic()
        self._took = self._written - start
