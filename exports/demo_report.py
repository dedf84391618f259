"""The demo's closing report: the policies as a table and as bars, the speeds, a line of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.simulation.gap import best_free_rule, gap_closed
from runtime.simulation.hit_rates import COLORS, FREE_COLOR

if TYPE_CHECKING:
    from exports.comparison import Run
    from exports.demo_generation import LiveResult

NAMES = {
    "lru": "LRU",
    "lfu": "LFU",
    "class-lru": "ClassLRU",
    "lfru": "LFRU",
    "reuse": "reuse",
    "predicted": "ExpertFlow",
    "belady": "Belady",
}
"""The policies as the tables name them. ExpertFlow evicts by predicted reuse."""
COLUMNS = (
    "hit rate",
    "loads",
    "vs LRU",
    "of LRU's gap",
    "of best free's",
    "MiB moved",
    "same tokens",
)
LINE_BREAK = "⏎ "


def print_report(live: LiveResult, *, width: int) -> None:
    """Print the table, its legend, the predictor, the speeds and a line of text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    first = live.runs[0]
    table = Table("cache policy", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows(live):
        table.add_row(*row)
    console = Console(highlight=False, markup=False, width=width)
    console.print(
        f"{live.new_tokens} tokens generated greedily after held-out prompts, "
        f"{first.tokens} tokens through the model; {first.slots} expert slots"
    )
    console.print(table)
    for line in (*legend(live), *text_lines(live, width)):
        console.print(line)


def rows(live: LiveResult) -> Iterator[list[str]]:
    """The table's rows, a policy each."""
    loads = {run.policy: run.loads for run in live.runs}
    rates = {run.policy: run.hit_rate for run in live.runs}
    floors = "lru", best_free_rule(rates) or "lru"
    for run in live.runs:
        yield [
            NAMES.get(run.policy, run.policy),
            f"{run.hit_rate:.3f}",
            f"{run.loads}",
            f"{run.loads / loads['lru'] - 1:+.1%}" if loads["lru"] else "-",
            *(_percent(gap_closed(run.hit_rate, rates[f], rates["belady"])) for f in floors),
            f"{run.bytes_loaded / 2**20:.1f}",
            "yes" if run.identical else "NO",
        ]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def legend(live: LiveResult) -> Iterator[str]:
    """The meaning of the table's columns, the speeds, and the limits of what a CPU shows."""
    predicted = next(run for run in live.runs if run.policy == "predicted")
    best = best_free_rule({run.policy: run.hit_rate for run in live.runs}) or "lru"
    yield (
        "Belady knows the future. Gap: the loads beyond Belady's; the share saved of LRU's, and of "
        f"those of the best rule without a predictor, {NAMES.get(best, best)}."
    )
    if not math.isnan(predicted.recall):
        yield (
            f"ExpertFlow evicts by predicted reuse: recall@K {predicted.recall:.3f} of the experts "
            f"while decoding, {predicted.prediction_ms:.2f} ms a step."
        )
    yield (
        f"The same loop on some of the prompts: {live.speeds.resident:.0f} tokens/s with every "
        f"expert resident, {live.speeds.offloaded:.0f} offloaded."
    )
    kib = predicted.bytes_loaded / max(predicted.loads, 1) / 2**10
    yield (
        "On a CPU this saves bytes and not time: both memories are the same RAM, and copying an "
        f"expert of {kib:.0f} KiB costs less than the bookkeeping. On a GPU each "
        "load crosses PCIe, and the bytes are the time (docs/gpu.md)."
    )


def text_lines(live: LiveResult, width: int) -> Iterator[str]:
    """The prompt's end and its continuation, a line each of at most `width` columns."""
    label = f"prompt, {live.domain}"
    room = width - len(label) - 5
    prompt = _one_line(live.prompt)
    yield ""
    yield f"{label}:  {prompt if len(prompt) <= room else '…' + prompt[1 - room :]}"
    continuation = _one_line(live.continuation)
    yield f"{'generated':>{len(label)}}:  {continuation[: room - 1]}" + (
        "…" if len(continuation) >= room else ""
    )


def _one_line(text: str) -> str:
    return LINE_BREAK.join(text.split("\n"))


def save(live: LiveResult, path: Path) -> None:
    """Write the policies' results and the speeds as JSON; what was not measured is null."""
    runs = [
        {name: None if value != value else value for name, value in asdict(run).items()}
        for run in live.runs
    ]
    result = {"new_tokens": live.new_tokens, "runs": runs, "speeds": live.speeds._asdict()}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the expert loads of each policy as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colors = [COLORS.get(run.policy, FREE_COLOR) for run in runs]
    names = [NAMES.get(run.policy, run.policy) for run in runs]
    bars = axes.bar(names, [run.loads for run in runs], color=colors)
    axes.bar_label(bars, [f"{run.loads}\n{run.hit_rate:.0%} hits" for run in runs], fontsize=8)
    axes.set_ylim(0, max(run.loads for run in runs) * 1.2)
    axes.set(ylabel="expert loads")
    axes.set_title(
        f"{runs[0].tokens} tokens, {runs[0].residency:.0%} of the experts resident", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
