"""`generate` on a given text: the next token is the text's, whatever the model would choose.

Every arm then runs the same tokens (and, replayed, the same routes), and the clock is read once a
step. What the model would have chosen can be kept, to compare arms.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Enough(Exception):
    """Ends a generation early; the steps that ran count."""


class ForcedText(LogitsProcessor):
    """Forces the tokens after the first `prompt` of a text, int64 [B, T] on the model's device.

    Raises `Enough` out of `generate` once the logits of `max_steps` steps came or `max_seconds`
    passed since the first. (A stopping criterion would cost every arm kernels in every step.)
    """

    def __init__(
        self,
        token_ids_BT: Tensor,
        prompt: int,
        *,
        on_first: Callable[[], None] = lambda: None,
        keep_logits: bool = False,
        max_steps: int | None = None,
        max_seconds: float = float("inf"),
    ) -> None:
        self._token_ids_BT = token_ids_BT
        self._next = prompt
        self._on_first = on_first
        self._keep_logits = keep_logits
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self.seconds: list[float] = []
        """Clock (perf_counter) when the logits of each step came; the first waits for them."""
        self.logits: list[Tensor] = []
        """float32 [B, V] on the CPU, of each step, where they are kept."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """One step: read the clock, put the text's next token on top."""
        if not self.seconds:
            synchronize(scores.device)
            self._on_first()
        self.seconds.append(time.perf_counter())
        if self._keep_logits:
            self.logits.append(scores.to("cpu", torch.float32, copy=True))
        if len(self.seconds) == self._max_steps or self._elapsed() > self._max_seconds:
            raise Enough
        column_B1 = self._token_ids_BT[:, self._next : self._next + 1]
        self._next += 1
        return scores.scatter_(1, column_B1, float("inf"))

    def _elapsed(self) -> float:
        return self.seconds[-1] - self.seconds[0]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where that is not the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
