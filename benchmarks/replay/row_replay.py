"""Replay of recorded texts on a random model, for many requests at once.

`text_replay` is for sequences that advance together. Here each token's routes are looked up on the
device, by its position and the request that its row of the key/value cache belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.replay.recorded_requests import Recorded
from benchmarks.replay.text_replay import router_of
from routing.layers import MoELayer, find_moe_layers
from runtime.engine.guards.changes import capturable
from runtime.kv.row_cache import RowCache
from runtime.serving.model_runner import ModelRunner, Part, Ran


class RowReplay:
    """Tables for all requests, and the request of each row.

    model: not offloaded yet, because its containers of experts are looked up. layers: of one that
    was built without experts.
    """

    def __init__(
        self, model: Any, recorded: dict[str, Recorded], num_rows: int, device: torch.device,
        *, layers: Sequence[MoELayer] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._recorded = model, recorded
        assert not hasattr(model, "expertflow")
        layers = layers or find_moe_layers(model)
        self._routers = [router_of(model, layer.name) for layer in layers]
        self._tokens = {name: one.token_ids_T.tolist() for name, one in recorded.items()}
        lengths = [len(one.token_ids_T) for one in recorded.values()]
        self._starts = dict(zip(recorded, accumulate(lengths, initial=0), strict=False))
        table = np.concatenate([one.experts_TLK for one in recorded.values()])
        self._experts_NLK = torch.from_numpy(table).to(device)
        self._start_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._step_LTK: Tensor | None = None
        self.cache: RowCache | None = None
        """The rows of the running serving loop."""

    def place(self, row: int, request_id: str) -> None:
        """Assign `row` to this request."""
        self._start_R[row] = self._starts[request_id]

    def token(self, request_id: str, position: int) -> int:
        """The recorded token of a request at a position."""
        return self._tokens[request_id][position]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the routers return the recorded experts inside the block; weights stay their own."""
        embedding = self._model.get_input_embeddings()
        embedding.forward = partial(self._embed, embedding.forward)
        for layer, router in enumerate(self._routers):
            router.forward = partial(self._route, layer, router.forward)
        try:
            yield
        finally:
            for module in (embedding, *self._routers):
                module.__dict__.pop("forward", None)

    @capturable
    def _embed(self, own: Any, token_ids: Tensor) -> Tensor:
        assert self.cache is not None
        layout = self.cache.layout
        at_T = self._start_R.index_select(0, layout.rows_B) + layout.positions_B
        step_TLK = self._experts_NLK.index_select(0, at_T)
        self._step_LTK = step_TLK.transpose(0, 1).long()
        embedded: Tensor = own(token_ids)
        return embedded

    @capturable
    def _route(self, layer: int, own: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights_TK, _ = own(hidden)
        assert self._step_LTK is not None
        return logits, weights_TK, self._step_LTK[layer]


class ReplayingRunner:
    """A runner whose requests generate the recorded text."""

    def __init__(self, inner: ModelRunner, replay: RowReplay) -> None:
        self._inner, self._replay = inner, replay
        self.overlaps = inner.overlaps
        self._placed: dict[int, str] = {}
        """The request of each row; one that was parked goes on in another."""

    def run(self, parts: Sequence[Part], renew: Callable[[], None]) -> Ran:
        """Run as `ModelRunner.run` does, then replace the chosen tokens by the recorded ones."""
        for sequence, _ in parts:
            if self._placed.get(sequence.row) != sequence.request.id or not sequence.num_cached:
                self._placed[sequence.row] = sequence.request.id
                self._replay.place(sequence.row, sequence.request.id)
        following, routes_TLK = self._inner.run(parts, renew)
        recorded_N = [self._recorded_token(part) for part in parts if part.completes]
        return following._replace(greedy_N=recorded_N), routes_TLK

    def _recorded_token(self, part: Part) -> int:
        return self._replay.token(
            part.sequence.request.id, part.sequence.num_cached + part.num_tokens
        )
