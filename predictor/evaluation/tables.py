"""The scores of `predictor.evaluate` as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from predictor.evaluation.report import METRICS, TITLES
from predictor.evaluation.scoring import Score, Scores
from routing.names import print_whole, without_common_folder
from routing.predictor_file.format import FAR, HEADS
from routing.topology import Stack

MOST_LABELS = 24
"""Labels in the table, those with the most tokens; the JSON has all."""


def print_report(report: dict[str, Any], scores: Scores, stack: Stack) -> None:
    """Print a table for each head, the recall of each layer and label, and each file's cost."""
    print(f"{report['tokens']:,} held-out tokens of {report['trace']}, {stack}")
    results = _with_short_names(scores.results)
    for head in HEADS:
        title = TITLES[head].format(horizon=report["horizon"], far=FAR * report["horizon"])
        print_whole(_head_table(title, head, results, stack))
    print_whole(_layer_table(results, stack))
    if len(scores.tokens) > 1:
        print_whole(_label_table(results, scores.tokens, stack))
    if report["files"]:
        print_whole(_file_table(report["files"]))


def _with_short_names(results: Sequence[Score]) -> list[Score]:
    names = without_common_folder([result.name for result in results])
    return [result._replace(name=name) for result, name in zip(results, names, strict=True)]


def _table(title: str, *names: str, figures: Sequence[str]) -> Table:
    """A table of rows that start with `names`."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _head_table(title: str, head: str, results: Sequence[Score], stack: Stack) -> Table:
    top_k = stack.top_k
    figures = (
        f"recall@{top_k}",
        f"recall@{math.ceil(1.5 * top_k)}",
        f"precision@{top_k}",
        "calibration error",
    )
    table = _table(title, "predictor", "history", figures=figures)
    for result in results:
        means = (f"{result.mean(head, metric):.3f}" for metric in METRICS)
        table.add_row(result.name, result.history, *means)
    return table


def _layer_table(results: Sequence[Score], stack: Stack) -> Table:
    title = f"recall@{stack.top_k} of {TITLES['this']}, by layer"
    table = _table(title, "layer", figures=[result.label for result in results])
    for layer in range(stack.num_layers):
        figures = (f"{result.heads['this']['recall'][layer]:.3f}" for result in results)
        table.add_row(str(layer), *figures)
    return table


def _label_table(results: Sequence[Score], tokens: dict[str, int], stack: Stack) -> Table:
    title = f"recall@{stack.top_k} of {TITLES['this']}, by label"
    shown = sorted(tokens, key=lambda label: -tokens[label])[:MOST_LABELS]
    if len(shown) < len(tokens):
        title += f" (the {len(shown)} largest of {len(tokens)})"
    table = _table(title, "label", figures=["tokens", *(result.label for result in results)])
    for label in shown:
        figures = (f"{result.mean('this', 'recall', label):.3f}" for result in results)
        table.add_row(label, f"{tokens[label]:,}", *figures)
    return table


def _file_table(files: Sequence[dict[str, Any]]) -> Table:
    cost = "ms a step (batch 1, full window, 1 thread)"
    table = _table("cost", "predictor", figures=["MB", "window", cost])
    names = without_common_folder([file["path"] for file in files])
    for file, name in zip(files, names, strict=True):
        table.add_row(
            name if len(names) > 1 else Path(name).name,
            f"{file['bytes'] / 1e6:.1f}",
            str(file["window"]),
            f"{1e3 * file['step_seconds']:.2f}",
        )
    return table
