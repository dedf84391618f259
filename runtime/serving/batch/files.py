"""Files as bytes and lines: compressed or not, standard input too."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

STDIN = "-"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UTF8_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""Byte-order marks of UTF-16 and UTF-32."""


def _refuse_zstd(path: Path) -> BinaryIO:
    raise ValueError(f"{path} is compressed by zstd: unpack it first")


MAGIC: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _refuse_zstd,
}
"""The first bytes of compressed files, and what opens these."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of a file. Raises ValueError for one that is damaged, as it is read."""
    with path.open("rb") as file:
        start = file.read(8)
    unpack = next((one for magic, one in MAGIC.items() if start.startswith(magic)), None)
    try:
        with unpack(path) if unpack else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def lines_of(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, without byte-order mark and line ends."""
    for number, line in enumerate(file, 1):
        if number == 1:
            if line.startswith(OTHER_MARKS):
                raise ValueError(f"{name} is in UTF-16 or UTF-32: convert it to UTF-8")
            line = line.removeprefix(UTF8_MARK)
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield number, line


def decoded(line: bytes) -> str:
    """The text of a line. Raises ValueError for what is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8") from error


def keep_stdin(folder: Path) -> Path:
    """A copy of standard input, in a file of `folder`: it is read more than once."""
    if sys.stdin.isatty():
        print("reading rows from the terminal; Ctrl-D ends them", file=sys.stderr)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Path(file.name)
