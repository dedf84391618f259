"""Settings of the benchmark of the open page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

VIEWERS = ("nobody", "stream", "page", "chat")


@dataclass(frozen=True, kw_only=True)
class LivePageSettings:
    """Generate one text after another, watched by one viewer after another, by turns."""

    model: Path
    """Model directory."""
    predictor: Path
    """ONNX predictor of that model."""
    memory: float = 0.25
    """Share of the experts that is resident."""
    viewers: list[str] = field(default_factory=lambda: list(VIEWERS))
    """`nobody`; `stream`: a client that reads the events and drops them; `page`: headless Chromium
    with the page, while a client asks; `chat`: the same, and the page itself asks."""
    rounds: int = 8
    """Turns of each viewer; one more before them is not counted."""
    tokens: int = 300
    """Tokens of a text."""
    prompt: str = "The history of the city begins with"
    """What every text begins with."""
    threads: int = 0
    """OMP_NUM_THREADS of the server; 0 leaves it to torch."""
    chromium: str = "chromium"
    """The browser's command."""
    screenshot: Path | None = None
    """PNG file for the page in the middle of a chat (needs `chat`)."""
    out: Path | None = None
    """File for the JSON."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.viewers if name not in VIEWERS]
        if unknown:
            raise ValueError(f"viewers: {', '.join(unknown)}: there are {', '.join(VIEWERS)}")
        if self.rounds < 1 or self.tokens < 2:
            raise ValueError("give at least one round of two tokens")
