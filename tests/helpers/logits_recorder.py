"""A processor of `generate` that keeps the logits of every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class LogitsRecorder(LogitsProcessor):
    """Keeps logits as they are."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.cpu())
        return scores


def with_logits(generate: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What `generate` returns, and the logits [B, N, V] of every new token."""
    recorder = LogitsRecorder()
    tokens = generate(*args, logits_processor=LogitsProcessorList([recorder]), **options)
    return tokens, torch.stack(recorder.logits, 1)
