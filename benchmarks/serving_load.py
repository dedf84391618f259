"""What the serving benchmarks have in common: the load, and how it is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.lane import Arm
    from runtime.serving.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class ServingLoad:
    """Requests, their arrivals, and the batch they share."""

    requests: int = 504
    """Prompts, from all domains alike."""
    prompt_tokens: list[int] = field(default_factory=lambda: [16, 96])
    """Shortest and longest prompt."""
    output_tokens: list[int] = field(default_factory=lambda: [8, 32])
    """Shortest and longest output."""
    rate: float = 0.0
    """Poisson arrivals a second (of CPU time, where that is the clock); 0 for all at once."""
    batch: int = 8
    """Sequences that decode together."""
    rows: int = 32
    """Sequences in flight, where the scheduler has a choice."""
    chunk: int = 512
    """Prompt tokens that join a step at the most."""
    lookahead: int = 256
    """Waiting requests that admission chooses from."""
    seed: int = 0
    """Of prompts, lengths and arrivals, and of random weights."""

    def serve_settings(self, arm: Arm) -> ServeSettings:
        """How an arm serves."""
        from runtime.serving.settings import ServeSettings

        shared = {name: getattr(self, name) for name in ("batch", "rows", "chunk", "lookahead")}
        return ServeSettings(
            scheduler=arm.scheduler,
            context=self.prompt_tokens[1] + self.output_tokens[1],
            **(shared | arm.options),
        )


@dataclass(frozen=True, kw_only=True)
class TextLoad(ServingLoad):
    """Prompts out of text."""

    model: Path
    """Model directory."""
    text: Path
    """Folder of .txt files, one a domain; documents are divided by lines `<|endoftext|>`."""
