"""Generating after prompts, timed: time to the first token, each step, and the bytes of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.clock import Clock, Enough, LogitsRecorder
from benchmarks.passages import Passages
from benchmarks.replay import Replay


class Counts(NamedTuple):
    """What the engine counted up to a moment."""

    hits: int
    misses: int
    bytes_loaded: int
    """Of missing experts."""
    bytes_prefetched: int
    bytes_wasted: int
    """Prefetched and then not needed."""

    @property
    def bytes_moved(self) -> int:
        """To the device, for whatever reason."""
        return self.bytes_loaded + self.bytes_prefetched

    @property
    def bytes_needed(self) -> int:
        """Moved, without what was wasted."""
        return self.bytes_moved - self.bytes_wasted

    def minus(self, before: Counts) -> Counts:
        """What was counted since."""
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Counts(0, 0, 0, 0, 0)


@dataclass(kw_only=True)
class Timings:
    """Of one or several passages."""

    first_token_s: list[float] = field(default_factory=list)
    """From the call to the first token on the host."""
    step_s: list[float] = field(default_factory=list)
    """Decode steps, from token to token; everything is in one of them."""
    prefill: Counts = NOTHING
    decode: Counts = NOTHING


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How to generate on a model that is set up: the same for every arm.

    Raises RuntimeError when the replayed text fell out of step with the model.
    """

    device: torch.device
    prompt: int
    """Tokens of a prompt; the others of a passage are generated."""
    replay: Replay | None
    """None: the model goes its own way after the prompt."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of generate."""
    counts: Callable[[], Counts] = lambda: NOTHING
    max_seconds: float = 60.0
    """Of decoding one passage, which ends early then."""

    def run(self, model: Any, passages: Passages, timings: Timings) -> None:
        """Generate the passages' tokens after their prompt and add to `timings`."""
        before, at_first = self.counts(), list[Counts]()
        clock = Clock(on_first=lambda: at_first.append(self.counts()), max_seconds=self.max_seconds)
        start = time.perf_counter()
        self._generate(model, passages, clock)
        timings.first_token_s.append(clock.seconds[0] - start)
        timings.step_s += clock.step_s
        timings.prefill = timings.prefill.plus(at_first[0].minus(before))
        timings.decode = timings.decode.plus(self.counts().minus(at_first[0]))
        self._check_position(clock)

    def logits(self, model: Any, passages: Passages, tokens: int) -> Tensor:
        """Logits that the first `tokens` tokens were chosen by (float32 [tokens, B, V], CPU)."""
        recorder, clock = LogitsRecorder(), Clock(max_tokens=tokens)
        self._generate(model, passages, clock, logits_processor=[recorder])
        self._check_position(clock)
        return torch.stack(recorder.logits)

    def warm_up(self, model: Any, passages: Passages, tokens: int) -> float:
        """Run a few steps for what happens but once; returns the seconds that took."""
        start = time.perf_counter()
        self._generate(model, passages, Clock(max_tokens=tokens))
        return time.perf_counter() - start

    def _generate(self, model: Any, passages: Passages, clock: Clock, **options: Any) -> None:
        if self.replay is not None:
            self.replay.start(passages)
        prompt_BT = passages.token_ids_BT[:, : self.prompt].to(self.device)
        with suppress(Enough):
            model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                max_new_tokens=passages.token_ids_BT.shape[1] - self.prompt,
                do_sample=False,
                streamer=clock,
                **options,
                **self.options,
            )

    def _check_position(self, clock: Clock) -> None:
        """Where the clock ended it, one more step may have been under way."""
        ran = self.prompt + len(clock.seconds) - 1
        if self.replay is not None and self.replay.position - ran not in (0, int(clock.was_cut)):
            raise RuntimeError(f"{ran} tokens ran, but {self.replay.position} were replayed")
