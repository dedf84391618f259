"""An exported predictor, run over whole documents by onnxruntime and timed.

Symbols: T tokens, L MoE layers, E experts a layer, K experts a token.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.driver import Heads, Past, run_step, run_window
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.topology import NO_EXPERT

CHUNK = 128
"""Tokens that a predictor with a key/value cache reads at a time."""
TIMED_STEPS = 30
"""Decode steps whose median time is reported."""


class ExportedPredictor(ABC):
    """An opened predictor file. Calling it predicts one document, a batch of one row."""

    needs_history: ClassVar[bool]
    """Whether it reads the true routes of earlier tokens."""

    def __init__(self, path: Path, file: PredictorFile) -> None:
        self.path, self.file = path, file
        self.topology, self.stack = file.topology, file.stack
        self.shape = PredictorShape.of(
            file.topology, file.stack.name, window=file.window, horizon=file.horizon
        )

    @abstractmethod
    def __call__(self, batch: Windows) -> Predictions:
        """Logits of every token of the document, float32 [1, T, L, E] a head."""

    @abstractmethod
    def decode_step(self) -> Callable[[], object]:
        """A function that runs one decode step after a full window."""

    def step_seconds(self) -> float:
        """Median seconds of a decode step: batch 1, full window, one thread."""
        step, seconds = self.decode_step(), []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


class CachedPredictor(ExportedPredictor):
    """Reads a document in chunks, with a key/value cache, as the runtime does."""

    needs_history = True

    def __call__(self, batch: Windows) -> Predictions:
        past, chunks = Past(self.file, 1), []
        size = min(CHUNK, self.shape.window)
        for start in range(0, batch.token_ids_BT.shape[1], size):
            span = slice(start, start + size)
            heads = run_step(
                self.file,
                past,
                batch.token_ids_BT[:, span].numpy(),
                batch.routes_BTLK[:, span].long().numpy(),
                batch.positions_BT[:, span].numpy(),
            )
            chunks.append(heads)
        return _joined(chunks)

    def decode_step(self) -> Callable[[], object]:
        shape, past = self.shape, Past(self.file, 1)
        past.positions[:] = np.arange(shape.window)
        routes = np.zeros((1, 1, shape.num_layers, shape.top_k), np.int64)
        token_ids, positions = np.zeros((1, 1), np.int64), np.full((1, 1), shape.window, np.int64)
        return partial(run_step, self.file, past, token_ids, routes, positions)


class StatelessPredictor(ExportedPredictor):
    """Runs over the first window; then, repeatedly, over its last half and as many new tokens.

    `prompt_lengths` of the batch gives the length of the document's prompt. A prompt that is empty
    or fills the first window counts as half of it. Each later half window is predicted with the
    one before it as the prompt.
    """

    needs_history = False

    def __call__(self, batch: Windows) -> Predictions:
        window, num_tokens = self.shape.window, batch.token_ids_BT.shape[1]
        chunks = [self._run(batch, 0, window, self.first_generated(batch))]
        for start in range(window, num_tokens, window - window // 2):
            stop = start + window - window // 2
            heads = self._run(batch, start - window // 2, stop, window // 2)
            chunks.append([head[:, window // 2 :] for head in heads])
        return _joined(chunks)

    def first_generated(self, batch: Windows) -> int:
        """The first token that the decoder predicts; those before it are the prompt."""
        length = min(batch.token_ids_BT.shape[1], self.shape.window)
        prompt = int(batch.prompt_lengths_B)
        return prompt if 0 < prompt < length else length // 2

    def _run(self, batch: Windows, start: int, stop: int, prompt: int) -> Heads:
        return run_window(
            self.file,
            batch.token_ids_BT[:, start:stop].numpy(),
            batch.positions_BT[:, start:stop].numpy(),
            np.array([prompt]),
        )

    def decode_step(self) -> Callable[[], object]:
        window = self.shape.window
        token_ids, positions = np.zeros((1, window), np.int64), np.arange(window)[None]
        return partial(run_window, self.file, token_ids, positions, np.array([window // 2]))


def _joined(chunks: list[Heads]) -> Predictions:
    return Predictions(
        *(torch.from_numpy(np.concatenate(parts, 1)) for parts in zip(*chunks, strict=True))
    )


def open_exported(path: Path) -> ExportedPredictor:
    """Open an exported predictor on one thread. Raises ValueError for any other file."""
    file = open_predictor(path, num_threads=1)
    return (CachedPredictor if file.cached else StatelessPredictor)(path, file)


def whole_document(token_ids_T: np.ndarray, experts_TLK: np.ndarray, num_prompt: int) -> Windows:
    """A document as a batch of one row with known history. experts_TLK: signed ids."""
    routes_TLK = np.roll(experts_TLK, 1, axis=0)
    routes_TLK[:1] = NO_EXPERT
    return Windows(
        token_ids_BT=torch.from_numpy(token_ids_T.astype(np.int64))[None],
        routes_BTLK=torch.from_numpy(routes_TLK)[None],
        positions_BT=torch.arange(len(token_ids_T))[None],
        experts_BTLK=torch.from_numpy(experts_TLK)[None],
        prompt_lengths_B=torch.tensor([num_prompt]),
    )
