"""The resumption of a run: its last checkpoint, its place in the data, its log so far.

A resumed run computes what the uninterrupted one would have: a checkpoint holds the place in the
data and the length of the log, and the random numbers of a step follow from its place alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

SEED_KEY = "expertflow_seed"
"""The entry of a checkpoint with the seed of the run's random numbers."""
LOG_ROWS = "expertflow_log_rows"
"""The entry of a checkpoint with the rows of metrics.csv when it was written."""
METRICS = ExperimentWriter.NAME_METRICS_FILE
"""File name of the log."""


class ResumedLogger(CSVLogger):
    """A CSVLogger of `root` that goes on below the rows of an earlier run."""

    def __init__(self, root: str, rows: list[dict[str, str]]) -> None:
        super().__init__(root, name="", version="")
        self._rows = rows

    @property
    def experiment(self) -> Any:
        """The writer of the rows."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.log_dir, self._rows)
        return super().experiment

    @property
    def num_rows(self) -> int:
        """Rows that have been written."""
        return self._experiment.num_rows if isinstance(self._experiment, _Writer) else 0


class _Writer(ExperimentWriter):
    """Writes the rows of an earlier run first, and counts rows."""

    def __init__(self, log_dir: str, rows: list[dict[str, str]]) -> None:
        super().__init__(log_dir)
        self.num_rows = 0
        if rows:
            self.metrics = [{k: v for k, v in row.items() if v} for row in rows]  # type: ignore[misc]
            self.save()

    def _check_log_dir_exists(self) -> None:
        Path(self.metrics_file_path).unlink(missing_ok=True)

    def save(self) -> None:
        self.num_rows += len(self.metrics)
        super().save()


def note_log_rows(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Write the log so far to disk, and its length into a checkpoint."""
    for logger in trainer.loggers:
        if isinstance(logger, ResumedLogger):
            logger.save()
            checkpoint[LOG_ROWS] = logger.num_rows


def place_in_data(trainer: Trainer) -> tuple[int, int]:
    """(passes that are over, batches taken of the next one)."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if progress.is_last_batch:
        return trainer.current_epoch + 1, 0
    return trainer.current_epoch, progress.current.ready


def seed_step(seed: int, *place: int) -> None:
    """Seed torch's generators for one step, by its place in the run."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "big"))
