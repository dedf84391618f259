"""Settings of the serving benchmark on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serving.load import TextLoad


@dataclass(frozen=True, kw_only=True)
class ServingSettings(TextLoad):
    """Serve one workload under every scheduler."""

    predictor: Path
    """ONNX predictor of that model."""
    arms: list[str] = field(
        default_factory=lambda: [
            "fifo,policy=lru",
            "fifo",
            "paper",
            "domain-oracle",
            "predicted,rows=8",
            "predicted",
        ]
    )
    """Arms to compare; the others are held against `fifo`."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """Shares of all experts that are resident."""
    dtype: str = "float32"
    """Number format of the model."""
    out: Path | None = None
    """File to append the results to, one JSON line per arm."""
