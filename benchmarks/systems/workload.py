"""Timed generation: time to the first token, time of each step, and bytes moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.replay.passages import Passages
from benchmarks.replay.text_replay import TextReplay
from benchmarks.systems.clock import Clock, Enough, LogitsRecorder
from benchmarks.systems.counts import NOTHING, Counts


@dataclass(kw_only=True)
class Timings:
    """Timings and counts of one or several passages."""

    first_token_s: list[float] = field(default_factory=list)
    """From the call of generate to the first token on the host."""
    step_s: list[float] = field(default_factory=list)
    """Decode steps, from token to token; nothing is left out."""
    prefill: Counts = NOTHING
    decode: Counts = NOTHING


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Generation on a model that is set up, the same for every arm.

    Raises RuntimeError when the replayed text and the model are at different positions.
    """

    device: torch.device
    prompt: int
    """Tokens of a prompt; the rest of a passage is generated."""
    replay: TextReplay | None
    """None: the model generates freely after the prompt."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of generate."""
    counts: Callable[[], Counts] = lambda: NOTHING
    max_seconds: float = 60.0
    """Limit on decoding one passage, which then ends early."""

    def run(self, model: Any, passages: Passages, timings: Timings) -> None:
        """Generate the passages after their prompt and add to `timings`."""
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
        """Logits of the first `tokens` steps, float32 [tokens, B, V] on the CPU."""
        recorder, clock = LogitsRecorder(), Clock(max_tokens=tokens)
        self._generate(model, passages, clock, logits_processor=[recorder])
        self._check_position(clock)
        return torch.stack(recorder.logits)

    def warm_up(self, model: Any, passages: Passages, tokens: int) -> float:
        """Run a few steps, untimed by the benchmark; returns the seconds they took."""
        start = time.perf_counter()
        self._generate(model, passages, Clock(max_tokens=tokens))
        return time.perf_counter() - start

    def follow(
        self, model: Any, passages: Passages, tokens: int, on_token: Callable[[], None]
    ) -> None:
        """Run a few steps, untimed; `on_token` is called as each token arrives."""
        self._generate(model, passages, Clock(max_tokens=tokens, on_token=on_token))

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
        """Compare with the replay. If the clock cut generation, one more step may have begun."""
        ran = self.prompt + len(clock.seconds) - 1
        if self.replay is not None and self.replay.position - ran not in (0, int(clock.was_cut)):
            raise RuntimeError(f"{ran} tokens ran, but {self.replay.position} were replayed")
