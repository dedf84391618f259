"""Hit rates as a table, as JSON and as plots."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cache.policies import FREE_RULES
from runtime.simulation.comparison import ContenderResult
from runtime.simulation.gap import best_free_rule, gap_closed
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
    "hot-set": "#b39ab8",
    "hot-set+bypass": "#d9cddc",
}
"""The lines that stand for themselves; the free rules but LRU and LFU are drawn thin."""
FREE_COLOR = "#c4cbd4"


def _by_policy(results: Sequence[ReplayResult]) -> dict[str, list[ReplayResult]]:
    """The results of each policy, in the order of its first."""
    policies = dict.fromkeys(result.policy for result in results)
    return {name: [r for r in results if r.policy == name] for name in policies}


def table(results: Sequence[ReplayResult], title: str) -> Table:
    """Hit rates by policy and cache size, and the gap to Belady that is closed, as a rich table."""
    from rich.table import Table

    table = Table(
        "policy",
        title=f"hit rate by share of experts resident\n{title}",
        title_justify="left",
    )
    cells = _by_share(results)
    for share in cells:
        table.add_column(f"{share * 100:.4g} %", justify="right")
    for policy, row in _by_policy(results).items():
        table.add_row(policy, *(f"{r.hit_rate:.3f}" for r in row))
    table.add_section()
    table.add_row("best free rule", *(_best(rates) for rates in cells.values()))
    if all("predicted" in rates for rates in cells.values()):
        for name, floor in (("lru", "LRU"), ("", "best free rule")):
            closed = (_closed(rates, name or best_free_rule(rates)) for rates in cells.values())
            table.add_row(f"gap closed, {floor}", *closed)
    return table


def _by_share(results: Sequence[ReplayResult]) -> dict[float, dict[str, float]]:
    """Hit rates by policy, for each cache size."""
    shares = dict.fromkeys(result.residency for result in results)
    return {s: {r.policy: r.hit_rate for r in results if r.residency == s} for s in shares}


def _best(rates: dict[str, float]) -> str:
    name = best_free_rule(rates)
    return "-" if name is None else f"{name} {rates[name]:.3f}"


def _closed(rates: dict[str, float], floor: str | None) -> str:
    """The share of the gap between `floor` and Belady that predicted reuse closes."""
    if floor is None:
        return "-"
    closed = gap_closed(rates["predicted"], rates[floor], rates["belady"])
    return "-" if math.isnan(closed) else f"{closed:.0%}"


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

    figure = Figure(figsize=(7.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for policy, row in _by_policy(results).items():
        row = sorted(row, key=lambda result: result.residency)
        axes.plot(
            [result.residency for result in row],
            [result.hit_rate for result in row],
            **_style(policy),
        )
    best = {s: rates[name] for s, rates in _by_share(results).items()
            if (name := best_free_rule(rates))}  # fmt: skip
    shares = sorted(best)
    axes.plot(shares, [best[share] for share in shares], color="black", linewidth=1,
              linestyle=":", label="best free rule")  # fmt: skip
    axes.set_xticks(shares)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set(xlabel="share of all experts resident", ylabel="hit rate", ylim=(0, 1))
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_contenders(path: Path, results: Sequence[ContenderResult], title: str) -> None:
    """Draw the hit rate of every contender into an image file, a panel for each cache size."""
    from matplotlib.figure import Figure

    shares = list(dict.fromkeys(result.residency for result in results))
    rows = {share: [r for r in results if r.residency == share] for share in shares}
    height = 1.2 + 0.22 * max(map(len, rows.values()))
    figure = Figure(figsize=(1 + 4 * len(shares), height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(1, len(shares), squeeze=False, sharex=True)[0]
    for axes, (share, row) in zip(panels, rows.items(), strict=True):
        row = sorted(row, key=lambda result: result.hit_rate)
        rates = [result.hit_rate for result in row]
        bars = axes.barh(
            [result.name for result in row], rates, color=[_color(result) for result in row]
        )
        axes.bar_label(bars, [f"{rate:.3f}" for rate in rates], padding=2, fontsize=7)
        axes.set(xlabel="hit rate", xlim=(0, 1.1), title=f"{share * 100:g} % of experts resident")
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)


def _color(result: ContenderResult) -> str:
    """By what a contender knows: the future, a forecast, or what it has seen."""
    if result.name.startswith("belady"):
        return COLORS["belady"]
    return COLORS["predicted" if result.recall_this is not None else "lru"]


def _style(policy: str) -> dict[str, Any]:
    """The line of a policy: a colour of its own, or thin and grey among the other free rules."""
    if policy in FREE_RULES and policy not in COLORS:
        markers = dict(zip(FREE_RULES, "ov^<>sDP", strict=True))
        return {"color": FREE_COLOR, "linewidth": 1, "marker": markers[policy], "markersize": 4,
                "label": policy}  # fmt: skip
    dashed = policy.startswith("belady") or "+" in policy
    return {"color": COLORS[policy], "marker": "o", "linestyle": "--" if dashed else "-",
            "label": policy}  # fmt: skip
