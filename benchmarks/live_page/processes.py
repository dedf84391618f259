"""Processor time of processes and threads, from Linux's /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
KIND = "--type="


def thread_seconds(pid: int) -> float:
    """CPU seconds of a process's main thread."""
    return int((PROC / f"{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def process_seconds(pid: int) -> float:
    """CPU seconds of a process, those of its threads that have ended among them."""
    user, system = _fields(pid)[11:13]
    return (int(user) + int(system)) / TICKS


def browser_seconds(pid: int) -> dict[str, float]:
    """CPU seconds of a browser and all processes below it, by Chromium's kind of process."""
    total: dict[str, float] = {}
    for one in (pid, *below(pid)):
        try:
            total[kind_of(one)] = total.get(kind_of(one), 0.0) + process_seconds(one)
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def kind_of(pid: int) -> str:
    """The kind of a process of Chromium: renderer, gpu-process, ...; `browser` is the first."""
    words = (PROC / f"{pid}/cmdline").read_text().replace("\0", " ").split()
    kinds = [word.removeprefix(KIND) for word in words if word.startswith(KIND)]
    return kinds[0] if kinds else "browser"


def below(pid: int) -> Iterator[int]:
    """All processes that descend from one."""
    parents: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                parents.setdefault(int(_fields(int(folder.name))[1]), []).append(int(folder.name))
            except (OSError, IndexError):
                continue
    found = list(parents.get(pid, ()))
    for one in found:
        found += parents.get(one, ())
    yield from found


def _fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name, which may hold anything."""
    return (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
