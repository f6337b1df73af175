"""Lines of a file that is plain, gzip'd or zstd'd, as its first bytes show."""

import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rmtension.errors import DataError

# A compressed file of a few kilobytes may unpack to a line that fills the memory.
LONGEST_LINE = 1 << 28
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield every line of the unpacked file with its number; raises `DataError` naming the file if it is damaged."""
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{path}, line {number}: expected at most {LONGEST_LINE:,} bytes, got more. Check that the "
                        "file is JSON lines, with one object per line."
                    )
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the compressed data is damaged or cut short ({error}). Fetch the file again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Check the path and its permissions.") from error


def _unpacked(raw: io.BufferedReader, path: Path) -> Any:
    # peek instead of seek, so that pipes can be read too.
    magic = raw.peek(4)[:4]
    if magic.startswith(_GZIP):
        return gzip.open(raw)
    return io.BufferedReader(_ZstdFile(raw, require_zstandard(path))) if magic == _ZSTD else raw


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a zstd file of one or more frames; a truncated file raises `EOFError`.

    zstandard's own reader does not report a truncated file.
    """

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._zstandard, self._decompressor = raw, zstandard, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed = self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._packed = self._packed or self._raw.read(1 << 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._left = self._frame.decompress(self._packed)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._left))
        buffer[:n], self._left = self._left[:n], self._left[n:]
        return n


def require_zstandard(path: Path) -> Any:
    """Import `zstandard`; raises `DataError` that says how to install it."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f"{path}: .zst needs the package 'zstandard'. Install it with `pip install zstandard`."
        ) from error
    return zstandard
