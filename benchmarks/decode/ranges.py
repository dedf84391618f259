"""Decoding of several sequences with a layer's experts in one, two, four and eight ranges.

    python -m benchmarks.decode.ranges --batches 8 32

Rows are those of `benchmarks.decode`: their logits are compared with those of one range, whose bits
they have to be. What a further range costs is `RANGE_BYTES` in `decode/experts/ranges.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.decode.settings import DecodeSettings
from routing.cli import run

if TYPE_CHECKING:
    from runtime.cuda.decode.experts.ranges import Range


@dataclass(frozen=True, kw_only=True)
class RangesSettings(DecodeSettings):
    """Compare numbers of ranges in which captured steps run a layer's experts."""

    routes: Literal["model", "even"] = "even"
    """The random router's routes, which hardly change from token to token, or drawn evenly."""
    policies: list[str] = field(default_factory=lambda: ["reuse"])
    """Cache policies."""
    counts: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of ranges."""
    tokens: int = 32
    """Tokens to generate after the prompt."""
    check_steps: int = 4
    """Steps whose logits are compared."""


def main(settings: RangesSettings) -> None:
    """Run every batch size under every policy in every number of ranges."""
    from unittest.mock import patch

    import torch

    from benchmarks.common.machine import machine
    from benchmarks.decode.runner import DecodeRunner
    from benchmarks.systems.arm import expertflow_arm
    from benchmarks.systems.subject import Subject
    from runtime.cuda.decode import decoder

    device = torch.device(settings.device)
    subject = Subject(
        settings.shape, device, trace=settings.trace, predictor=settings.predictor,
        routes=settings.routes, seed=settings.seed,
    )  # fmt: skip
    print(machine(device))
    runner = DecodeRunner(settings, subject)
    for batch in settings.batches:
        for policy in settings.policies:
            arm = expertflow_arm(policy, settings.compare_at, batch=batch)
            for count in settings.counts:
                with patch.object(decoder, "choose_ranges", partial(always, count)):
                    print(f"in {count} ranges:")
                    runner.run(arm)


def always(count: int, num_experts: int, num_parts: int, *_: Any, **__: Any) -> list[Range]:
    """That many ranges, in place of `choose_ranges`."""
    from runtime.cuda.decode.experts.ranges import ranges

    return ranges(num_experts, num_parts, count)


if __name__ == "__main__":
    run(main, RangesSettings, prog="python -m benchmarks.decode.ranges")
