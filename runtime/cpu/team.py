"""The threads that torch computes with, lent to other work.

Threads of one's own would fight with them for the cores: OpenMP's spin for a while after each of
torch's operations, as those that compute experts do.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

LIBRARY = re.compile(r"\S*/lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


@cache
def openmp_team(maps: Path = Path("/proc/self/maps")) -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that this process has loaded.

    It runs a function in all threads of a team. None where there is no such library.
    """
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    paths = {found.group() for line in lines if (found := LIBRARY.search(line))}
    if len(paths) > 1:  # others' are loaded beside torch's
        paths = {path for path in paths if "/torch" in path}
    if len(paths) != 1:
        return None
    try:
        parallel = ctypes.CDLL(paths.pop()).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(parallel, ctypes.c_void_p).value
