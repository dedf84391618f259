"""An exported predictor, run over whole documents by onnxruntime: what a file really predicts.

Symbols: T tokens, P cached tokens, W tokens of the window, L MoE layers, E experts a layer.
"""

import json
import statistics
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from predictor.export import METADATA_KEY, SCHEMA
from predictor.file.session import open_session
from predictor.networks.causal import CausalPredictor
from predictor.networks.interface import HEADS, Cache, Predictions, PredictorShape, Windows
from predictor.networks.t5 import T5Predictor
from routing.topology import NO_EXPERT, Topology

CHUNK = 128
"""Tokens that a cached graph reads at a time."""
TIMED_STEPS = 30


class Graph(ABC):
    """An opened file. Calling it predicts one document, a batch of one row."""

    names: ClassVar[frozenset[str]]
    """Of the inputs and outputs that the file must have."""
    needs_history: ClassVar[bool]

    def __init__(self, path: Path, session: Any, meta: dict[str, Any]) -> None:
        self.path = path
        self.session = session
        self.topology = Topology.from_json(meta["topology"])
        self.stack = self.topology.stack(meta["stack"])
        self.shape = PredictorShape.of(
            self.topology, meta["stack"], window=meta["window"], horizon=meta["horizon"]
        )
        have = {value.name for value in (*session.get_inputs(), *session.get_outputs())}
        if not self.names <= have:
            raise ValueError(f"no input or output {', '.join(sorted(self.names - have))}")

    @abstractmethod
    def __call__(self, batch: Windows) -> Predictions: ...

    @abstractmethod
    def step_feeds(self) -> dict[str, np.ndarray]:
        """Inputs of one decode step after a full window."""

    def step_seconds(self) -> float:
        """Median time of a decode step: batch 1, full window, one thread."""
        feeds, seconds = self.step_feeds(), []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            self.session.run(None, feeds)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


class CachedGraph(Graph):
    """Reads a document in chunks, past keys and values in a ring buffer, as the runtime does."""

    names = frozenset({*CausalPredictor.graph_inputs, *CausalPredictor.graph_outputs})
    needs_history = True

    def __init__(self, path: Path, session: Any, meta: dict[str, Any]) -> None:
        super().__init__(path, session, meta)
        self.cache = Cache(meta["blocks"], meta["heads"], meta["head_dim"])

    def __call__(self, batch: Windows) -> Predictions:
        window, num_tokens = self.shape.window, batch.token_ids_BT.shape[1]
        past, past_positions = self._empty_past()
        chunks = []
        step = min(CHUNK, window)
        for start in range(0, num_tokens, step):
            span = slice(start, start + step)
            feeds = {
                "token_ids": batch.token_ids_BT[:, span].numpy(),
                "routes": batch.routes_BTLK[:, span].long().numpy(),
                "positions": batch.positions_BT[:, span].numpy(),
                "past": past,
                "past_positions": past_positions,
            }
            *heads, present = self.session.run([*HEADS, "present"], feeds)
            chunks.append(heads)
            entries = np.arange(start, start + present.shape[4]) % window
            past[..., entries, :] = present
            past_positions[:, entries] = feeds["positions"]
        return _joined(chunks)

    def _empty_past(self) -> tuple[np.ndarray, np.ndarray]:
        (blocks, heads, channels), window = self.cache, self.shape.window
        past = np.zeros((blocks, 2, 1, heads, window, channels), np.float32)
        return past, np.full((1, window), -1, np.int64)

    def step_feeds(self) -> dict[str, np.ndarray]:
        shape, (past, _) = self.shape, self._empty_past()
        return {
            "token_ids": np.zeros((1, 1), np.int64),
            "routes": np.zeros((1, 1, shape.num_layers, shape.top_k), np.int64),
            "positions": np.full((1, 1), shape.window, np.int64),
            "past": past,
            "past_positions": np.arange(shape.window, dtype=np.int64)[None],
        }


class StatelessGraph(Graph):
    """Runs over the first window, then over the last half and as many new tokens, time and again.

    `prompt_lengths` of the batch says how long the document's prompt is. A prompt that fills the
    first window, or an empty one, is taken to be half of it. Each later half is predicted with the
    one before as its prompt.
    """

    names = frozenset({*T5Predictor.graph_inputs, *T5Predictor.graph_outputs})
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
        """The first token that the decoder proper predicts; those before are the prompt."""
        length = min(batch.token_ids_BT.shape[1], self.shape.window)
        prompt = int(batch.prompt_lengths_B)
        return prompt if 0 < prompt < length else length // 2

    def _run(self, batch: Windows, start: int, stop: int, prompt: int) -> list[np.ndarray]:
        feeds = {
            "token_ids": batch.token_ids_BT[:, start:stop].numpy(),
            "positions": batch.positions_BT[:, start:stop].numpy(),
            "prompt_lengths": np.array([prompt]),
        }
        heads: list[np.ndarray] = self.session.run(HEADS, feeds)
        return heads

    def step_feeds(self) -> dict[str, np.ndarray]:
        window = self.shape.window
        return {
            "token_ids": np.zeros((1, window), np.int64),
            "positions": np.arange(window, dtype=np.int64)[None],
            "prompt_lengths": np.array([window // 2]),
        }


def _joined(chunks: list[list[np.ndarray]]) -> Predictions:
    return Predictions(
        *(torch.from_numpy(np.concatenate(parts, 1)) for parts in zip(*chunks, strict=True))
    )


def open_graph(path: Path) -> Graph:
    """Open an exported predictor. Raises ValueError for any other file, saying what is wrong."""
    if not path.is_file():
        raise ValueError(f"there is no predictor {path}")
    session = open_session(path)
    raw = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if raw is None:
        raise ValueError(f"{path} was not written by predictor.export: it has no metadata of ours")
    try:
        meta = json.loads(raw)
        if meta["schema"] != SCHEMA:
            raise ValueError(f"schema {meta['schema']}, but this version reads {SCHEMA}")
        return (CachedGraph if meta["cache"] else StatelessGraph)(path, session, meta)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a predictor that can be run: {error}") from error


def whole_document(token_ids_T: np.ndarray, experts_TLK: np.ndarray, num_prompt: int) -> Windows:
    """A document (signed expert ids) as a batch of one row, its history known."""
    routes_TLK = np.roll(experts_TLK, 1, axis=0)
    routes_TLK[:1] = NO_EXPERT
    return Windows(
        token_ids_BT=torch.from_numpy(token_ids_T.astype(np.int64))[None],
        routes_BTLK=torch.from_numpy(routes_TLK)[None],
        positions_BT=torch.arange(len(token_ids_T))[None],
        experts_BTLK=torch.from_numpy(experts_TLK)[None],
        prompt_lengths_B=torch.tensor([num_prompt]),
    )
