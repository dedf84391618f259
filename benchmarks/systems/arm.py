"""An arm of a comparison: one way to run the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

FULL = "1.0"
"""The residency with every expert in GPU memory."""
MIN = "min"
"""The residency of one layer's top-k experts."""
NO_CACHE = "none"
"""The policy of an arm that keeps no expert between calls."""
ONE_GUESS = "one"
"""Prefetching of one expert a layer, of the next layer only: what it is compared with."""
SYSTEMS = ("float32", "transformers", "expertflow", "accelerate", "policylang", "compiled")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the model: a system and its options."""

    system: str
    residency: str = FULL
    """Share of the experts in GPU memory; `min` is one layer's top-k in all; or bytes."""
    policy: str | None = None
    prefetch: bool | str = False
    compile: bool = False
    is_captured: bool = True
    """Whether decode steps are CUDA graphs; else the model's own Python code runs in each."""
    cpu_share: bool = False
    """Whether the CPU computes a share of the missed experts, as the clock finds best."""
    batch: int = 1
    experts: str | None = None
    """Implementation of the experts, one of transformers' own."""
    replays: bool = True
    """Whether it follows the text (and its recorded routes), or generates freely."""

    @property
    def loads_prefetch(self) -> bool | str:
        """What `runtime.load` takes for `prefetch`."""
        return self.prefetch == ONE_GUESS or self.prefetch

    @property
    def name(self) -> str:
        """A few words, unique within a comparison."""
        ahead = "prefetch" if self.prefetch is True else f"prefetch={self.prefetch}"
        words = [
            self.system,
            self.policy,
            self.experts,
            ahead if self.prefetch else None,
            "compile" if self.compile else None,
            None if self.is_captured else "uncaptured",
            "cpu" if self.cpu_share else None,
            self.residency,
            f"x{self.batch}" if self.batch > 1 else None,
        ]
        return " ".join(filter(None, words))


def expertflow_arm(
    policy: str, residency: str, *, prefetch: bool | str = False, batch: int = 1
) -> Arm:
    """An arm of ExpertFlow, not compiled."""
    return Arm(
        system="expertflow", policy=policy, residency=residency, prefetch=prefetch, batch=batch
    )


def check_systems(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not one of `SYSTEMS`."""
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"systems: {name!r} is not one of {', '.join(SYSTEMS)}")


@contextmanager
def decoding_as(arm: Arm) -> Iterator[None]:
    """While active, models prefetch and capture their steps in the arm's way."""
    with ExitStack() as changes:
        if arm.prefetch == ONE_GUESS:
            from runtime.cuda.decode.experts import mover

            changes.enter_context(patch.multiple(mover, DEPTH=1, REACH=1))
        if not arm.is_captured:
            from runtime.cuda.decode.decoder import Decoder

            changes.enter_context(patch.object(Decoder, "objection", lambda _: "as asked for"))
        yield
