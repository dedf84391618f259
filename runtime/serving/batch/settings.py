"""Settings of `python -m runtime.batch`, and what a worker makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from runtime.cache.stats import Stats
from runtime.serving.batch.rows import FORMATS
from runtime.serving.chat import read_template
from runtime.serving.model_settings import ModelSettings
from runtime.serving.request import Result
from runtime.serving.settings import ServeSettings

AS_MANY = 0
"""The number of sequences is to be chosen."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings(ModelSettings):
    """Continue every prompt of a data set; interrupted, the same command goes on."""

    batch: int = AS_MANY
    """Sequences that decode together in one step. 0 takes as many as give the most tokens a second
    within `memory` on a GPU, and 32 on a CPU or with `workers`.
    """
    dataset: str
    """Rows with `prompt` or `messages`, and options of their own, or lines of OpenAI's batch API: a
    file (.jsonl, .json, .csv, .tsv, .parquet, or .txt with a prompt a line; .gz, .bz2 and .xz are
    unpacked), `-` for JSON lines from standard input, a directory of `datasets`, or a data set
    on the Hub.
    """
    out: Path
    """JSON lines to write, one a row and in their order, with the row's `id` or `custom_id`."""
    format: str | None = None
    """What a file holds where its name does not tell: jsonl, json, csv, tsv, txt or parquet."""
    split: str = "train"
    """Of a directory or a data set on the Hub."""
    ignore: list[str] = field(default_factory=list)
    """Columns that are no options, although they are called like one."""
    retry_failed: bool = False
    """Serve the rows again whose result in `out` is an error. An interrupted batch does so too."""
    plot: Path | None = None
    """Draw speed, hit rate and bytes over the time of this run into this image file."""
    chat_template: str | None = None
    """Chat template in place of the model's own: a file, or the template itself."""
    name: str | None = None
    """What lines of OpenAI's batch API call the model; by default the last part of `model`."""
    max_tokens: int = 128
    """Tokens to generate for a prompt at the most."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this joint probability."""
    seed: int = 0
    """A row's own random numbers come from this plus its index."""
    stop: list[str] = field(default_factory=list)
    """Generation ends before the first of these."""
    workers: int = 0
    """Ray actors to spread the rows over, each with the model: on the cluster that RAY_ADDRESS
    names, else on this machine. 0 serves them here. Needs the extra `ray`.
    """
    worker_cpus: int = 1
    """Cores of a worker."""

    LEAST_BATCH: ClassVar[int] = AS_MANY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} is not one of {', '.join(FORMATS)}")
        if self.workers and self.record:
            raise ValueError("record: several workers cannot write one recording; serve without")
        for name, least in (("workers", 0), ("worker_cpus", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")

    @property
    def names(self) -> tuple[str, ...]:
        """What a line may call the model."""
        return (self.name,) if self.name else (Path(self.model).name, self.model)

    def read_template(self) -> str | None:
        """The chat template, if one is given. Raises ValueError."""
        return None if self.chat_template is None else read_template(self.chat_template)


class Served(NamedTuple):
    """A result, and what the engine that gave it has done so far."""

    result: Result
    hit_rate: float
    bytes_loaded: int
    """Bytes of experts that were brought into slots."""

    @classmethod
    def by(cls, stats: Stats, result: Result) -> Served:
        """By an engine with these counts."""
        return cls(result, stats.hit_rate, stats.bytes_loaded)


def serve_settings(settings: BatchSettings) -> dict[str, Any]:
    """The settings of `engine.serve` among them."""
    return {f.name: getattr(settings, f.name) for f in fields(ServeSettings)}
