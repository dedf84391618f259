"""The generic backend: slots in the memory of any device, filled one expert at a time.

It runs every layout, since it calls the experts class's own code; nothing is captured. Few tokens
of layouts that the C kernels know run in those, if their experts are in memory (`runtime.cpu`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing.layers import MoELayer, Routes
from runtime.cache.expert_cache import FREE
from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.cpu.slot_experts import MOST_TOKENS, SlotExperts, common_shape
from runtime.engine.experts import run_experts
from runtime.engine.pool import Pool, build_pools
from runtime.engine.step_inputs import StepInputs
from runtime.kv.row_cache import RowCache
from runtime.sizing.budget import SlotBudget
from runtime.weights.source import Source

logger = logging.getLogger(__name__)
NOT_ON_A_GPU = "the model is not on a CUDA device"


class CpuBackend:
    """Experts out of slots on `device`; see `Backend` for what the methods promise."""

    generate: Callable[..., Any] | None = None
    is_capturing = False
    num_rows: int | None = None
    mask_BT: Tensor | None = None
    key_value_storage = None
    decode_path = NOT_ON_A_GPU
    prefetching = f"prefetching is off: {NOT_ON_A_GPU}"
    cpu_share = f"no experts are computed beside a GPU: {NOT_ON_A_GPU}"

    def __init__(
        self, source: Source, budget: SlotBudget, device: torch.device, policy: Policy
    ) -> None:
        slots, self._policy = budget.slots(), policy
        self.stats = Stats(
            layers=source.layers, num_slots=sum(slots), policy=policy.name,
            stored_bytes=source.mean_stored_bytes,
        )  # fmt: skip
        self.pools = build_pools(source, slots, device, policy, self.stats)
        """The pool of each layer; layers of one expert shape share theirs."""
        self._kernels = {} if device.type != "cpu" else _kernels_of(source, self.pools)
        self._store, self._device = source.store, device
        self._specs = [source.store.specs(index) for index in range(len(source.layers))]

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin_forward(self) -> None:
        """Nothing has to be made ready."""

    def end_forward(self, *_: Any) -> None:
        """Nothing has to be undone."""

    def begin_step(self, forecast: Forecast | None) -> None:
        self._policy.begin_step(forecast)

    def run_captured(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise AssertionError("this backend captures no steps")

    def run_layer(self, layer: MoELayer, index: int, hidden_TH: Tensor, routes: Routes) -> Tensor:
        pool = self.pools[index]
        kernels = self._kernels.get(pool)
        if kernels is not None and len(routes.experts_TK) <= MOST_TOKENS:
            waves = partial(pool.waves, index)
            return kernels.run(hidden_TH, routes, layer.num_experts, waves)
        return run_experts(layer, hidden_TH, routes, partial(pool.serve, index))

    def read_expert(self, index: int, expert: int) -> dict[str, Tensor]:
        into = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            for name, spec in self._specs[index].items()
        }
        self._store.read(index, expert, into)
        return into

    def predict_beside(self, inputs: StepInputs) -> bool:
        return False

    def learn(self, routes_BLK: np.ndarray) -> bool:
        return False

    def resident_LE(self) -> np.ndarray:
        shape = self.stats.num_layers, self.stats.num_experts
        tables = [pool.cache.slot_of_key.reshape(shape) for pool in self.pools]
        return np.array([table[layer] != FREE for layer, table in enumerate(tables)])

    def seconds_per_load(self) -> float:
        return self.stats.seconds_per_load()

    def row_decoder(self, cache: RowCache) -> None:
        return None

    def check_integrity(self) -> None:
        for pool in dict.fromkeys(self.pools):
            pool.cache.check_integrity()

    def close(self) -> None:
        """Free the slots, whoever still holds a pool."""
        for kernels in self._kernels.values():
            kernels.close()
        self._kernels = {}
        for pool in dict.fromkeys(self.pools):
            pool.close()


def _kernels_of(source: Source, pools: list[Pool]) -> dict[Pool, SlotExperts]:
    """The C kernels over the slots of those pools whose experts they can run."""
    found = {}
    for group in source.groups:
        layers = [source.layers[index] for index in group.layers]
        shape = common_shape(layers, group.specs)
        if isinstance(shape, str):
            continue
        pool, top_k = pools[group.layers[0]], max(layer.top_k for layer in layers)
        try:
            found[pool] = SlotExperts(pool.arena, shape, top_k)
        except (ValueError, MemoryError) as reason:  # no compiler, no memory: all else runs as ever
            logger.warning("experts run without the CPU kernels: %s", reason)
    return found
