"""The route log: the true routes of what the runtime runs, as a trace for further training.

It is off unless `runtime.load(..., record=DIR)` asks for it. It holds token ids and the experts
that they used. Whoever has the tokenizer can read the text back, so only the owner can read a new
directory. Nothing leaves the machine. Recording ends at `limit` bytes; generation goes on.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from routing.predictor_file.format import PADDING
from routing.shards import GENERATED, MANIFEST, PROMPT, Document, stored_experts
from routing.topology import Topology
from routing.writer import TraceWriter

LIMIT = 256 << 20
"""Default limit of a recording, in bytes."""
SHARD_TOKENS = 1 << 16
"""Tokens after which a shard is written; a crash can lose as many."""


@dataclass
class _Sequence:
    """The tokens and routes of one sequence so far, without padding."""

    tokens: list[np.ndarray] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    num_prompt: int = 0


class RouteLog:
    """Appends documents to the trace in `directory`, across runs, up to `limit` bytes in all.

    eos_ids: tokens that end a sequence; the padding that a batch runs after them is not recorded.
    Raises ValueError where the directory holds something else, or another model's trace.
    """

    def __init__(
        self,
        directory: str | Path,
        topology: Topology,
        *,
        limit: int = LIMIT,
        eos_ids: Set[int] = frozenset(),
    ) -> None:
        if [stack.name for stack in topology.stacks] != ["decoder"]:
            raise ValueError("record= is for decoder-only models: trace others with trace.collect")
        self._stack, self._eos_ids, self._limit = topology.stack(), eos_ids, limit
        self._sequences: list[_Sequence] = []
        self._length = 0
        self.num_begun = 0
        """Forward passes so far that began new sequences."""
        self._is_open = True
        self._writer = _open(Path(directory), topology)
        self._num_bytes = sum(path.stat().st_size for path in self._writer.directory.iterdir())
        atexit.register(self.close)

    def extend(
        self, tokens_BT: np.ndarray, positions_BT: np.ndarray, past: int, routes_BTLK: np.ndarray
    ) -> None:
        """Add a forward pass over the next T tokens of B sequences, after `past` tokens of each.

        tokens_BT, positions_BT: int; position PADDING marks padding. routes_BTLK: int, NO_EXPERT
        for none. A pass that does not continue the last one starts new sequences if `past` is 0,
        and is left out otherwise.
        """
        if past != self._length or len(tokens_BT) != len(self._sequences):
            self.end()
            if past:
                return
        if past == 0:
            self._sequences = [_Sequence() for _ in tokens_BT]
            self.num_begun += 1
        self._length = past + tokens_BT.shape[1]
        for row, sequence in enumerate(self._sequences):
            is_real_T = positions_BT[row] != PADDING
            sequence.tokens.append(tokens_BT[row][is_real_T])
            sequence.routes.append(self._stored(routes_BTLK[row][is_real_T]))
            if past == 0:
                sequence.num_prompt = int(is_real_T.sum())

    def follow(self, tokens_B: np.ndarray, routes_BLK: np.ndarray) -> None:
        """Add one more token of each sequence of the running generation."""
        zeros_B1 = np.zeros((len(tokens_B), 1), np.int64)
        self.extend(tokens_B[:, None], zeros_B1, self._length or 1, routes_BLK[:, None])

    def end(self) -> None:
        """End the sequences of the running generation, and add them to the trace."""
        sequences, self._sequences, self._length = self._sequences, [], 0
        for sequence in sequences:
            tokens_T = np.concatenate(sequence.tokens)
            kept = self._num_before_end(tokens_T, sequence.num_prompt)
            self._add(tokens_T[:kept], np.concatenate(sequence.routes)[:kept], sequence.num_prompt)

    def add(self, tokens_T: np.ndarray, routes_TLK: np.ndarray, num_prompt: int) -> None:
        """Add a finished sequence: tokens int [T], routes int [T, L, K] (NO_EXPERT for none)."""
        self._add(tokens_T, self._stored(routes_TLK), num_prompt)

    def close(self) -> None:
        """End the running generation and write everything. Later calls do nothing."""
        self.end()
        self._guarded(self._writer.flush)
        self._writer.release()
        self._is_open = False
        atexit.unregister(self.close)

    def _stored(self, routes: np.ndarray) -> np.ndarray:
        return stored_experts(routes, self._stack.num_experts)

    def _num_before_end(self, tokens_T: np.ndarray, num_prompt: int) -> int:
        """Number of tokens up to and including the first generated end-of-sequence token."""
        ended = np.flatnonzero(np.isin(tokens_T[num_prompt:], list(self._eos_ids)))
        return num_prompt + int(ended[0]) + 1 if len(ended) else len(tokens_T)

    def _add(self, tokens_T: np.ndarray, stored_TLK: np.ndarray, num_prompt: int) -> None:
        size = 5 * len(tokens_T) + stored_TLK.nbytes
        if self._is_open and self._num_bytes + size > self._limit:
            self._stop(f"it has reached its limit of {self._limit:,} bytes (record_limit=)")
        if not self._is_open:
            return
        phase_T = np.where(np.arange(len(tokens_T)) < num_prompt, PROMPT, GENERATED)
        document = Document(
            tokens_T.astype(np.int32), stored_TLK, phase_T.astype(np.uint8), "recorded"
        )
        self._num_bytes += size
        self._guarded(partial(self._writer.add, {"decoder": document}))

    def _guarded(self, write: Callable[[], None]) -> None:
        """Write; a full disk ends the recording, not the generation. So do impossible routes."""
        try:
            write()
        except (OSError, ValueError) as error:
            self._stop(str(error))

    def _stop(self, why: str) -> None:
        self._is_open = False
        warnings.warn(f"recording into {self._writer.directory} ends: {why}", stacklevel=2)


def _open(directory: Path, topology: Topology) -> TraceWriter:
    if not (directory / MANIFEST).exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    provenance = {"model": topology.model_type, "recorded": "by runtime.load(record=)"}
    return TraceWriter(directory, topology, provenance=provenance, shard_tokens=SHARD_TOKENS)
