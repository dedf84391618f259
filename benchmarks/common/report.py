"""Output of a benchmark: facts, tables and the result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print the facts that all rows depend on, a line each."""
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)


def save(result: Mapping[str, Any], out: Path | None) -> None:
    """Write the result as JSON to the file `out`, if one is given."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result) + "\n")


def settings_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON values."""
    return {name: _plain(value) for name, value in asdict(settings).items()}


def _plain(value: Any) -> Any:
    """Paths, lists of them too, as text."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def require_matplotlib(plots: Path | None) -> None:
    """Raise ValueError at the start of a run whose plots could not be drawn at its end."""
    if plots is not None and find_spec("matplotlib") is None:
        raise ValueError(
            "--plots needs matplotlib; leave it out, and draw later from the file of --out with "
            "python -m benchmarks.draw"
        )


def print_table(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], failed: Mapping[str, str]
) -> None:
    """Print a table, its first column left-aligned, and below it each failed arm's error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    console = Console(width=170)
    console.print(table)
    for name, error in failed.items():
        console.print(f"{name}: {error}", markup=False)


def number(value: float | None, spec: str, unit: float = 1) -> str:
    """The value in `unit`s; a dash for None."""
    return "-" if value is None else format(value / unit, spec)
