"""The CUDA backend: experts in pinned host memory, slots on the device, decode steps as graphs.

    PinnedExperts --StreamingPool--> slots    prompts, and all that is not captured
                  --ExpertsCall----> slots    captured steps (`decode`), where experts have kernels

Only `runtime.loading` imports it, and only for a CUDA device: nothing else needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
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
from runtime.cuda.decode.captured_model import CapturedModel
from runtime.cuda.decode.decoder import Decoder
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.fused_forward import FusedNorms
from runtime.cuda.decode.generate import CapturedGenerate
from runtime.cuda.decode.policy_driver import PolicyDriver
from runtime.cuda.decode.predictor_thread import PredictorRequest
from runtime.cuda.decode.row_decoder import RowDecoder
from runtime.cuda.memory.host_dense import HostDense
from runtime.cuda.memory.kernel_layout import KernelLayout, common_layout
from runtime.cuda.memory.pinned_experts import host_tier
from runtime.cuda.options import CudaOptions
from runtime.cuda.prefetching import Prefetching
from runtime.cuda.prefill.grouped_experts import GroupedExperts
from runtime.cuda.prefill.look_ahead import LookAhead, router_of
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.cuda.share.cpu_share import CpuShare
from runtime.cuda.streams import CUDNN_ATTENTION, StreamOrder
from runtime.cuda.wide.wide_rows import WideRows
from runtime.engine.experts import run_experts, with_rest
from runtime.engine.step_inputs import StepInputs
from runtime.kv.row_cache import RowCache
from runtime.kv.storage import Storage
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.route_log import RouteLog
from runtime.sizing.budget import SlotBudget
from runtime.weights.fused_store import as_model, fused
from runtime.weights.source import ShapeGroup, Source


class CudaBackend:
    """Runs the experts of `source` on `device`; see `Backend` for what the methods promise.

    options: of `runtime.load`. forecaster: predicts beside captured steps. route_log: keeps the
    routes of captured steps.
    """

    def __init__(
        self, source: Source, budget: SlotBudget, device: torch.device, policy: Policy,
        options: CudaOptions, forecaster: Forecaster | None = None,
        route_log: RouteLog | None = None,
    ) -> None:  # fmt: skip
        source = self._source = fused(source)
        layout = common_layout(source)
        self._why = options.accepted(layout if isinstance(layout, str) else None)
        self._layout = layout if isinstance(layout, KernelLayout) else None
        self._policy = policy
        self._pools: list[StreamingPool] = []
        self._streams = StreamOrder(device)
        self.decoder: Decoder | None = None
        self._share: CpuShare | None = None
        self._grouped: GroupedExperts | None = None
        self._generate: CapturedGenerate | None = None
        self._rows: RowDecoder | None = None
        self._norms = FusedNorms(source.model)
        self._passes: list[ExitStack] = []
        """What the running forward passes, one within the other, put in place."""
        self._seconds_per_load: float | None = None
        self._has_begun = False
        """Whether the policy has begun the next pass, which is being predicted beside it."""
        # the store has no experts any more once the host tier is filled
        groups, stored_bytes = source.groups, source.mean_stored_bytes
        self._dense = HostDense(source.model, budget.host_bytes)
        try:
            self._host = host_tier(source, self._layout, device)
        except BaseException:
            self._dense.restore()
            raise
        try:
            slots = budget.slots(self._stored_share if self._host.packed else 1.0)
            self.stats = Stats(
                layers=source.layers, num_slots=sum(slots), policy=policy.name,
                packing=self._stored_share, stored_bytes=stored_bytes,
            )  # fmt: skip
            self.prefetches = Prefetching(options.prefetch, all_fit=self.stats.all_fit)
            self._build_pools(groups, slots, device)
            routers = [router_of(source.model, layer) for layer in source.layers]
            self._look_ahead = LookAhead(source.layers, self._pools, routers, self.prefetches)
            if self._layout is not None:
                counts = [layer.num_experts for layer in source.layers]
                self._grouped = GroupedExperts(self._pools[0], self._layout, self.stats, counts)
                model = CapturedModel(source, options, device)
                self._device_cache = DeviceCache(self._pools[0].cache, len(source.layers), device)
                driver = PolicyDriver(policy, self._device_cache, self.stats, forecaster)
                if options.cpu_share is not False and not self.stats.all_fit:
                    self._share = self._shared(model, options, forecaster is not None)
                self.decoder = Decoder(
                    model, self._layout, self._pools[0], self._host, self._device_cache, driver,
                    self.prefetches, self.stats, routers, self._share,
                )  # fmt: skip
                self._generate = CapturedGenerate(source.model, self.decoder, route_log)
        except BaseException:
            self.close()
            raise

    def _shared(self, model: CapturedModel, options: CudaOptions, predicts: bool) -> CpuShare:
        assert self._layout is not None
        return CpuShare(
            self._layout, self._host, model.top_k, model.device, self.seconds_per_load,
            asked=options.cpu_share, has_predictor=predicts,
        )  # fmt: skip

    def _build_pools(
        self, groups: list[ShapeGroup], slots: list[int], device: torch.device
    ) -> None:
        pools: dict[int, StreamingPool] = {}
        for group, num_slots in zip(groups, slots, strict=True):
            block = self._host.expert_blocks[group.layers[0]]
            pool = StreamingPool(
                block, num_slots, device, self._host, self._policy, self.stats, self._layout
            )
            pools |= dict.fromkeys(group.layers, pool)
        self._pools += [pools[index] for index in sorted(pools)]

    @property
    def _stored_share(self) -> float:
        """Bytes of the experts as they are stored over those of their parameters."""
        blocks = self._host.expert_blocks
        return sum(block.stored_units for block in blocks) / sum(block.units for block in blocks)

    # ------------------------------------------------------------------ captured steps

    @property
    def generate(self) -> Callable[..., Any] | None:
        return None if self._generate is None else self._generate.generate

    @property
    def decode_path(self) -> str:
        why = self._why if self._generate is None else self._generate.why
        return why or "graph"

    @property
    def prefetching(self) -> str:
        if self.decoder is None:
            return "prefetching is off: no steps are captured"
        return self.prefetches.verdict

    @property
    def cpu_share(self) -> str:
        if self._share is not None:
            return self._share.verdict
        if self.decoder is None:
            return "the CPU computes no experts: no steps are captured"
        why = "every expert has a slot" if self.stats.all_fit else "as asked for"
        return f"the CPU computes no experts: {why}"

    @property
    def num_rows(self) -> int | None:
        return None if self._generate is None else self._generate.num_rows

    @property
    def mask_BT(self) -> Tensor | None:
        return None if self._generate is None else self._generate.mask_BT

    @property
    def key_value_storage(self) -> Storage | None:
        return None if self.decoder is None else self.decoder.model.storage

    def row_decoder(self, cache: RowCache) -> RowDecoder | None:
        if self.decoder is None or self.decoder.objection() is not None:
            return None
        if self._rows is None or not self._rows.take_on(cache):
            assert self._grouped is not None
            wide = WideRows(self.decoder, cache, self._grouped)
            self._rows = RowDecoder(self.decoder, cache, wide)
        return self._rows

    @property
    def is_capturing(self) -> bool:
        return self.decoder is not None and self.decoder.is_running

    def run_captured(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert self.decoder is not None
        return self.decoder.run_layer(index, hidden, ids, weights)

    def predict_beside(self, inputs: StepInputs) -> bool:
        if self.decoder is None or self._generate is None or inputs.token_ids_BT is None:
            return False
        if self.decoder.driver.thread is None:
            return False
        is_new, rows = inputs.past_length == 0, slice(self.num_rows)
        routes = None if is_new else self._generate.batch_decoder.routes_LBK
        tokens_BT, positions_BT = inputs.token_ids_BT[rows], inputs.positions_BT[rows]
        self._policy.begin_step(None)  # before the thread, which may answer at once
        self._has_begun = True
        return self.decoder.driver.predict(
            PredictorRequest(tokens_BT, positions_BT, routes, is_new=is_new, has_begun=True)
        )

    def learn(self, routes_BLK: np.ndarray) -> bool:
        if self.decoder is None or self._generate is None or self.decoder.driver.thread is None:
            return False
        routes_LBK = routes_BLK[: self.num_rows].swapaxes(0, 1)
        self._generate.batch_decoder.routes_LBK = routes_LBK
        return True

    # ------------------------------------------------------------------ other forward passes

    def begin_forward(self) -> None:
        """The host's slot table becomes the truth.

        Norms run in one kernel each, where experts do. The pass's attention leaves cuDNN alone,
        whose plan for every new length takes tens of milliseconds, and whose bits may differ.
        """
        self._streams.follow()
        if self.decoder is not None:
            self.decoder.rest()
            self._device_cache.download()
        with ExitStack() as changes:
            if self.decoder is not None:
                changes.enter_context(self._norms.in_use())
            CUDNN_ATTENTION.turn_off()
            changes.callback(CUDNN_ATTENTION.turn_back)
            self._passes.append(changes.pop_all())

    def end_forward(self, *_: Any) -> None:
        self._passes.pop().close()
        if self._grouped is not None:
            self._grouped.end_pass()

    def begin_step(self, forecast: Forecast | None) -> None:
        if not self._has_begun:
            self._policy.begin_step(forecast)
        self._has_begun = False

    def run_layer(self, layer: MoELayer, index: int, hidden_TH: Tensor, routes: Routes) -> Tensor:
        ahead = partial(self._look_ahead.after, index, hidden_TH)
        if self._grouped is not None:
            sums = self._grouped.run(index, hidden_TH.flatten(0, -2), routes, ahead)
            return with_rest(layer, hidden_TH, routes, sums.view_as(hidden_TH))
        serve = partial(self._pools[index].serve, index, ahead=ahead)
        return run_experts(layer, hidden_TH, routes, serve)

    def read_expert(self, index: int, expert: int) -> dict[str, Tensor]:
        return as_model(self._source, self._host.read(index, expert))

    def guard(self) -> AbstractContextManager[None]:
        return self._streams.turn()

    # ------------------------------------------------------------------ the cache

    def resident_LE(self) -> np.ndarray:
        """Waits for the device where its slot table is the truth."""
        shape = self.stats.num_layers, self.stats.num_experts
        if self.decoder is not None and self._device_cache.on_device:
            return self._device_cache.resident().reshape(shape)
        tables = {pool: pool.cache.slot_of_key.reshape(shape) != FREE for pool in set(self._pools)}
        return np.array([tables[pool][layer] for layer, pool in enumerate(self._pools)])

    def seconds_per_load(self) -> float:
        """Measured once: the time that one expert takes to cross the link."""
        if self._seconds_per_load is None:
            self._seconds_per_load = self._pools[0].seconds_per_load()
        return self._seconds_per_load

    def check_integrity(self) -> None:
        """The device's tables agree with themselves; then the host takes them over."""
        if self.decoder is not None and self._device_cache.on_device:
            self._device_cache.check_integrity()
            self._device_cache.download()
        for pool in dict.fromkeys(self._pools):
            pool.cache.check_integrity()

    def close(self) -> None:
        """Free all device memory, and give the experts back to the store they came from."""
        torch.cuda.synchronize()
        if self._generate is not None:
            self._generate.batch_decoder.drain()
        self._rows = self._grouped = None
        if self.decoder is not None:
            self.decoder.close()
        for pool in dict.fromkeys(self._pools):
            pool.close()
        self._pools.clear()
        self._host.close()
        self._dense.restore()
