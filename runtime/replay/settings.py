"""The settings of `python -m runtime.replay`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MOST_TOKENS = 5000
"""Tokens on a page at most: beyond, browsers take seconds to open it."""


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Write a recorded run as one HTML file: the experts of each token, and a cache beside LRU."""

    trace: Path
    """Trace directory of a decoder-only model."""
    out: Path
    """HTML file to write. It needs no network, no server and no other file."""
    document: int = 0
    """Document of the trace, counted from 0."""
    max_tokens: int = 500
    """Tokens of the document to show at most."""
    residency: float = 0.25
    """Cache size, as a fraction of all experts."""
    policy: str | None = None
    """Cache policy, one of those of `simulate` but the hot set; by default predicted with a
    predictor, else reuse."""
    predictor: Path | None = None
    """ONNX predictor; shows what it predicts, and allows the policy `predicted`."""
    decode_all: bool = False
    """Replay a prompt token by token too, as is done where nothing was generated."""
    model: Path | None = None
    """Model directory, for the text of the tokens and the bytes of an expert; by default the one
    that was traced, if it lies on this machine."""
    expert_mb: float | None = None
    """Size of an expert, in MB, where the model is not on this machine."""

    def __post_init__(self) -> None:
        if not 0 < self.residency <= 1:
            raise ValueError(f"--residency {self.residency}: give a fraction in (0, 1]")
        if not 0 < self.max_tokens <= MOST_TOKENS:
            raise ValueError(
                f"--max_tokens {self.max_tokens}: a page shows 1 to {MOST_TOKENS:,} tokens"
            )
        if self.expert_mb is not None and not self.expert_mb > 0:
            raise ValueError(f"--expert_mb {self.expert_mb}: give a size above 0")
