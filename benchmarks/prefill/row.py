"""Rows of the prefill benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.systems.row import ArmRow


@dataclass(kw_only=True)
class PrefillRow(ArmRow):
    """The result of one arm at one prompt length. A field that does not apply is None."""

    prompt: int
    milliseconds: float | None = None
    """Median over the prompts, from the call of generate to the logits of the last token."""
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    missing_bytes: float | None = None
    """Mean over the prompts: bytes of experts that were missing."""
    wasted_bytes: float | None = None
    """Mean over the prompts: bytes of experts that were prefetched and not needed."""
    link_ms: float | None = None
    """Missing bytes / measured bandwidth, in milliseconds."""
    compute_ms: float | None = None
    """Milliseconds for the same prompts with every expert resident."""
    ratio: float | None = None
    """Time / the larger of link_ms and compute_ms."""

    @property
    def recording(self) -> str:
        """The name of its lanes in the result file."""
        return f"{self.arm.name}, prompt {self.prompt}"

    same_logits: bool | None = None
    """Whether the first token's logits are those with every expert resident, bit for bit."""
