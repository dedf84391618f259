"""Serving in tests: tiny offloaded models with a predictor of known answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import runtime
from routing.inspect_model import topology_of
from runtime.engine.engine import Engine
from runtime.prediction.sequence_forecaster import SequenceForecast
from runtime.serving.request import Request, Result
from runtime.serving.sequence import ServedSequence
from tests.helpers.onnx_predictor import write_predictor

SCHEDULERS = ("fifo", "predicted", "paper", "domain-oracle")
SMALL: dict[str, Any] = {"batch": 3, "rows": 6, "context": 64, "chunk": 7, "lookahead": 5}


def prompts(seed: int, count: int, longest: int = 20) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, 256, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def greedy(model: Any, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """What `generate` continues `prompt` with, alone, up to the end of the sequence."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tuple(out[0, len(prompt) :].tolist())


@contextmanager
def offloaded(
    model: nn.Module, folder: Path | None = None, memory: float = 0.5
) -> Iterator[Engine]:
    """The engine of `model`, with the hand-made predictor where a folder for it is given."""
    predictor = None
    if folder is not None:
        predictor = write_predictor(folder / "predictor.onnx", topology_of(model))
    loaded = runtime.load(model, predictor, memory=memory)
    with loaded.expertflow as engine:
        yield engine


def by_id(results: Iterator[Result]) -> dict[str, Result]:
    """Results by request; each request must end once."""
    found: dict[str, Result] = {}
    for result in results:
        assert result.id not in found
        found[result.id] = result
    return found


def sequence(number: int, use_K: np.ndarray | None = None, **request: Any) -> ServedSequence:
    """A job in flight; use_K: the probability that its next token uses each expert."""
    made = ServedSequence(Request(prompt=[0], **request), [0], None, number)
    if use_K is not None:
        unused = 1 - use_K[None].astype(np.float32)
        made.forecast = SequenceForecast(unused, np.stack([unused] * 3), use_K[None], use_K[None])
    return made
