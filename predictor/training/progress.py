"""The terminal of a training run: a line for each epoch, then the held-out scores in words."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from predictor.networks.windows import PredictorShape

NOISE = (
    ".*does not have many workers.*",
    ".*`__len__` could be inaccurate.*",  # see `Rows`
    ".*Previous log files in this directory will be deleted.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",
    ".*your dataloader is not resumable.*",  # the data module is
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
"""Warnings of Lightning that no user of this command can act on."""
COLUMNS = (
    ("epoch", ""),
    ("step", ""),
    ("loss in", "training"),
    ("loss in", "validation"),
    ("recall@{k} of", "this token"),
    ("recall@{k} of", "the next"),
    ("calibration", "error"),
    ("seconds", ""),
)
"""The head of the epoch lines, in two rows."""
FIGURES = (
    "train/loss",
    "val/loss",
    "val/this_known_recall",
    "val/next_known_recall",
    "val/this_known_calibration_error",
)
"""The logged figures of an epoch line."""
STATUS_SECONDS = 0.2
"""Shortest time between two updates of the status line."""
WIDTH = 100
"""Columns of the terminal when the output is not one."""


def silence_framework() -> None:
    """Keep Lightning's tips, notes about devices and known warnings out of the terminal."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


class EpochLines(Callback):
    """Prints what is trained, then a line at each validation.

    Args:
        status: Show the step within the epoch, where the output is a terminal.
    """

    def __init__(self, *, status: bool = True) -> None:
        self._status = status and sys.stdout.isatty()
        self._start = self._shown = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the predictor, the device and the head of the epoch lines."""
        self._start = time.monotonic()
        if trainer.is_global_zero:
            module: Any = pl_module
            print(f"training {_described(module.predictor)} on {module.device}")
            print(*header(module.predictor.shape.top_k), sep="\n", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Renew the status line."""
        now = time.monotonic()
        if self._status and trainer.is_global_zero and now - self._shown > STATUS_SECONDS:
            self._shown = now
            done, total = trainer.fit_loop.batch_idx + 1, trainer.num_training_batches
            epoch = trainer.current_epoch + 1
            print(f"\r\033[K  epoch {epoch}: step {done} of {total}", end="", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if self._status:
            print("\r\033[K", end="")
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        seconds = time.monotonic() - self._start
        print(epoch_line(epoch, step, trainer.callback_metrics, seconds), flush=True)


def _described(predictor: Any) -> str:
    size = sum(parameter.numel() for parameter in predictor.parameters()) / 1e6
    shape: PredictorShape = predictor.shape
    return (
        f"a {predictor.kind} predictor of {size:.2f} M parameters for {shape.num_layers} MoE layers"
        f" of {shape.num_experts} experts, top-{shape.top_k},"
    )


def header(top_k: int) -> list[str]:
    """The two rows above the epoch lines."""
    rows = zip(*COLUMNS, strict=True)
    return ["".join(f"{word.format(k=top_k):>12}" for word in row) for row in rows]


def epoch_line(epoch: int, step: int, logged: Mapping[str, Any], seconds: float) -> str:
    """One line below `header`, from what was logged; a dash where a figure is missing or NaN."""
    figures = (figure(float(logged.get(name, math.nan))) for name in FIGURES)
    cells = (f"{epoch}", f"{step}", *figures, f"{seconds:.1f}")
    return "".join(f"{cell:>12}" for cell in cells)


def figure(value: float) -> str:
    """A figure with three digits, or a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def print_scores(report: Mapping[str, Any], shape: PredictorShape, documents: str) -> None:
    """Print the held-out scores, means over the layers, as a table.

    Args:
        report: {head_known: {metric: [L]}}, as `RouteModule.report` has it.
        shape: Of the predictor.
        documents: What it was measured on, for the title.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=f"scores on {documents}", title_justify="left")
    k, wider = shape.top_k, math.ceil(1.5 * shape.top_k)
    for column in ("experts of", "earlier routes"):
        table.add_column(column)
    for column in (f"recall@{k}", f"recall@{wider}", f"precision@{k}", "calibration error"):
        table.add_column(column, justify="right")
    for row in score_rows(report, shape):
        table.add_row(*row)
    width = None if sys.stdout.isatty() else WIDTH
    Console(highlight=False, width=width).print(table)


def score_rows(report: Mapping[str, Any], shape: PredictorShape) -> Iterator[list[str]]:
    """The rows of the table: heads of single tokens by recall, of horizons by precision.

    A horizon uses more than K experts: its recall@K stays low however good it is.
    """
    heads = {
        "this": "this token",
        "next": "the next token",
        "horizon": f"the next {shape.horizon} tokens",
        "far": f"the next {shape.far} tokens",
    }
    for head, words in heads.items():
        shown = ("recall", "recall_1_5k") if head in ("this", "next") else ("precision",)
        for history in ("known", "unknown"):
            means = _means(report.get(f"{head}_{history}", {}))
            names = ("recall", "recall_1_5k", "precision", "calibration_error")
            cells = [
                figure(means.get(name, math.nan)) if name in (*shown, "calibration_error") else ""
                for name in names
            ]
            yield [words if history == "known" else "", history, *cells]


def _means(values_L: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of each metric over the layers that have one."""
    there = {name: [v for v in layers if not math.isnan(v)] for name, layers in values_L.items()}
    return {name: sum(layers) / len(layers) for name, layers in there.items() if layers}
