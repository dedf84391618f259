"""The settings of `python -m predictor.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Score exported predictors and baselines on held-out documents of a trace."""

    trace: Path
    """Trace directory to score on."""
    predictors: list[Path] = field(default_factory=list)
    """ONNX files of predictor.export."""
    fit_trace: Path | None = None
    """Trace to fit the baselines on; then every document of `trace` is held out."""
    stack: str = "decoder"
    """Stack of MoE layers to score."""
    horizon: int = 4
    """Tokens that the horizon head looks ahead, where no predictor is given."""
    max_tokens: int = 100_000
    """Score on about this many tokens."""
    max_fit_tokens: int = 2_000_000
    """Fit the baselines on about this many tokens."""
    json: Path | None = None
    """Write all figures, including those of each layer, to this JSON file."""
    plot: Path | None = None
    """Draw the recall of each layer into this PNG file."""
