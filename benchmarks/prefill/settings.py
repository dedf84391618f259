"""Settings of the prefill benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PrefillSettings:
    """Measure prefill with a model whose experts do not fit."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b, or tiny for a rehearsal."""
    trace: Path | None = None
    """Trace directory of the same topology, the source of text and routes. Default: random tokens,
    routed by the random router."""
    systems: list[str] = field(default_factory=lambda: ["expertflow", "transformers", "accelerate"])
    """Systems to run: expertflow, transformers (all resident), accelerate (experts on the CPU)."""
    residency: list[str] = field(default_factory=lambda: ["0.25", "min"])
    """Shares of the experts in GPU memory, as in benchmarks.decode; `1.0` always runs first."""
    policy: str = "lru"
    """Cache policy of every arm of ours but `min`, which keeps nothing."""
    prefetch: bool = True
    """Whether the next layer's likely experts are sent ahead, as by default."""
    prompts: list[int] = field(default_factory=lambda: [32, 512, 2048])
    """Prompt lengths, in tokens."""
    batch: int = 1
    """Prompts that run together."""
    repeats: int = 5
    """Different prompts of each length, after one that is not timed."""
    profile: int = 0
    """Length of a prompt to be profiled with every expert resident: the host's time by operation,
    and the launches of a layer. 0 for none."""
    budget_seconds: float = 200.0
    """Seconds after which no arm begins."""
    device: str = "cuda"
    """Device that computes. On a CPU only the arms that can run there do."""
    seed: int = 0
    """Seed of the weights."""
    out: Path | None = None
    """File for the JSON."""
    plots: Path | None = None
    """Folder for the plot."""
