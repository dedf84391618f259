"""The hit rates of a replay as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.simulation.replay import ReplayResult
from runtime.simulation.settings import SimulateSettings

if TYPE_CHECKING:
    from rich.table import Table

COLORS = {
    "lru": "#8c8c8c",
    "lfu": "#3b6ea5",
    "predicted": "#d9822b",
    "belady": "#4f8a5b",
    "predicted+bypass": "#e8b98a",
    "belady+bypass": "#a5c9a9",
}


def _by_policy(results: Sequence[ReplayResult]) -> dict[str, list[ReplayResult]]:
    """The results of each policy, in the order of its first."""
    policies = dict.fromkeys(result.policy for result in results)
    return {name: [r for r in results if r.policy == name] for name in policies}


def table(results: Sequence[ReplayResult], title: str) -> Table:
    """Hit rates by policy and cache size, as a rich table."""
    from rich.table import Table

    table = Table(
        "policy",
        title=f"hit rate by share of experts resident\n{title}",
        title_justify="left",
    )
    for share in dict.fromkeys(result.residency for result in results):
        table.add_column(f"{share * 100:.4g} %", justify="right")
    for policy, row in _by_policy(results).items():
        table.add_row(policy, *(f"{r.hit_rate:.3f}" for r in row))
    return table


def write_json(path: Path, settings: SimulateSettings, results: Sequence[dict[str, Any]]) -> None:
    """Write results with the command and the settings that gave them."""
    document = {
        "command": ["python", "-m", "runtime.simulate", *sys.argv[1:]],
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "results": list(results),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path, results: Sequence[ReplayResult], title: str) -> None:
    """Plot hit rates over cache sizes into the image file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for policy, row in _by_policy(results).items():
        row = sorted(row, key=lambda result: result.residency)
        axes.plot(
            [result.residency for result in row],
            [result.hit_rate for result in row],
            marker="o",
            label=policy,
            color=COLORS[policy],
            linestyle="--" if policy.startswith("belady") or "+" in policy else "-",
        )
    axes.set(xlabel="share of all experts resident", ylabel="hit rate", ylim=(0, 1))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
