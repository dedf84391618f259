"""Settings of the comparison and of the leaderboard."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.simulation.settings import SimulateSettings


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare every cache rule and predictor on the routes of a trace.

    Prints a table for each cache size, one for the labels, and draws both. docs/protocol.md defines
    the figures and the protocol.
    """

    trace: Path
    """Trace directory of a decoder-only model: recorded, or imported (`expertflow import`)."""
    predictors: list[Path] = field(default_factory=list)
    """ONNX predictors to compare too. They must not have been trained on these documents."""
    fit_trace: Path | None = None
    """Trace to fit the hot set and the other baselines on. Default: the second half of each label's
    documents in the trace, which then are not compared on."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Cache sizes, as fractions of all experts."""
    max_tokens: int = 10_000
    """Tokens to compare on, from documents of every label in turn, in equal shares."""
    document_tokens: int = 512
    """Tokens of one document at most."""
    fit_tokens: int = 50_000
    """Tokens to fit on."""
    detailed: list[str] = field(default_factory=list)
    """Contenders whose figures are printed by label too. Default: the predictors, or else the one
    of highest hit rate below the optimum. --json has all figures of all contenders."""
    cache: Literal["carried", "emptied"] = "carried"
    """Between documents the cache is carried over, as in a server, or emptied."""
    warm_up: int = 0
    """Tokens at the start of the run that are not counted (with --cache emptied: of each
    document)."""
    expert_mb: float = 12.6
    """Size of an expert, in MB."""
    link_gb_s: float = 55.0
    """Bandwidth of the link (PCIe), in GB/s."""
    layer_ms: float = 0.2
    """Time to compute a layer whose experts are resident, in ms."""
    json: Path | None = None
    """Write all figures to this JSON file."""
    plot: Path | None = None
    """File of the picture. Default: comparison.png in the trace's directory."""
    leaderboard: Path | None = None
    """Add the figures to this leaderboard file (.json or .csv), which is made if need be."""
    by: str = "anonymous"
    """Name that the leaderboard gives as their source."""

    def __post_init__(self) -> None:
        self.simulation()  # checks the cache sizes
        for name in ("max_tokens", "document_tokens", "fit_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("expert_mb", "link_gb_s", "layer_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        if self.warm_up < 0:
            raise ValueError(f"--warm_up must not be negative, but is {self.warm_up}")

    def simulation(self, fit_trace: Path | None = None) -> SimulateSettings:
        """The settings of the simulation. fit_trace: the documents to fit on."""
        return SimulateSettings(
            trace=self.trace,
            more_predictors=self.predictors,
            residency=self.residency,
            max_tokens=self.max_tokens,
            document_tokens=self.document_tokens,
            fit_tokens=self.fit_tokens,
            fit_trace=fit_trace,
            expert_mb=self.expert_mb,
            link_gb_s=self.link_gb_s,
            layer_ms=self.layer_ms,
        )

    def protocol(self) -> dict[str, Any]:
        """What figures have to share to be comparable, beside the routes."""
        return {
            "cache": self.cache,
            "warm_up": self.warm_up,
            "expert_mb": self.expert_mb,
            "link_gb_s": self.link_gb_s,
            "layer_ms": self.layer_ms,
        }


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings:
    """Check, merge and print leaderboard files."""

    board: Path
    """The leaderboard, .json or .csv."""
    add: list[Path] = field(default_factory=list)
    """Leaderboards of others, whose entries are added to it."""
    label: str = "all"
    """Label whose entries are printed."""
