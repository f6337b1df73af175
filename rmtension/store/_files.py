"""Files that are written completely or not at all."""

import errno
import gzip
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rmtension.errors import StorageError
from rmtension.store._compression import require_zstandard

SUFFIX = ".partial"
_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space, or write elsewhere",
    errno.EDQUOT: "Your quota is used up: free some space, or write elsewhere",
    errno.EFBIG: "The file is too large for this file system: write elsewhere",
    errno.EROFS: "The file system is read-only: write elsewhere",
    errno.EACCES: "Writing is not permitted there: write elsewhere, or change the folder's permissions",
    errno.EPERM: "Writing is not permitted there: write elsewhere, or change the folder's permissions",
    errno.ENOTDIR: "A part of the path is a file: use another folder",
    errno.EEXIST: "A part of the path is a file: use another folder",
    errno.EISDIR: "The path is a folder: name a file in it",
    errno.ENAMETOOLONG: "The name is too long: use a shorter name",
}


@contextmanager
def written_whole(path: Path, what: str) -> Iterator[Path]:
    """A temporary path next to `path`: when the block ends, the file written there replaces `path` atomically.

    When the block fails, or the process is killed, `path` is unchanged. Folders are created. Raises `StorageError` for
    everything that the file system refuses, saying that the `what` was not written and what to do.
    """
    # The thread is in the name, so that two threads saving to one path do not share a file: the last to end wins.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        partial.replace(path)
        # Some file systems have no such call for folders.
        with suppress(OSError):
            _flush(path.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: the {what} could not be written ({error}). {advice(error)}.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def filled_whole(folder: Path, what: str, *, seal: str, replaced: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary empty folder: when the block ends, its files move into `folder` and replace files of the same names.

    When the block fails, `folder` is unchanged. The old file `seal` is removed first and the new one arrives last, so
    that a folder that has it is complete, even if the process was killed. Files named in `replaced` are removed as
    well. Raises `StorageError` as `written_whole` does.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}{SUFFIX}")
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.iterdir():
                _flush(path)
            folder.mkdir(exist_ok=True)
            for name in (seal, *replaced):
                (folder / name).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == seal):
                path.replace(folder / path.name)
            with suppress(OSError):
                _flush(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{folder}: the {what} could not be written ({error}). {advice(error)}.") from error


def write_text(path: Path, text: str, what: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with written_whole(path, what) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Write one JSON object per line in UTF-8, completely or not at all; compressed for names in `.gz` or `.zst`."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        # mtime=0, so that the same rows give the same bytes.
        lines = gzip.compress(lines, mtime=0)
    elif path.name.endswith(".zst"):
        lines = require_zstandard(path).compress(lines)
    with written_whole(path, what) as partial:
        partial.write_bytes(lines)


def advice(error: OSError) -> str:
    """What to do about an error of the file system, as a sentence without its period."""
    return _ADVICE.get(error.errno or 0, "An existing file was not changed: write elsewhere")


def _flush(path: Path) -> None:
    """Make the operating system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
