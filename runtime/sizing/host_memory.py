"""Host memory that is free to be pinned: of the machine, or of the container that this runs in."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.sizing.units import format_bytes

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be taken without swapping; caches of files give way."""
    available = _fields(MEMINFO).get("MemAvailable:")
    if available is None:  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _text(CGROUP / "memory.max").strip()
    if not limit.isdigit():
        return 1024 * available
    used = _fields(CGROUP / "memory.stat")
    return min(1024 * available, int(limit) - used.get("anon", 0) - used.get("shmem", 0))


def require_host_memory(spill_tokens: int, num_bytes: int) -> None:
    """Raise ValueError where so much memory for spilled keys and values is not there."""
    available = available_bytes()
    if num_bytes > available:
        raise ValueError(
            f"spill_tokens={spill_tokens} takes {format_bytes(num_bytes)} of pinned host memory, "
            f"and {format_bytes(max(available, 0))} are free; give fewer, or free memory"
        )


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of names and numbers."""
    lines = (line.split() for line in _text(path).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
