"""Settings of the throughput benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings:
    """Generate for many requests at once, and compare with what the link allows."""

    trace: Path | None = None
    """Trace directory of the shape's topology, the source of requests and of their routes. Without
    one tokens are random, and routes are drawn."""
    locality: float = 0.45
    """Locality of drawn routes: hit rate of LRU with a quarter of the experts resident."""
    shape: str = "olmoe-7b"
    """Model shape; tiny for a rehearsal."""
    arms: list[str] = field(
        default_factory=lambda: ["bf16 0.25 x384", "mxfp4 0.25 x384", "bf16 1.0 x128"]
    )
    """Arms, each an encoding, the resident share of the experts' bytes or the GPU memory in all
    (as 24GiB), and the sequences in flight (`xauto`: as many as runtime.batch would choose). A last
    word `passes` keeps steps out of CUDA graphs, `arriving` experts from being streamed; `pages`
    reserves keys and values for the requests' mean length, not for the longest of each sequence;
    `spill` does so on the GPU for as many sequences as fit there, in host memory for the others.
    Other systems: `transformers 1.0 x128` (continuous batching), `accelerate 24GiB xauto`
    (offloading, the largest batch that fits)."""
    requests: int = 2000
    """Requests; passages of a trace come again where it has fewer."""
    rival_requests: int = 256
    """Of them, the first ones, which other systems serve."""
    prompt_tokens: list[int] = field(default_factory=lambda: [16, 128])
    """Fewest and most tokens of a prompt."""
    tokens: int = 128
    """New tokens of each request at the most."""
    least_tokens: int | None = None
    """At the least, for requests of mixed lengths; by default they have all of `tokens`."""
    warm_up: int = 256
    """Requests that are served before the clock starts: kernels compile, steps are captured."""
    chunk: int = 8192
    """Most prompt tokens that join a step."""
    arm_seconds: float = 150.0
    """Seconds of an arm after which it ends, wherever it is."""
    budget_seconds: float = 500.0
    """Seconds after which no arm begins."""
    device: str = "cuda"
    """Device that computes; a CPU for a rehearsal."""
    seed: int = 0
    """Seed of the weights and of the lengths."""
    out: Path | None = None
    """File for the JSON, written anew after every arm."""
