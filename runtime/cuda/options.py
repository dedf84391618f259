"""Options that shape captured steps, and so apply on a GPU only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.sizing.cache_tokens import (
    fewer_than,
    require_cache_tokens,
    require_spill_tokens,
    spilled_of,
)

AUTO = "auto"
"""Let a trial by the clock decide whether to prefetch; compile beside steps that are not."""

LARGEST_BATCH = 32
"""Most sequences of a step in the kernels of few tokens: with more, they would compute more than
they load."""
WIDE_SIZES = 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024
"""Sequences of the captured steps beyond."""


@dataclass(frozen=True, kw_only=True)
class CudaOptions:
    """What `runtime.load` takes for a model on a GPU."""

    context: int = 2048
    """The longest sequence, prompt and generated tokens, that is decoded as captured steps."""
    batch: int = 1
    """The most sequences that are decoded together as captured steps."""
    cache_tokens: int | None = None
    """Tokens of all sequences that the key/value cache has room for; by default batch x context."""
    spill_tokens: int | None = None
    """Further ones, in pages of pinned host memory that the GPU reads in place; by default none."""
    prefetch: bool | str = AUTO
    """Whether to fetch likely experts while the link is idle; "auto" finds out by the clock."""
    cpu_share: bool | str = AUTO
    """Whether the CPU computes some of the experts that a single sequence's step misses; "auto"
    finds out by the clock."""
    compile: bool | str = False
    """Whether to fuse the model's own operations with torch.compile; "auto" does it beside plain
    steps, and takes over from the next generation on."""

    def __post_init__(self) -> None:
        for name in ("prefetch", "cpu_share", "compile"):
            asked: Any = getattr(self, name)
            if asked not in (True, False, AUTO):
                raise ValueError(f"{name}={asked!r} is not one of True, False, 'auto'")
        for name in ("context", "batch"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not a number of at least 1")
        require_cache_tokens(self.cache_tokens, self.context)
        require_spill_tokens(self.spill_tokens, self.cache_tokens)

    @property
    def paged_tokens(self) -> int | None:
        """`cache_tokens` where that is less than every sequence can have of its own."""
        return fewer_than(self.batch * self.context, self.cache_tokens)

    @property
    def spilled_tokens(self) -> int:
        """`spill_tokens`, as far as sequences can make use of them."""
        return spilled_of(self.batch * self.context, self.cache_tokens, self.spill_tokens)

    def accepted(self, why_not: str | None) -> str | None:
        """`why_not`, why there are no captured steps. Raises ValueError for what needs some."""
        if why_not and self.spilled_tokens:
            raise ValueError(
                f"spill_tokens={self.spill_tokens} is for captured steps, but {why_not}; leave it "
                "out"
            )
        return why_not
