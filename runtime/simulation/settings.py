"""The settings of `python -m runtime.simulate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """Replay a trace through every cache policy at several cache sizes."""

    trace: Path
    """Trace directory of a decoder-only model."""
    predictor: Path | None = None
    """ONNX predictor; adds the predicted-reuse policy."""
    residency: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 0.75])
    """Cache sizes, as fractions of all experts."""
    max_tokens: int = 10_000
    """Tokens to replay in all, from documents of every label in turn."""
    document_tokens: int = 512
    """Tokens to replay of one document at most."""
    decode_all: bool = False
    """Replay prompts token by token too. A trace without generated tokens is always replayed so."""
    json: Path | None = None
    """Write the results to this JSON file."""
    plot: Path | None = None
    """Plot hit rates over cache sizes, or those of all contenders, into this image file."""
    all: bool = False
    """Compare every predictor and baseline instead, with prefetching on a modelled link."""
    fit_trace: Path | None = None
    """Trace of other text; makes the hot set, and --all fits the baselines on it."""
    fit_tokens: int = 50_000
    """Tokens of that trace to fit on."""
    more_predictors: list[Path] = field(default_factory=list)
    """With --all: further ONNX predictors, such as the paper's."""
    expert_mb: float = 12.6
    """With --all: size of an expert, in MB."""
    link_gb_s: float = 55.0
    """With --all: bandwidth of the link (PCIe), in GB/s."""
    layer_ms: float = 0.2
    """With --all: time to compute a layer whose experts are resident, in ms."""

    def __post_init__(self) -> None:
        bad = [share for share in self.residency if not 0 < share <= 1]
        if bad or not self.residency:
            raise ValueError(f"residency {bad or 'without a value'}: give fractions in (0, 1]")
        if self.all and self.fit_trace is None:
            raise ValueError("--all needs --fit_trace, a trace to fit the baselines on")

    def predictors(self) -> list[Path]:
        """The paths of all ONNX predictors."""
        return [*filter(None, [self.predictor]), *self.more_predictors]
