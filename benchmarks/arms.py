"""Arms of a comparison: a way to run the model, and what came of it as one row.

An arm that fails costs its row and nothing else: the row then says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import runtime
from benchmarks.placement import restored
from benchmarks.replay import CHOSEN_LOGIT
from benchmarks.workload import NOTHING, Counts

MIN = "min"
NO_CACHE = "none"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to run the model."""

    system: str
    residency: str = "1.0"
    """Share of the experts in GPU memory; `min` is one layer's top-k in all; or bytes."""
    policy: str | None = None
    prefetch: bool | str = False
    compile: bool = False
    batch: int = 1
    experts: str | None = None
    """Implementation of the experts, of transformers' own."""
    replays: bool = True
    """Whether it follows the text, and the routes where they are recorded, or goes its own way."""

    @property
    def name(self) -> str:
        """In a few words."""
        ahead = "prefetch" if self.prefetch is True else f"prefetch={self.prefetch}"
        words = [
            self.system,
            self.policy,
            self.experts,
            ahead if self.prefetch else None,
            "compile" if self.compile else None,
            self.residency,
            f"x{self.batch}" if self.batch > 1 else None,
        ]
        return " ".join(filter(None, words))


@dataclass(kw_only=True)
class ArmRow:
    """What came of an arm. None is what does not apply."""

    arm: Arm
    error: str | None = None
    """Why there is nothing else here."""

    def to_json(self) -> dict[str, Any]:
        """With the arm's own fields beside the others, and its name."""
        values = asdict(self)
        return {"name": self.arm.name} | values.pop("arm") | values


@dataclass(kw_only=True)
class Row(ArmRow):
    """What came of decoding under an arm."""

    note: str | None = None
    load_s: float | None = None
    """Setting the model up that way."""
    warm_up_s: float | None = None
    """The first few steps: what is captured or compiled."""
    total_s: float | None = None
    """The whole arm."""
    first_token_ms: float | None = None
    """Median time to the first token."""
    tokens_per_s: float | None = None
    """Decoded tokens of all sequences over the whole time of decoding."""
    step_ms: float | None = None
    """Mean time of a decode step, everything included."""
    step_ms_median: float | None = None
    steps: int | None = None
    peak_bytes: int | None = None
    """Most GPU memory allocated at once (torch.cuda.max_memory_allocated)."""
    held_bytes: int | None = None
    """GPU memory that was allocated before the arm began, and counts in its peak."""
    slots: int | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    """Moved to the device for a decoded token, wasted prefetches included."""
    wasted_per_token: float | None = None
    link_efficiency: float | None = None
    """Needed bytes, as they cross the link / (measured bandwidth x step time)."""
    delivered: float | None = None
    """The same with the bytes of the experts as the model has them: above 1 is faster than the link
    could be without packing."""
    floor_ms: float | None = None
    """Time that the link alone takes for the needed bytes of a step."""
    recall: float | None = None
    prediction_ms: float | None = None
    decode_path: str | None = None
    logits: dict[str, str] = field(default_factory=dict)
    """How the logits compare with the first arm's of a system, see `compare_logits`."""
    extra: dict[str, Any] = field(default_factory=dict)


class Running(NamedTuple):
    """A model set up as an arm wants it."""

    options: dict[str, Any]
    """Further arguments of generate."""
    counts: Callable[[], Counts] = lambda: NOTHING
    reset: Callable[[], None] = lambda: None
    """Count anew: the warm-up is over."""
    finish: Callable[[Row], None] = lambda row: None
    """Adds to the row what only this system knows."""


SetUp = Callable[[], AbstractContextManager[Running]]


def run_arm(arm: Arm, model: Any, set_up: SetUp, measure: Callable[[Running, Row], None]) -> Row:
    """Set the model up, measure, and put the model back; errors go into the row."""
    row, start = Row(arm=arm), time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        row.held_bytes = torch.cuda.memory_allocated()
    try:
        with restored(model, experts=arm.system != "expertflow"), set_up() as running:
            row.load_s = time.perf_counter() - start
            measure(running, row)
            running.finish(row)
            if torch.cuda.is_available():
                row.peak_bytes = torch.cuda.max_memory_allocated()
    except Exception as error:  # one arm of many: the others still count
        row.error = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    row.total_s = time.perf_counter() - start
    return row


@contextmanager
def offloaded(model: Any, **options: Any) -> Iterator[Running]:
    """Our engine; `options` go to `runtime.load`."""
    with runtime.load(model, **options).expertflow as engine:
        yield Running(
            {},
            counts=lambda: read_counts(engine.stats()),
            reset=lambda: engine.stats().reset(),
            finish=lambda row: _finish(engine, row),
        )
        engine.check_integrity()


def _finish(engine: Any, row: Row) -> None:
    stats = engine.stats()
    row.slots = stats.num_slots
    row.recall, row.prediction_ms = known(stats.recall), known(stats.prediction_ms_median)
    row.decode_path = engine.decode_path
    row.extra["resident_share"] = stats.num_slots / stats.total_experts
    row.extra["packing"] = stats.packing
    row.extra["prefetching"] = engine.prefetching
    if row.link_efficiency is not None:
        row.delivered = row.link_efficiency / stats.packing


def read_counts(stats: Any) -> Counts:
    """The engine's counters as they are now."""
    return Counts(
        stats.hits,
        stats.misses + int(stats.late_L.sum()),
        stats.bytes_loaded - stats.bytes_prefetched,
        stats.bytes_prefetched,
        stats.bytes_wasted,
    )


def known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if value != value else value


def compare_logits(logits: Tensor, reference: Tensor) -> str:
    """`identical`, or the largest difference relative to the largest logit, and the same argmax.

    The logit of the text's next token, which the replay set, is left out.
    """
    if torch.equal(logits, reference):
        return "identical"
    ours, theirs = (x.masked_fill(x == CHOSEN_LOGIT, 0.0) for x in (logits, reference))
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    agreeing = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return f"{worst:.1e}, argmax {agreeing:.0%}"
