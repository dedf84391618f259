"""Settings of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field

ROUNDINGS = ("feedback", "weighted", "search", "nearest")
CALIBRATED = ("feedback", "weighted")
"""Those that look at activations; without any they are `search`."""


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """Convert a model's experts to a smaller encoding, at some loss."""

    encoding: str | None = None
    """Round the experts to mxfp4, int4, fp8 or nvfp4: a LOSSY copy, with a report of its loss. By
    default the copy is exact."""
    text: list[str] = field(default_factory=list)
    """With --encoding: text files to measure the loss on. By default, for models with experts of up
    to 1 GiB, the second half of the shipped texts; for larger ones nothing is measured."""
    calibration: list[str] = field(default_factory=list)
    """With --encoding: text files, best others than --text, whose activations say what each weight
    matters. By default as for --text, but the first half."""
    rounding: str = "feedback"
    """With --encoding: feedback (the best; needs a calibration), weighted (a search over scales
    that the calibration weighs), search (without weights; also where there is no calibration), or
    nearest (no search, for comparison)."""
    group: int = 32
    """With --encoding int4: weights that share a scale, 32 or 128."""
    tokens: int = 16384
    """With --encoding: at most so many tokens to calibrate on, and to measure on."""
    device: str | None = None
    """With --encoding: where to round and to measure; by default a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: at least one is needed")
