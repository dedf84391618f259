"""The settings of `expertflow adapt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Train a predictor further on recorded routes, and write it only if it became better."""

    trace: list[Path]
    """Traces of the text to adapt to: of `record=` in `runtime.load`, or of `expertflow trace`."""
    out: Path
    """ONNX file to write; an existing one is replaced."""
    predictor: Path | None = None
    """ONNX file to start from. By default the one that ships for the trace's model."""
    replay: list[Path] = field(default_factory=list)
    """Traces of earlier text, to train on beside the new one: what they hold is not forgotten."""
    replay_share: float = 0.25
    """Share of the replayed traces in every step, and in the loss that says when to stop."""
    minutes: float = 10.0
    """Train for at most this long."""
    passes: int = 8
    """Pass over the new text at most this many times."""
    least_steps: int = 40
    looks: int = 16
    learning_rate: float = 1e-3
    """Peak of the schedule: a short warm-up, then a cosine down to zero."""
    patience: int = 4
    """Stop after this many looks at held-out documents that bring nothing."""
    held_out: float = 0.1
    """Share of the tokens that says when to stop, and as much again that judges the result."""
    most_held_out: int = 20_000
    seed: int = 0
    """Seed of the order and the cuts of the training rows."""
    json: Path | None = None
    """Write all figures to this JSON file."""
