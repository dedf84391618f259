"""The demo's closing report: the policies as a table and as bars, the speeds, a line of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exports.comparison import Run
    from exports.demo_generation import LiveResult

NAMES = {"lru": "LRU", "lfu": "LFU", "predicted": "ExpertFlow", "belady": "Belady"}
"""The policies as the tables name them. ExpertFlow evicts by predicted reuse."""
COLUMNS = (
    "hit rate",
    "loads",
    "vs LRU",
    "gap closed",
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
    for run in live.runs:
        yield [
            NAMES.get(run.policy, run.policy),
            f"{run.hit_rate:.3f}",
            f"{run.loads}",
            f"{run.loads / loads['lru'] - 1:+.1%}" if loads["lru"] else "-",
            gap_closed(run.loads, loads["lru"], loads["belady"]),
            f"{run.bytes_loaded / 2**20:.1f}",
            "yes" if run.identical else "NO",
        ]


def gap_closed(loads: int, lru: int, belady: int) -> str:
    """The part of the loads between LRU's and Belady's that a policy saves, in percent."""
    return f"{(lru - loads) / (lru - belady):.0%}" if lru != belady else "-"


def legend(live: LiveResult) -> Iterator[str]:
    """The meaning of the table's columns, the speeds, and the limits of what a CPU shows."""
    predicted = next(run for run in live.runs if run.policy == "predicted")
    yield "Belady knows the future; gap closed: the share of LRU's excess over it that is saved."
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


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the expert loads of each policy as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colors = ["#8c8c8c", "#3b6ea5", "#d9822b", "#4f8a5b"]
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
