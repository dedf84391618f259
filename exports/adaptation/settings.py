"""The settings of `expertflow adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from predictor.adaptation.settings import AdaptationSettings


@dataclass(frozen=True, kw_only=True)
class AdaptSettings(AdaptationSettings):
    """Train a predictor further on recorded routes, and write it only if it became better."""

    out: Path
    """ONNX file to write; an existing one is replaced."""
    predictor: Path | None = None
    """ONNX file to start from. By default the one that ships for the trace's model."""
    simulated_tokens: int = 2000
    """Compare hit rates on this many held-out tokens."""
    json: Path | None = None
    """Write all figures to this JSON file."""
