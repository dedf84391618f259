"""Short names of files, for tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def told_apart(paths: Sequence[Path], short: Callable[[Path], str]) -> list[str]:
    """The `short` names of files, or their paths where two files share a name."""
    names = [short(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
