"""Belady's optimum over calls that are known in advance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from runtime.cache.policy import Policy

Call = tuple[int, np.ndarray]
"""An expert call: (layer, distinct experts int64 [N])."""
Calls = Sequence[Call]
"""Expert calls in order."""


class Belady(Policy):
    """The optimum without bypass (Belady 1966): evict what is used furthest in the future.

    Needs the calls to come: a replay of a recorded trace. Raises ValueError at a call that the
    recording does not hold.
    """

    name = "belady"

    def __init__(
        self, num_layers: int, num_experts: int, *, calls: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        super().__init__(num_layers, num_experts)
        self._calls = list(calls)
        self._next_uses = link_next_uses(self._calls, num_layers, num_experts)
        self._position = 0
        self.values.fill(-np.inf)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        if self._position >= len(self._calls):
            raise ValueError(f"the recorded trace ends after {self._position} expert calls")
        recorded_layer, recorded = self._calls[self._position]
        if layer != recorded_layer or not np.array_equal(experts, recorded):
            raise ValueError(
                f"expert call {self._position} differs from the recorded trace: layer {layer} uses "
                f"{experts.tolist()}, recorded is layer {recorded_layer} with {recorded.tolist()}"
            )
        self.values[layer * self.num_experts + experts] = self._next_uses[self._position]
        self._position += 1

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        after, num_layers = self.values.copy(), len(self.values) // self.num_experts
        upcoming = slice(self._position, self._position + num_layers)
        for (layer, experts), uses in zip(
            self._calls[upcoming], self._next_uses[upcoming], strict=True
        ):
            after[layer * self.num_experts + experts] = uses
        return self.values.copy(), after


def link_next_uses(calls: Calls, num_layers: int, num_experts: int) -> list[np.ndarray]:
    """For each call, minus the position of each of its experts' next use (-inf for never)."""
    upcoming = np.full((num_layers, num_experts), -np.inf)
    next_uses: list[np.ndarray] = []
    for position in range(len(calls) - 1, -1, -1):
        layer, experts = calls[position]
        next_uses.append(upcoming[layer, experts])
        upcoming[layer, experts] = -float(position)
    return next_uses[::-1]
