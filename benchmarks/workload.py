"""Generating after prompts, timed: time to the first token, each step, and the bytes of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.forced_text import Enough, ForcedText, synchronize
from benchmarks.passages import Passages
from benchmarks.replayed_routes import ReplayedRoutes


class Counts(NamedTuple):
    """What the engine counted up to a moment."""

    hits: int
    misses: int
    bytes_loaded: int
    bytes_wasted: int

    def minus(self, before: Counts) -> Counts:
        """What was counted since."""
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Counts(0, 0, 0, 0)


@dataclass(kw_only=True)
class Timings:
    """Of one or several passages."""

    first_token_s: list[float] = field(default_factory=list)
    """From the call to the logits of the prompt."""
    step_s: list[float] = field(default_factory=list)
    """Decode steps, from logits to logits."""
    decode_s: float = 0.0
    """From the prompt's logits to the last token, everything included."""
    prefill: Counts = NOTHING
    decode: Counts = NOTHING

    @property
    def steps(self) -> int:
        """Decode steps."""
        return len(self.step_s)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How to generate on a model that is set up: the same for every arm.

    Raises RuntimeError when the replayed routes fell out of step with the tokens.
    """

    device: torch.device
    prompt: int
    """Tokens of a prompt; the others of a passage are generated."""
    routes: ReplayedRoutes | None
    """Routes to replay; None leaves them to the model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of generate."""
    counts: Callable[[], Counts] = lambda: NOTHING
    max_seconds: float = 60.0
    """Of decoding one passage, which ends early then."""

    def run(self, model: Any, passages: Passages, timings: Timings) -> None:
        """Generate the passages' tokens after their prompt and add to `timings`."""
        before, at_first = self.counts(), list[Counts]()
        forced = self._forced(
            passages,
            on_first=lambda: at_first.append(self.counts()),
            max_seconds=self.max_seconds,
        )
        start = time.perf_counter()
        self._generate(model, passages, forced)
        synchronize(self.device)
        end, seconds, after = time.perf_counter(), forced.seconds, self.counts()
        timings.first_token_s.append(seconds[0] - start)
        timings.step_s += [b - a for a, b in pairwise(seconds)]
        timings.decode_s += end - seconds[0]
        timings.prefill = timings.prefill.plus(at_first[0].minus(before))
        timings.decode = timings.decode.plus(after.minus(at_first[0]))

    def logits(self, model: Any, passages: Passages, steps: int) -> Tensor:
        """Logits of the first `steps` steps (float32 [steps, B, V], on the CPU)."""
        forced = self._forced(passages, keep_logits=True, max_steps=steps)
        self._generate(model, passages, forced)
        return torch.stack(forced.logits)

    def warm_up(self, model: Any, passages: Passages, steps: int) -> float:
        """Run a few steps for what happens but once; returns the seconds that took."""
        start = time.perf_counter()
        self._generate(model, passages, self._forced(passages, max_steps=steps))
        synchronize(self.device)
        return time.perf_counter() - start

    def _forced(self, passages: Passages, **options: Any) -> ForcedText:
        return ForcedText(passages.token_ids_BT.to(self.device), self.prompt, **options)

    def _generate(self, model: Any, passages: Passages, forced: ForcedText) -> None:
        if self.routes is not None:
            self.routes.start(passages)
        prompt_BT = passages.token_ids_BT[:, : self.prompt].to(self.device)
        with suppress(Enough):
            model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                max_new_tokens=passages.token_ids_BT.shape[1] - self.prompt,
                do_sample=False,
                logits_processor=[forced],
                **self.options,
            )
        ran = self.prompt + len(forced.seconds) - 1
        if self.routes is not None and self.routes.position != ran:
            raise RuntimeError(f"{ran} tokens ran, but {self.routes.position} routes were replayed")
