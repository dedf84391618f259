"""Settings of the CPU benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CpuSettings:
    """Time experts computed on the CPU, beside torch's products and the speed of reading."""

    hidden: int = 2048
    """Width of the model's hidden states."""
    width: int = 1024
    """Rows of an expert's gate projection. The defaults are olmoe-7b's."""
    layers: int = 16
    """Layers of a token, for tokens per second."""
    top_k: int = 8
    """Experts of a token in a layer, and most of one ring."""
    experts: int = 64
    """Experts in memory: so many that no cache holds them."""
    kinds: list[str] = field(
        default_factory=lambda: ["plain", "packed", "mxfp4", "int4", "int4-128", "fp8", "nvfp4"]
    )
    """Encodings: plain and packed bfloat16, mxfp4, int4 (by 32), int4-128, fp8, nvfp4."""
    threads: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 14, 15, 16])
    """Numbers of threads, of which those are run for which there are cores. None: only one core."""
    repeats: int = 3
    """The best of so many runs through all experts counts."""
    out: Path | None = None
    """File for the JSON."""
