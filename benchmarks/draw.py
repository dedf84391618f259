"""The pictures of a benchmark's JSON.

python -m benchmarks.draw --results decode.json --plots DIR
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """Draw what benchmarks.decode or benchmarks.prefill recorded."""

    results: Path
    """JSON that the benchmark wrote with --out."""
    plots: Path
    """Folder for the pictures."""


def main(settings: DrawSettings) -> None:
    """Draw all pictures of the file."""
    try:
        result = json.loads(settings.results.read_text())
        draw = draw_decode if "timelines" in result else draw_prefill
        draw(result, settings.plots)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{settings.results} is not of a benchmark: {error!r}") from error


def draw_decode(result: dict[str, Any], folder: Path) -> None:
    """Speed over residency, bytes by policy, and the steps that were profiled."""
    from benchmarks.arms import Row
    from benchmarks.decode_plots import plot_bytes, plot_speed, plot_timeline
    from benchmarks.timeline import GpuEvent

    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(values, Row) for values in result["rows"]]
    title, name = result["title"], result["settings"]["shape"]
    plot_speed(rows, title, folder / f"{name}-speed.png")
    plot_bytes(rows, title, folder / f"{name}-bytes.png")
    for arm, events in result["timelines"].items():
        file = folder / f"{name}-step-{arm.replace(' ', '-')}.png"
        plot_timeline([GpuEvent(*event) for event in events], f"{title}: a step of {arm}", file)


def draw_prefill(result: dict[str, Any], folder: Path) -> None:
    """Time over prompt length."""
    from benchmarks.prefill_plot import plot_prefill
    from benchmarks.prefilling import PrefillRow

    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(values, PrefillRow) for values in result["rows"]]
    file = folder / f"{result['settings']['shape']}-prefill.png"
    plot_prefill(rows, result["title"], file)


def read_row(values: dict[str, Any], kind: type[Any]) -> Any:
    """Inverse of the rows' `to_json`."""
    from benchmarks.arms import Arm

    arm = Arm(**{f.name: values[f.name] for f in fields(Arm)})
    own = {f.name: values[f.name] for f in fields(kind) if f.name != "arm"}
    return kind(arm=arm, **own)


if __name__ == "__main__":
    run(main, DrawSettings, prog="python -m benchmarks.draw")
