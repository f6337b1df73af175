"""Files that appear whole or not at all."""

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
    errno.EFBIG: "A file may not be that large here: write elsewhere",
    errno.EROFS: "The file system is read-only: write elsewhere",
    errno.EACCES: "Writing is not permitted there: write elsewhere, or change the folder's permissions",
    errno.EPERM: "Writing is not permitted there: write elsewhere, or change the folder's permissions",
    errno.ENOTDIR: "A part of the path is a file: name another folder",
    errno.EEXIST: "A part of the path is a file: name another folder",
    errno.EISDIR: "It is a folder: name a file in it",
    errno.ENAMETOOLONG: "The name is too long: name another",
}


@contextmanager
def written_whole(path: Path, what: str) -> Iterator[Path]:
    """A name beside `path` to write to: when the block ends, what is there becomes `path`, at once and on the disk.

    When the block fails, or the process is killed, `path` is what it was. Folders are made. Raises `StorageError`
    for everything the file system refuses, saying that the `what` was not written and what to do.
    """
    # Of this thread, so that two who save to one path do not write into one file: the last to end wins.
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
    """An empty folder to write to: when the block ends, its files move into `folder`, in place of those of their names.

    When the block fails, `folder` is what it was. The file `seal` goes first and comes last, so that a folder that has
    it is whole, also after a kill. Files named in `replaced` go as well. Raises `StorageError` as `written_whole` does.
    """
    place = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}{SUFFIX}")
    try:
        try:
            place.mkdir(parents=True)
            yield place
            for path in place.iterdir():
                _flush(path)
            folder.mkdir(exist_ok=True)
            for name in (seal, *replaced):
                (folder / name).unlink(missing_ok=True)
            for path in sorted(place.iterdir(), key=lambda path: path.name == seal):
                path.replace(folder / path.name)
            with suppress(OSError):
                _flush(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{folder}: the {what} could not be written ({error}). {advice(error)}.") from error


def write_text(path: Path, text: str, what: str) -> None:
    """Write a text file in UTF-8, all of it or nothing."""
    with written_whole(path, what) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Write one JSON object per line, in UTF-8, all of it or nothing; packed if the name ends in `.gz` or `.zst`."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        # mtime=0: the same rows give the same bytes.
        lines = gzip.compress(lines, mtime=0)
    elif path.name.endswith(".zst"):
        lines = require_zstandard(path).compress(lines)
    with written_whole(path, what) as partial:
        partial.write_bytes(lines)


def advice(error: OSError) -> str:
    """What to do about an error of the file system."""
    return _ADVICE.get(error.errno or 0, "What was there is as it was")


def _flush(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
