"""The static hot set: the most used experts of a trace, whatever is used now."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from runtime.cache.policy import Policy


class HotSet(Policy):
    """Keeps the experts that a recorded trace used most; nothing that happens changes that.

    Engines pin such a set (llama.cpp's `moe-trace` forks, KTransformers). A cache has to load all
    the same what a call misses, so the least used resident makes way for it, and it goes first when
    the next is missed.
    """

    name = "hot-set"

    def __init__(
        self, num_layers: int, num_experts: int, *, calls: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        super().__init__(num_layers, num_experts)
        for layer, experts in calls:
            self.values[layer * num_experts + experts] += 1.0

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """Change nothing."""

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values.copy(), self.values.copy()
