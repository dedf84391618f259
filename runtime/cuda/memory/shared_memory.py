"""Host memory that processes on one machine share: one copy of the experts for several GPUs.

It is a file in memory (tmpfs) with a lock. Who comes first fills it; the others wait, and find it
whole; the last one removes it. The lock of a process that dies is gone, so nobody waits for it:
what it left unfinished is filled anew, what it left whole is used by the next one.

    byte 0        WHOLE, once all layers are there
    page 1 ...    layer 0 | layer 1 | ...         each from the beginning of a page on
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/dev/shm")
"""A file system in memory."""
PAGE = mmap.PAGESIZE
WHOLE = b"\x01"


class SharedMemory:
    """Tensors int16 of `shapes`, the same for all processes of this user that name them alike.

    name: of the contents; letters, digits and dashes. fill: writes the tensors, where nobody has.
    Raises ValueError where the machine has no such memory or too little, and what `fill` raises.
    """

    def __init__(
        self,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        fill: Callable[[list[Tensor]], None],
    ) -> None:
        if not FOLDER.is_dir():
            raise ValueError(f"host='shared' needs {FOLDER}, a folder in memory; load without it")
        self._path = FOLDER / f"expertflow-{os.getuid()}-{name}"
        sizes = [_pages(2 * math.prod(shape)) for shape in shapes]
        self._starts = list(accumulate(sizes, initial=PAGE))
        self._shapes, self._fill = list(shapes), fill
        self.tensors: list[Tensor] = []
        self._file = -1
        while self._file < 0:
            self._file = self._opened()

    def _opened(self) -> int:
        """The file, whole, with a shared lock on it; -1 where it was removed meanwhile."""
        file = _open(self._path)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, self._path):
                    self._make_whole(file)
            fcntl.flock(file, fcntl.LOCK_SH)  # waits for whoever fills it
            if _is_at(file, self._path) and os.pread(file, 1, 0) == WHOLE:
                self.tensors = self.tensors or self._map(file)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return -1

    def _make_whole(self, file: int) -> None:
        """Fill the file, where that has not been done. Nobody else has it open."""
        if os.fstat(file).st_size == self._starts[-1] and os.pread(file, 1, 0) == WHOLE:
            return
        try:
            self._take_room(file)
            self.tensors = self._map(file)
            self._fill(self.tensors)
            os.pwrite(file, WHOLE, 0)
        except BaseException:
            self._path.unlink()
            raise

    def _take_room(self, file: int) -> None:
        """Take all pages now: a write to one that is not there would kill the process."""
        os.ftruncate(file, 0)
        try:
            os.posix_fallocate(file, 0, self._starts[-1])
        except OSError as error:
            raise ValueError(
                f"host='shared': {FOLDER} has no room for {self._starts[-1] / 1e9:.1f} GB "
                f"({error.strerror}); enlarge it (mount -o remount,size=...) or load without it"
            ) from error

    def _map(self, file: int) -> list[Tensor]:
        memory = mmap.mmap(file, self._starts[-1])
        whole = torch.frombuffer(memory, dtype=torch.int16)
        starts = (start // 2 for start in self._starts)
        return [
            whole[start : start + math.prod(shape)].view(shape)
            for start, shape in zip(starts, self._shapes, strict=False)
        ]

    def close(self) -> None:
        """Let go of it; the last one removes it. Its tensors stay readable while somebody holds
        them.
        """
        if self._file < 0:
            return
        self.tensors = []
        with suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(self._file, self._path):
                self._path.unlink()
        os.close(self._file)
        self._file = -1


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE


def _open(path: Path) -> int:
    """Raises ValueError for a file of somebody else, or what is none."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        raise ValueError(f"host='shared': {error}; remove it or load without it") from error
    found = os.fstat(file)
    if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise ValueError(f"host='shared': {path} is another user's; remove it or load without it")
    return file


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one of that name: another may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
