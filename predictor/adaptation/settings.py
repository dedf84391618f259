"""The settings of an adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """Train a predictor further on recorded routes."""

    trace: list[Path]
    """Traces of the text to adapt to: of `record=` in `runtime.load`, or of `expertflow trace`."""
    replay: list[Path] = field(default_factory=list)
    """Traces of earlier text, to train on beside the new one, so that it is not forgotten."""
    replay_share: float = 0.25
    """Share of the replayed text in every step, and in the loss that stops and judges."""
    max_tokens: int | None = None
    """Train on at most about this many tokens of the new text; by default on all."""
    minutes: float = 10.0
    """Train for at most this long; the learning rate falls to zero by then."""
    passes: int = 8
    """Pass over the new text this many times; more where it is short."""
    learning_rate: float = 1e-3
    """Peak of the learning rate: a short warm-up, then a cosine down to zero."""
    patience: int = 3
    """Stop after this many looks at held-out documents that bring nothing; a run has eight."""
    held_out: float = 0.1
    """Share of the tokens that say when to stop; as many again judge the result."""
    max_eval_tokens: int = 20_000
    """Hold out at most about this many tokens for each of the two."""
    seed: int = 0
    """Seed of the order and the cuts of the training rows."""

    def __post_init__(self) -> None:
        if not self.trace:
            raise ValueError("name at least one recorded trace (--trace)")
        if not 0 < self.replay_share < 1:
            raise ValueError(f"--replay_share {self.replay_share} is not between 0 and 1")
        if not 0 < self.held_out <= 0.4:
            raise ValueError(
                f"--held_out {self.held_out} is not between 0 and 0.4: twice as much is held out"
            )
        for name in ("minutes", "passes", "learning_rate", "patience", "max_eval_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} is not above 0")
