"""Settings of the benchmark of compiled steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CompilingSettings:
    """Time compiled decode steps, and compare their numbers with those of plain ones."""

    shape: str = "olmoe-7b"
    """The model's shape, of `benchmarks.common.shapes`."""
    encoding: str = "mxfp4"
    """How its experts are stored."""
    memory: str = "1.0"
    """Share of the experts that is resident."""
    tokens: int = 128
    """Tokens of a generation."""
    layers: int = 4
    """Layers of the models whose logits are compared."""
    context: int = 512
    """Tokens that the key/value cache has room for."""
    arm: str | None = None
    """Run only this arm, in this process and with the caches that are there."""
