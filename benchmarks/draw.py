"""Plots drawn from a benchmark's JSON file.

python -m benchmarks.draw --results decode.json --plots DIR
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """Draw the results of benchmarks.decode, benchmarks.prefill or benchmarks.throughput."""

    results: Path
    """JSON file that the benchmark wrote with --out."""
    plots: Path
    """Folder for the plots."""


def main(settings: DrawSettings) -> None:
    """Draw all plots of the file. Raises ValueError for a file of something else."""
    from benchmarks.decode import plot as decode_plot
    from benchmarks.prefill import plot as prefill_plot
    from benchmarks.throughput import plot as throughput_plot

    try:
        result = json.loads(settings.results.read_text())
        found = result["settings"]
        draw = prefill_plot.draw if "prompts" in found else decode_plot.draw
        draw = throughput_plot.draw if "prompt_tokens" in found else draw
        draw(result, settings.plots)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{settings.results} is not of a benchmark: {error!r}") from error


if __name__ == "__main__":
    run(main, DrawSettings, prog="python -m benchmarks.draw")
