"""What `Engine` calls on a CUDA device: pinned experts, streamed pools and, mostly, kernels."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from routing.layers import MoELayer, Routes
from runtime.cache.policies import Policy
from runtime.cache.stats import Stats
from runtime.cuda.decode.decoder import Decoder
from runtime.cuda.decode.generate import CapturedGenerate, router_of
from runtime.cuda.decode.predictor_thread import PredictorRequest, PredictorThread
from runtime.cuda.decode.row_decoder import RowDecoder
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.host_dense import HostDense
from runtime.cuda.memory.kernel_layout import KernelLayout, layout_of, stored_specs
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.prefill.grouped_experts import run_grouped
from runtime.cuda.prefill.streaming_pool import Ahead, StreamingPool
from runtime.engine.experts import run_experts
from runtime.engine.step_inputs import StepInputs
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import Group, Source

if TYPE_CHECKING:
    from runtime.kv.row_cache import RowCache

AHEAD_FROM = 16
"""Tokens of a forward pass from which the next layer's experts are streamed ahead."""


class CudaBackend:
    """The device's part of an `Engine`. context, batch, prefetch, compile: see `runtime.load`.

    missing: bytes of weights other than experts that have to stay in host memory.
    """

    def __init__(
        self,
        source: Source,
        num_slots: list[int],
        device: torch.device,
        policy: Policy,
        stats: Stats,
        *,
        context: int,
        batch: int,
        prefetch: bool | str,
        compile: bool,
        missing: int = 0,
    ) -> None:
        layout = _layout(source)
        self._why = layout if isinstance(layout, str) else None
        self._layout = layout if isinstance(layout, KernelLayout) else None
        self._layers = source.layers
        self._routers = [router_of(source.model, layer) for layer in source.layers]
        self._pools: dict[int, StreamingPool] = {}
        self._uses_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        self.decoder: Decoder | None = None
        self.path: CapturedGenerate | None = None
        self._rows: RowDecoder | None = None
        groups = source.groups
        self._dense = HostDense(source.model, missing)
        try:
            self._host = self._fill_host(source, device)
        except BaseException:
            self._dense.restore()
            raise
        try:
            pairs = zip(groups, num_slots, strict=True)
            num_slots = [self._slots_for(source, group, slots) for group, slots in pairs]
            stats.num_slots, stats.packing = sum(num_slots), self._packing
            for group, slots in zip(groups, num_slots, strict=True):
                expert_block = self._host.expert_blocks[group.layers[0]]
                pool = StreamingPool(
                    expert_block, slots, device, self._host, policy, stats, self._layout
                )
                self._pools |= dict.fromkeys(group.layers, pool)
            if self._layout is not None:
                self.decoder = Decoder(
                    source, self._layout, self._pools[0], self._host, policy, stats, self._routers,
                    context=context, batch=batch, prefetch=prefetch, compile=compile,
                )  # fmt: skip
                self.path = CapturedGenerate(source.model, self.decoder)
        except BaseException:
            self.close()
            raise

    def _fill_host(self, source: Source, device: torch.device) -> PinnedExperts:
        specs = [source.store.specs(index) for index in range(len(source.layers))]
        expert_blocks = [ExpertBlock(stored_specs(spec, self._layout)) for spec in specs]
        counts = [layer.num_experts for layer in source.layers]
        layout = self._layout
        is_turned = layout is not None and layout.transposed
        return PinnedExperts(
            source.store,
            counts,
            expert_blocks,
            device,
            packs=layout is not None,
            transposed=is_turned,
        )

    @property
    def _packing(self) -> float:
        """Bytes of a stored record over those of its parameters."""
        expert_block = self._host.expert_blocks[0]
        return expert_block.stored_units / expert_block.units

    def _slots_for(self, source: Source, group: Group, num_slots: int) -> int:
        """How many stored records fit where `num_slots` unpacked experts would."""
        total = sum(source.layers[index].num_experts for index in group.layers)
        return min(int(num_slots / self._packing), total)

    @property
    def pools(self) -> list[StreamingPool]:
        """The pool of each layer."""
        return [self._pools[index] for index in range(len(self._layers))]

    @property
    def why(self) -> str | None:
        """Why decode steps are not captured; None where they are."""
        return self._why if self.path is None else self.path.why

    @property
    def num_rows(self) -> int | None:
        """Sequences of the running generation, rows beyond being padding; None: all rows."""
        return None if self.path is None else self.path.num_rows

    @property
    def mask_BT(self) -> Tensor | None:
        """Zero for the padding of the prompt that runs, before it became a mask of attention."""
        return None if self.path is None else self.path.mask_BT

    def record_with(self, route_log: RouteLog) -> None:
        """Let the routes of captured steps be recorded."""
        if self.decoder is not None:
            self.decoder.route_log = route_log

    @property
    def prefetching(self) -> str:
        """Whether steps prefetch, and why."""
        if self.decoder is None:
            return "prefetching is off: no steps are captured"
        if self.decoder.trial is not None:
            served = self._rows and self._rows.trial
            more = f"; while serving, {served.verdict}" if served else ""
            return self.decoder.trial.verdict + more
        if self.decoder.prefetch:
            return "prefetching is on, as asked for"
        fits = self.decoder.stats.all_fit
        return f"prefetching is off{': every expert has a slot' if fits else ', as asked for'}"

    def predict_with(self, forecaster: Forecaster, policy: Policy, stats: Stats) -> None:
        """Let a predictor run beside the captured steps."""
        if self.decoder is not None:
            self.decoder.predictor_thread = PredictorThread(
                forecaster, policy, self.decoder.device_cache, stats
            )

    # ------------------------------------------------------------------ what Engine asks

    def row_decoder(self, cache: RowCache) -> RowDecoder | None:
        """Captured steps over the rows of `cache`; None where the experts have no kernels."""
        if self.decoder is None:
            return None
        if self._rows is None or not self._rows.take_on(cache):
            self._rows = RowDecoder(self.decoder, cache)
        return self._rows

    @cached_property
    def seconds_per_load(self) -> float:
        """What one expert takes to cross the link, measured."""
        return self._pools[0].seconds_per_load()

    @property
    def slot_of_key(self) -> np.ndarray | None:
        """The device's table of slots, where it is the truth. Waits for the device."""
        if self.decoder is None or not self.decoder.device_cache.on_device:
            return None
        table: np.ndarray = self.decoder.device_cache.slot_of_key.cpu().numpy()
        return table

    @property
    def is_capturing(self) -> bool:
        """Whether the model's forward runs as (the capture of) a decode step right now."""
        return self.decoder is not None and self.decoder.is_running

    def run_captured(self, index: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """The experts call of layer `index` inside a captured step."""
        assert self.decoder is not None
        return self.decoder.call(index, hidden, ids, weights)

    def begin_forward(self) -> None:
        """A forward pass outside of captured steps begins: the host's books are the truth.

        Its attention leaves cuDNN alone, which builds a plan for every new length, tens of
        milliseconds each.
        """
        self._uses_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.decoder is not None:
            self.decoder.device_cache.download()

    def end_forward(self, *_: Any) -> None:
        """It has ended, or failed."""
        torch.backends.cuda.enable_cudnn_sdp(self._uses_cudnn)

    def announce(self, inputs: StepInputs) -> bool:
        """Tell the predictor's thread about a forward pass; False where there is none."""
        predictor_thread = None if self.decoder is None else self.decoder.predictor_thread
        if predictor_thread is None or inputs.token_ids_BT is None:
            return False
        assert self.path is not None
        is_new, rows = inputs.past_length == 0, slice(self.num_rows)
        routes = None if is_new else self.path.batch_decoder.routes_LBK
        predictor_thread.submit(
            PredictorRequest(inputs.token_ids_BT[rows], inputs.positions_BT[rows], routes, is_new)
        )
        return True

    def remember(self, routes_BLK: np.ndarray) -> bool:
        """Keep the true routes of each sequence's last token for the predictor's thread."""
        if self.path is None or self.path.decoder.predictor_thread is None:
            return False
        self.path.batch_decoder.routes_LBK = routes_BLK[: self.num_rows].swapaxes(0, 1)
        return True

    def run_layer(self, layer: MoELayer, index: int, hidden_TH: Tensor, routes: Routes) -> Tensor:
        """The experts call of layer `index` outside of captured steps."""
        ahead, pool = self._look_ahead(index, hidden_TH), self._pools[index]
        if self._layout is not None:
            return run_grouped(pool, self._layout, index, hidden_TH, routes, ahead)
        return run_experts(layer, hidden_TH, routes, partial(pool.serve, index, ahead=ahead))

    def _look_ahead(self, index: int, hidden_TH: Tensor) -> Ahead | None:
        """The experts that the layer after `index` will want, where some of its are missing. Only
        for many tokens, whose union of experts a router foretells nearly exactly.
        """
        following = index + 1
        if following == len(self._layers) or len(hidden_TH) < AHEAD_FROM:
            return None
        pool, router = self._pools[following], self._routers[following]
        if router is None or self._pools[index] is not pool or not pool.lacks(following):
            return None
        return Ahead(following, _wanted(hidden_TH, router, self._layers[following].top_k))

    def check_integrity(self) -> None:
        """Assert that the device's books agree with themselves, then take them over."""
        if self.decoder is not None and self.decoder.device_cache.on_device:
            self.decoder.device_cache.check_integrity()
            self.decoder.device_cache.download()

    def close(self) -> None:
        """Give back everything on the device, and the experts to the store they came from."""
        torch.cuda.synchronize()
        if self.path is not None:
            self.path.batch_decoder.drain()
        self._rows = None
        if self.decoder is not None:
            self.decoder.close()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._host.close()
        self._dense.restore()


def _layout(source: Source) -> KernelLayout | str:
    """How the kernels read this model's experts, or why they cannot."""
    config: Any = source.model.config
    if config.is_encoder_decoder:
        return "encoder-decoder models are not captured"
    if len(source.groups) > 1:
        return "its layers have experts of several shapes"
    found = [layout_of(layer, source.store.specs(i)) for i, layer in enumerate(source.layers)]
    return found[0] if len(set(found)) == 1 else "its layers have experts of several kinds"


def _wanted(hidden_TH: Tensor, router: Any, top_k: int) -> Tensor:
    """How many tokens each expert of a router would get, int64 [E]. Nothing waits."""
    logits_TE = torch.nn.functional.linear(hidden_TH, router.weight, getattr(router, "bias", None))
    chosen_P = logits_TE.topk(min(top_k, logits_TE.shape[-1]), -1).indices.reshape(-1)
    nobody_E = chosen_P.new_zeros(logits_TE.shape[-1])
    return nobody_E.scatter_add_(0, chosen_P, torch.ones_like(chosen_P))
