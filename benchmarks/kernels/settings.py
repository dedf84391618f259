"""Settings of the kernels benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class KernelsSettings:
    """Time the experts' kernels under several tile sizes, or those of attention."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, or tiny for a rehearsal."""
    encodings: list[str] = field(default_factory=list)
    """Encodings of the experts: mxfp4, fp8, fp8-row, int4, int4-128, int4-32-zeros, nvfp4,
    nvfp4-divides; by default they are plain bfloat16 or, in decoding, packed."""
    prompts: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """Tokens of a prompt."""
    batches: list[int] = field(default_factory=lambda: [1, 8])
    """Sequences that decode together."""
    contexts: list[int] = field(default_factory=list)
    """Tokens that attention is timed over, beside torch's; the experts' kernels are left out."""
    repeats: int = 20
    """Consecutive launches, timed together."""
    device: str = "cuda"
    """Device that runs the kernels; a CPU interprets them, for a rehearsal."""
    out: Path | None = None
    """File for the JSON."""
