"""Observers of a generation: a clock read once a token, and a recorder of logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Enough(Exception):
    """Ends a generation early; the tokens generated so far count."""


class Clock(BaseStreamer):
    """A clock that is read when a token (of every sequence) has reached the host.

    Raises `Enough` out of `generate` after `max_tokens` tokens, or `max_seconds` after the first.
    """

    def __init__(
        self,
        *,
        on_first: Callable[[], None] = lambda: None,
        on_token: Callable[[], None] = lambda: None,
        max_tokens: int | None = None,
        max_seconds: float = float("inf"),
    ) -> None:
        self._on_first, self._on_token = on_first, on_token
        self._max_tokens, self._max_seconds = max_tokens, max_seconds
        self._has_prompt = False
        self.seconds: list[float] = []
        """perf_counter at each token."""
        self.was_cut = False
        """Whether the clock ended the generation."""
        self.on_first_s = 0.0
        """Duration of `on_first`, which counts in no step."""

    def put(self, value: Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.seconds.append(time.perf_counter())
        self._on_token()
        if len(self.seconds) == 1:
            self._on_first()
            self.on_first_s = time.perf_counter() - self.seconds[0]
        too_long = self.seconds[-1] - self.seconds[0] > self._max_seconds
        self.was_cut = len(self.seconds) == self._max_tokens or too_long
        if self.was_cut:
            raise Enough

    def end(self) -> None:
        """Do nothing."""

    @property
    def step_s(self) -> list[float]:
        """Durations of the decode steps, from token to token."""
        steps = [b - a for a, b in pairwise(self.seconds)]
        if steps:
            steps[0] -= self.on_first_s
        return steps


class LogitsRecorder(LogitsProcessor):
    """A recorder of every step's logits, float32 [B, V] on the CPU."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record `scores` and return them unchanged."""
        self.logits.append(scores.to("cpu", torch.float32, copy=True))
        return scores
