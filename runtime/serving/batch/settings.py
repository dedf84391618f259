"""Settings of `python -m runtime.batch`, and what a worker makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from runtime.serving.model_settings import ModelSettings
from runtime.serving.request import Result
from runtime.serving.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class BatchSettings(ModelSettings):
    """Continue every prompt of a data set; interrupted, the same command goes on."""

    dataset: str
    """A .jsonl file (rows with `prompt` or `messages`, and options of their own), a .txt file (a
    prompt a line), a .parquet file, or a data set on the Hub.
    """
    out: Path
    """JSON lines to write, one an input and in their order."""
    split: str = "train"
    """Of a data set on the Hub."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers and self.record:
            raise ValueError("record: several workers cannot write one recording; serve without")
        for name, least in (("workers", 0), ("worker_cpus", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")


class Served(NamedTuple):
    """A result and the hit rate, so far, of the engine that gave it."""

    result: Result
    hit_rate: float


def serve_settings(settings: BatchSettings) -> dict[str, Any]:
    """The settings of `engine.serve` among them."""
    return {f.name: getattr(settings, f.name) for f in fields(ServeSettings)}
