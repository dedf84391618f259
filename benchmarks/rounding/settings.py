"""Settings of the encodings benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EncodingsSettings:
    """Convert a model under every encoding and rounding, and measure what it costs."""

    model: Path
    """Model directory."""
    text: list[Path]
    """Text files to measure on."""
    calibration: list[Path]
    """Text files to calibrate on, others than those of --text."""
    predictor: Path | None = None
    """ONNX predictor of the model, to replay with."""
    encodings: list[str] = field(default_factory=lambda: ["mxfp4", "int4", "fp8", "nvfp4"])
    """Encodings to try."""
    roundings: list[str] = field(
        default_factory=lambda: ["nearest", "search", "weighted", "feedback"]
    )
    """Roundings to try. The routes of the last are replayed."""
    tokens: int = 32768
    """Tokens to measure on."""
    calibration_tokens: int = 16384
    """Tokens to calibrate on."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Cache sizes of the replay, as fractions of all experts."""
    replay_documents: int = 20
    """Documents of the text to replay, a window each; 0 replays none."""
    device: str = "cpu"
    """Device that rounds and measures."""
    out: Path | None = None
    """File for the JSON."""
