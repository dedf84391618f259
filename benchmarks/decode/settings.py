"""Settings of the decode benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Compare ways to decode with a model whose experts do not fit."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b, deepseek-v2-lite, granite-4-h-tiny, or
    tiny for a rehearsal."""
    trace: Path | None = None
    """Trace directory of the same topology, the source of text and routes. Default: random tokens,
    routed by the random router."""
    routes: Literal["model", "even"] = "model"
    """Routes without a trace: the random router's, which hardly change from token to token, or
    drawn evenly, which is hardest for a cache."""
    predictor: Path | None = None
    """ONNX predictor of the model that was traced."""
    systems: list[str] = field(
        default_factory=lambda: [
            "float32", "transformers", "expertflow", "accelerate", "policylang", "compiled"
        ]
    )  # fmt: skip
    """Systems to run: float32 (transformers in float32, the reference for the others' logits),
    transformers (all resident), compiled (transformers with a static cache and compilation),
    accelerate (experts on the CPU), policylang (moe-policylang), expertflow."""
    residency: list[str] = field(default_factory=lambda: ["1.0", "0.25", "0.5", "0.125", "min"])
    """Shares of the experts' bytes in GPU memory. `min` is one layer's top-k. `6.28%` is a share of
    the whole model's bytes, and `2GiB` a size, for everything in GPU memory."""
    policies: list[str] = field(default_factory=lambda: ["predicted", "lru", "lfu", "belady"])
    """Cache policies. Batches and prefetching are measured with the first usable one and with lru:
    predicted needs a predictor, belady a trace."""
    only: list[str] = field(default_factory=list)
    """Run only the arms with these names, as the table prints them."""
    compare_at: str = "0.25"
    """The residency at which prefetching, batches and moe-policylang are measured."""
    batches: list[int] = field(default_factory=lambda: [8, 32])
    """Batch sizes beside 1: sequences that decode together."""
    prompt: int = 32
    """Tokens of a prompt."""
    tokens: int = 128
    """Tokens to generate after it."""
    documents: int = 3
    """Prompts at batch 1, one after the other; larger batches run one each."""
    check_steps: int = 32
    """Steps whose logits are compared between arms."""
    arm_seconds: float = 30.0
    """Seconds of an arm after which no further prompt begins; also the limit on one prompt."""
    slow_seconds: float = 10.0
    """Decoding time of accelerate and moe-policylang, which take seconds per token."""
    budget_seconds: float = 300.0
    """Seconds after which no arm begins; arms run in order of importance."""
    device: str = "cuda"
    """Device that computes. On a CPU only the arms that can run there do."""
    seed: int = 0
    """Seed of the weights."""
    out: Path | None = None
    """File for the JSON."""
    plots: Path | None = None
    """Folder for the plots."""
