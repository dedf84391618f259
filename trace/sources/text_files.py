"""Plain text files, whole or compressed, as documents."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SEPARATOR = "<|endoftext|>"
DECOMPRESSORS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
PIECE = 1 << 20
"""Characters of a line read at a time."""
MOST_CHARACTERS = 1 << 26
"""Characters of a document that are kept; what follows them is cut."""


def kind_of(path: Path) -> str:
    """The suffix that tells the kind of a file: `.txt` of `a.txt` and of `a.txt.gz`."""
    path = path.with_suffix("") if path.suffix.lower() in DECOMPRESSORS else path
    return path.suffix.lower()


def open_binary(path: Path) -> IO[bytes]:
    """The file, decompressed as its suffix says."""
    file: IO[bytes] = DECOMPRESSORS.get(path.suffix.lower(), open)(path, "rb")
    return file


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The file as UTF-8, with or without a byte order mark.

    Raises ValueError for other bytes, naming the first of them, and for damaged compression.
    """
    try:
        with (
            open_binary(path) as binary,
            io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as file,
        ):
            yield file
    except UnicodeDecodeError:
        raise ValueError(_not_utf8(path)) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"its compression is damaged ({error})") from error


def _not_utf8(path: Path) -> str:
    """The place of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    with open_binary(path) as file:
        for chunk in iter(lambda: file.read(PIECE), b""):
            waiting = decoder.getstate()[0]
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                at = offset - len(waiting) + error.start
                line += (waiting + chunk)[: error.start].count(b"\n")
                byte = (waiting + chunk)[error.start]
                hint = "; it looks like UTF-16" if at == 0 and byte in (0xFE, 0xFF) else ""
                return (
                    f"it is not UTF-8: byte 0x{byte:02x} at offset {at}, in line {line}{hint}; "
                    "convert it (iconv -t utf-8)"
                )
            offset += len(chunk)
            line += chunk.count(b"\n")
    return f"it is not UTF-8: it ends within a character, at offset {offset}"


def split_text(path: Path) -> Iterator[str]:
    """The documents of a text file, divided by lines `<|endoftext|>`.

    White space around a separator does not matter. Of a document beyond `MOST_CHARACTERS`, only
    these are kept; a line of any length is read in pieces.
    """
    pieces: list[str] = []
    kept, is_start = 0, True
    with open_text(path) as file:
        for piece in iter(lambda: file.readline(PIECE), ""):
            if is_start and piece.strip() == SEPARATOR:
                yield "".join(pieces)
                pieces, kept = [], 0
                continue
            is_start = piece.endswith("\n")
            if kept < MOST_CHARACTERS:
                pieces.append(piece[: MOST_CHARACTERS - kept])
                kept += len(piece)
    yield "".join(pieces)
