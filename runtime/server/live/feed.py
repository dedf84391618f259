"""The feed of the event stream: who watches, and what they are told.

    nobody watches        steps run as if there were no feed
    the first watcher     starts an observation: routes are kept, LRU's shadow runs along
    the last one leaves   ends it

Every event is whole in itself, so that a slow watcher may miss some, and a new one needs none.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from runtime.server.errors import Refused
from runtime.server.live.memory import process_bytes
from runtime.server.live.observation import Observation
from runtime.server.live.snapshot import snapshot
from runtime.serving.async_server import AsyncServer

MOST_WATCHERS = 64
INTERVAL = 0.2
"""Seconds between two events at the least, where steps run on a device of their own."""
INTERVAL_ON_CPU = 1.0
"""The same where steps need the cores on which events are made, and mostly drawn too."""


class Feed:
    """Used from the thread of one event loop. model: its name. chats: whether it has a template."""

    def __init__(self, server: AsyncServer, model: str, *, context: int, chats: bool) -> None:
        self._server, self._engine = server, server.engine
        self._about = {"model": model, "context": context, "chat": chats}
        self._watchers = 0
        self._observation: Observation | None = None
        self._rendered = ("", 0)

    @property
    def interval(self) -> float:
        """Seconds between two events at the least."""
        return INTERVAL_ON_CPU if self._engine.device.type == "cpu" else INTERVAL

    def join(self) -> None:
        """One more watches, who has to `leave`. Raises Refused where too many do."""
        if self._watchers == MOST_WATCHERS:
            raise Refused(429, f"{MOST_WATCHERS} watch already; try again later")
        self._watchers += 1
        if self._watchers == 1:
            self._begin()

    def leave(self) -> None:
        """One less watches."""
        self._watchers -= 1
        if not self._watchers:
            self._end()

    def _begin(self) -> None:
        self._observation = Observation(self._server.loop, self._engine.stats())
        self._rendered = ("", 0)
        self._engine.watchers.add(self)
        self._server.loop.watch.watcher = self._observation.see

    def _end(self) -> None:
        self._server.loop.watch.watcher = None
        self._engine.watchers.discard(self)
        self._observation = None

    def topology(self) -> str:
        """The data of the event `topology`."""
        engine, stats = self._engine, self._engine.stats()
        stack = engine.topology.stack()
        return _json(
            self._about
            | {
                "layers": stack.num_layers,
                "experts": stack.num_experts,
                "top_k": stack.top_k,
                "slots": stats.num_slots,
                "total_experts": stats.total_experts,
                "expert_bytes": round(stats.expert_bytes),
                "key_value_bytes": self._server.loop.key_value_bytes,
                "encoding": engine.encoding,
                "policy": stats.policy,
                "predictor": engine.predictor is not None,
                "scheduler": self._server.loop.scheduler.ordering.name,
                "prefetching": engine.prefetching,
                "device": str(engine.device),
            }
        )

    def step(self, after: int) -> tuple[str, int]:
        """The data of an event `step`, and its number; "" where none ran after number `after`."""
        seen = self._observation.newest() if self._observation else None
        if seen is None or seen.number == after:
            return "", after
        if seen.number != self._rendered[1]:
            data = snapshot(seen, self._engine.topology.stack().top_k)
            self._rendered = (_json(data | self._now()), seen.number)
        return self._rendered

    def _now(self) -> dict[str, Any]:
        """Gauges of this moment. The recall is null where nothing was predicted."""
        loop, stats, device = self._server.loop, self._engine.stats(), self._engine.device
        on_device = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        return {
            "active": len(loop.active),
            "waiting": len(loop.waiting),
            "recall": None if math.isnan(stats.recall) else round(stats.recall, 4),
            "memory": {"process": process_bytes(), "device": on_device},
        }


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))
