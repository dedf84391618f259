"""The settings of `python -m predictor.layer_ahead`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LayerAheadSettings:
    """Train small networks from each layer's router input to the experts of coming layers."""

    model: str
    """The traced Hugging Face model: a directory or an id on the Hub."""
    trace: list[Path]
    """Trace directories with the text to train on."""
    annotate: list[Path]
    """Trace directories of other text, to be copied with the networks' predictions."""
    out: Path
    """Directory of the copies."""
    depth: int = 3
    """Predict this many layers ahead."""
    width: int = 512
    """Hidden width of each network; 0 leaves the linear path alone, after crystal-ball."""
    passes: int = 1
    """Passes over the training text."""
    batch_tokens: int = 512
    """Tokens in a training step."""
    model_tokens: int = 8192
    """Tokens that the model runs at once, not counting padding."""
    learning_rate: float = 6e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""
    device: str = "cpu"
    """Device of the model and the networks."""

    def __post_init__(self) -> None:
        for name in ("depth", "passes", "batch_tokens", "model_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.width < 0:
            raise ValueError(f"--width must be at least 0, not {self.width}")
        if not self.trace or not self.annotate:
            raise ValueError("--trace and --annotate each need a trace directory")
        seen = {path.resolve() for path in self.trace}
        for path in self.annotate:
            if path.resolve() in seen:
                raise ValueError(f"{path} is both trained on and annotated: name other text")
