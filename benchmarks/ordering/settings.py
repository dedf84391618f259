"""Settings of the benchmark of orderings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class OrderingSettings:
    """Replay recorded texts under several orders of the sequences, and count the loads."""

    trace: Path
    """Trace directory, the source of texts and routes."""
    predictor: Path
    """ONNX predictor of the model that was traced."""
    batches: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 512])
    """Sequences that decode together."""
    orders: list[str] = field(
        default_factory=lambda: ["arrival", "predicted", "true", "twice", "served"]
    )
    """`arrival`: first come, first served. `predicted`: the scheduler's order, among twice as many
    sequences, without ever resting. `true`: the same with the routes that will be taken. `twice`:
    first come, first served, with all of the twice as many at once. `served`: `predicted` as the
    runtime serves, which rests where it does not pay."""
    residency: float = 0.25
    """Share of all experts that is resident."""
    prompt_tokens: int = 16
    """Tokens of a prompt."""
    output_tokens: list[int] = field(default_factory=lambda: [24, 48])
    """Fewest and most new tokens."""
    texts: int = 2000
    """Texts to cut out of the trace at the most; requests take them in turn."""
    steps: int = 200
    """Steps that are counted at the most, after those in which the first sequences end."""
    tokens: int = 24576
    """New tokens after which an order of many sequences needs no further step."""
    shape: str = "olmoe-7b"
    """Model shape whose experts are counted in bytes."""
    link_gb_per_s: float = 55.3
    """GB that the link carries in a second, for the time that saved loads would take."""
    seed: int = 0
    """Seed of lengths and of the order of arrival."""
    out: Path | None = None
    """File for the JSON, written anew after every order."""
