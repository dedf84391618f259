"""The load of the serving benchmarks, and the settings that it is served with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.serving.arm import ServingArm

if TYPE_CHECKING:
    from runtime.serving.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class ServingLoad:
    """Requests, their arrivals, and the batch that they share."""

    requests: int = 504
    """Prompts, the same number from every domain."""
    prompt_tokens: list[int] = field(default_factory=lambda: [16, 96])
    """Shortest and longest prompt."""
    output_tokens: list[int] = field(default_factory=lambda: [8, 32])
    """Shortest and longest output."""
    rate: float = 0.0
    """Poisson arrivals a second (of CPU time, if that is the clock); 0 for all at once."""
    batch: int = 8
    """Sequences that decode together."""
    rows: int = 32
    """Sequences in flight, for schedulers that choose among them."""
    chunk: int = 512
    """Most prompt tokens that join a step."""
    lookahead: int = 256
    """Waiting requests that admission chooses among."""
    seed: int = 0
    """Seed of prompts, lengths, arrivals and random weights."""

    def serve_settings(self, arm: ServingArm) -> ServeSettings:
        """Settings that an arm serves with."""
        from runtime.serving.settings import ServeSettings

        shared = {name: getattr(self, name) for name in ("batch", "rows", "chunk", "lookahead")}
        return ServeSettings(
            scheduler=arm.scheduler,
            context=self.prompt_tokens[1] + self.output_tokens[1],
            **(shared | arm.options),
        )


@dataclass(frozen=True, kw_only=True)
class TextLoad(ServingLoad):
    """A load whose prompts come from text files."""

    model: Path
    """Model directory."""
    text: Path
    """Folder of .txt files, one per domain; lines `<|endoftext|>` separate documents."""
