"""Settings of `exports.train_moe`. The docstring under a field is its command-line help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from exports.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Architecture):
    """Train a small mixture-of-experts language model."""

    text: Path | None = None
    """Folder to tokenise: DOMAIN.txt and val/DOMAIN.txt, documents divided by `<|endoftext|>`."""
    domains: list[str] = field(default_factory=list)
    """Domains to take from the text folder. Default: all of them."""
    exclude: list[Path] = field(default_factory=list)
    """Folders of .txt files whose documents are never trained on."""
    tokens: Path | None = None
    """Folder of the tokenised text: written with --text, read without it."""
    out: Path | None = None
    """Folder for the trained model."""
    vocab_size: int = 4096
    """Size of the tokenizer's vocabulary."""
    tokens_per_domain: int = 5_000_000
    """Most tokens to take from each domain."""
    context: int = 1024
    """Tokens of a training window, and of the model's longest input."""
    batch: int = 64
    """Windows a step."""
    steps: int = 8000
    """Steps to train for."""
    minutes: float = 60.0
    """Longest time to train for. The learning rate reaches its last value by then, even if steps
    remain."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices between hidden states, AdamW for the rest. It learns more from
    each token, and a step takes a sixth longer on a CPU."""
    balance: float = 0.01
    """Weight of the load-balancing loss."""
    experts: str = "grouped_mm"
    """Implementation of the experts in transformers: grouped_mm, batched_mm or eager."""
    seed: int = 0
    """Seed of the initialisation and of the order of the text."""

    def __post_init__(self) -> None:
        """Refuse settings without an input or an output."""
        super().__post_init__()
        if self.text is None and self.tokens is None:
            raise ValueError("nothing to train on: give --text, or --tokens of an earlier run")
        if self.tokens is None and self.out is None:
            raise ValueError("nothing to write: give --out, or --tokens to tokenise only")
