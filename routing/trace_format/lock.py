"""A lock on a trace directory: one writer at a time, released when its process ends."""

from __future__ import annotations

import os
from pathlib import Path

LOCK_FILE = ".lock"
"""Locked in place of the directory on file systems that lock no directories, such as NFS."""


class DirectoryLock:
    """The exclusive right to write into a directory, until `release` or the end of the process.

    Raises ValueError where another writer has it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: int | None = None
        self._file = self._take()

    def _take(self) -> int | None:
        try:
            import fcntl  # not on Windows: nothing is locked there
        except ModuleNotFoundError:
            return None
        for path, flags in (
            (self._directory, os.O_RDONLY),
            (self._directory / LOCK_FILE, os.O_RDWR | os.O_CREAT),
        ):
            file = os.open(path, flags, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                os.close(file)
                raise ValueError(
                    f"another writer is at work in {self._directory}: wait until it has ended (a "
                    "model that records there: detach it), or name another directory"
                ) from None
            except OSError:
                os.close(file)
        return None

    def release(self) -> None:
        """Give the right up. Later calls do nothing."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        self.release()
