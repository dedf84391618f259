"""Settings of the loading benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """Measure the time and the memory that loading takes."""

    layers: int = 24
    """MoE layers."""
    experts: int = 128
    """Experts per layer, of 1.5 MiB each; top-8."""
    repeats: int = 3
    """Processes per arm."""
    folder: str | None = None
    """Folder for the checkpoints; by default the system's temporary directory."""
    arm: str | None = None
    """Run only this arm, in this process."""
    keep: bool = False
    """Keep the checkpoints, and use existing ones."""
