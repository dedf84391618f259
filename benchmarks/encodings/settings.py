"""Settings of the benchmark of encodings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """Compare encodings of the experts at equal GPU memory."""

    shapes: list[str] = field(
        default_factory=lambda: [
            "olmoe-7b", "gpt-oss-20b", "gpt-oss-120b", "qwen3-30b-a3b", "mixtral-8x7b"
        ]
    )  # fmt: skip
    """Model shapes, in the order in which they run; tiny and tiny-gpt-oss for a rehearsal."""
    encodings: list[str] = field(default_factory=list)
    """Run only the arms of these encodings: mxfp4, int4, int4-128, nvfp4, fp8, bf16. Default: all
    of a shape."""
    only: list[str] = field(default_factory=list)
    """Run only the arms with these names, as the table prints them."""
    memory: str | None = None
    """GPU memory of the rows of equal memory, as 4.2GiB. Default: a size for each shape."""
    trace: Path | None = None
    """Trace directory, the source of text and routes for the shapes of its topology."""
    predictor: Path | None = None
    """ONNX predictor of the model that was traced, for the same shapes."""
    localities: list[float] = field(default_factory=lambda: [0.45, 0.3, 0.7])
    """Localities of drawn routes, where no trace fits: hit rates of LRU with a quarter of the
    experts resident. Rows that are not about locality take the first."""
    compile: bool = True
    """Run the arms with torch.compile, each of which warms up for 24 to 60 seconds."""
    prompt: int = 32
    """Tokens of a prompt."""
    tokens: int = 128
    """Tokens to generate after it."""
    documents: int = 3
    """Prompts of an arm, one after the other."""
    check_steps: int = 32
    """Steps whose logits are compared between residencies."""
    arm_seconds: float = 20.0
    """Seconds of an arm after which no further prompt begins; also the limit on one prompt."""
    budget_seconds: float = 540.0
    """Seconds of the whole run. An arm that would probably end later does not begin."""
    device: str = "cuda"
    """Device that computes. A CPU runs the arms that are not compiled, in decoded slots."""
    seed: int = 0
    """Seed of the weights."""
    out: Path | None = None
    """File for the JSON, written anew after every arm."""
