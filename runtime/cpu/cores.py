"""The processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
ANY_CORE = -1
"""In place of a core's number: where the system will."""


def usable_cores(cpus: Path = CPUS, cgroup: Path = CGROUP) -> list[int]:
    """One CPU number of each physical core that this process may run on, ascending.

    No more of them than the process's CPU quota allows, and at least one.
    """
    allowed = _allowed()
    first: dict[str, int] = {}
    for cpu in sorted(allowed):
        first.setdefault(_siblings(cpus, cpu), cpu)
    quota = _quota(cgroup)
    cores = sorted(first.values())
    return cores if quota is None else cores[: max(1, int(quota))]


def split_cores(cores: list[int], spare: int = 2) -> tuple[list[int], list[int]]:
    """The cores for experts, and the `spare` first ones: for the host thread and the predictor's.

    At least one core computes experts, however few there are.
    """
    spare = min(spare, len(cores) - 1)
    return cores[spare:], cores[:spare]


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpus: Path, cpu: int) -> str:
    """The hardware threads of a CPU's core, as the system lists them; its own number if unknown."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(cgroup: Path) -> float | None:
    """CPUs that a container grants the process; None where it is not limited."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        used = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        return used / int((cgroup / "cpu/cpu.cfs_period_us").read_text()) if used > 0 else None
    except (OSError, ValueError):
        return None
