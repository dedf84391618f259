"""A lock on an output: one process writes it at a time, and the end of a process frees it.

The lock is `flock` on a file of its own beside the output, `.NAME.lock`, which names the process
and the host that hold it. A file that a killed process left there locks nothing. On NFS, Linux
turns the lock into one that all hosts see; a file system without locks is warned of.
"""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self


class OutputLock:
    """The right to write `output`, held until `release` or the end of the process.

    Raises ValueError where another process has it, or this one has it already.
    """

    def __init__(self, output: Path) -> None:
        folder = output.parent.resolve()
        self._output, self._path = output, folder / f".{output.name}.lock"
        self._file = self._take()

    def _take(self) -> int | None:
        try:
            import fcntl  # Windows has none
        except ModuleNotFoundError:
            return None
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 1000).decode(errors="replace").strip()
                os.close(file)
                raise ValueError(
                    f"{self._output} is being written by {holder or 'another process'}: wait for "
                    "its end, or write elsewhere"
                ) from None
            except OSError as error:
                os.close(file)
                self._path.unlink(missing_ok=True)
                self._warn(error)
                return None
            if self._is_current(file):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
            os.close(file)  # the holder before took the file away when it had ended

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"{self._output} lies where files cannot be locked ({error.strerror}): see to it that "
            "no other process writes it",
            stacklevel=4,
        )

    def release(self) -> None:
        """Give the right up. Later calls do nothing."""
        file, self._file = self._file, None
        if file is not None:
            self._path.unlink(missing_ok=True)
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
