"""The processor cores that this process may use, and threads that wait without using them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/cpu.max")
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Settings of OpenMP's two implementations, GNU's and Intel's."""


def available_cores() -> int:
    """Cores that this process may run on: those of its affinity, and of a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, _quota() or cores))


def _quota() -> int | None:
    """Cores that the control group grants, rounded up; None without a limit."""
    try:
        quota, period = CGROUP.read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the environment says otherwise.

    They spin by default. Where other processes want the cores too, the spinning ones keep the
    working ones from running, and a model runs at a tenth of its speed or less. To be called
    before torch is imported, which reads the settings once; afterwards it does nothing.
    """
    if "torch" not in sys.modules and not any(
        name in os.environ for name in (*PASSIVE, "GOMP_SPINCOUNT")
    ):
        os.environ.update(PASSIVE)
