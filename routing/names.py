"""Names in tables: short, told apart, and never cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ELLIPSIS = "…"
WIDEST = 1000


def told_apart(paths: Sequence[Path], short: Callable[[Path], str]) -> list[str]:
    """The `short` names of files, or their paths where two files share a name."""
    names = [short(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def without_common_folder(names: Sequence[str]) -> list[str]:
    """The names, those that are absolute paths without the folders that all of these share."""
    paths = [name for name in names if os.path.isabs(name)]
    if len(set(paths)) < 2:
        return list(names)
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(name, common) if os.path.isabs(name) else name for name in names]


def print_whole(table: RenderableType, console: Console | None = None) -> None:
    """Print a table as wide as it needs to be for no cell to be cut, at least as the terminal.

    rich cuts names and figures to the terminal's width: rows that differ in the end look alike.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    before = console.width

    def ellipses(width: int) -> int:
        console.width = width
        with console.capture() as capture:
            console.print(table)
        return capture.get().count(ELLIPSIS)

    meant = ellipses(WIDEST)
    width = before
    while width < WIDEST and ellipses(width) > meant:
        width += 4
    console.width = width
    console.print(table)
    console.width = before
