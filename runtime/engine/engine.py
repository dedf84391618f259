"""The engine: hangs on an unmodified Hugging Face model and runs its experts out of slots.

Each forward pass of the model is one step: predict, (the cache's policy then holds the) schedule,
run, account. Nothing of the model's own code changes: the experts containers get an instance-level
`forward`, the model a hook before and after its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from routing.layers import bound_call, read_call
from runtime.cache.expert_cache import FREE
from runtime.cache.policies import Forecast, Policy
from runtime.cache.stats import Stats
from runtime.engine.attachment import Attachment
from runtime.engine.experts import run_experts
from runtime.engine.observer import Observer
from runtime.engine.pool import Pool
from runtime.engine.step_inputs import StepInputs, read_inputs
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.predictor_file import PredictorFile
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import Source

if TYPE_CHECKING:
    from queue import Queue

    from runtime.cuda.backend import CudaBackend
    from runtime.cuda.decode.row_decoder import RowDecoder
    from runtime.cuda.prefill.streaming_pool import StreamingPool
    from runtime.kv.row_cache import RowCache
    from runtime.kv.static_cache import Storage
    from runtime.serving.request import Request, Result


class Engine:
    """What `runtime.load` puts at `model.expertflow`. Also a context manager that detaches.

    One generation at a time: the slots and the predictor's state belong to one caller.
    """

    def __init__(
        self,
        source: Source,
        policy: Policy,
        pools: Sequence[Pool | StreamingPool],
        stats: Stats,
        forecaster: Forecaster | None,
        device: torch.device,
        gpu: CudaBackend | None = None,
        route_log: RouteLog | None = None,
    ) -> None:
        self.model = source.model
        self.topology = source.topology
        self._layers = source.layers
        self._store = source.store
        self._policy = policy
        self._pools = pools
        self._stats = stats
        self._gpu = gpu
        self._observer = None
        if forecaster is not None or route_log is not None:
            stack = source.topology.stack() if forecaster is None else forecaster.file.stack
            self._observer = Observer(source.layers, stack, stats, forecaster, route_log, gpu)
        self._inputs: StepInputs | None = None
        self._packed: tuple[Forecast | None] | None = None
        self._step_start = 0.0
        self._attachment = Attachment()
        try:
            self._attach(device)
        except BaseException:
            self.detach()
            raise

    # ------------------------------------------------------------------ what users call

    def stats(self) -> Stats:
        """Counts since loading or the last `stats().reset()`."""
        return self._stats

    def report(self) -> str:
        """One line about the run so far."""
        return self._stats.report()

    def serve(
        self,
        requests: Iterable[Request] | Queue[Request | None],
        *,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Iterator[Result]:
        """Continue many prompts together, joining and leaving between steps; results as they end.

        requests: an iterable, taken as they can be scheduled, or a queue that None ends.
        tokenizer: for prompts of text and for the text of results; without, prompts are token ids.
        settings: fields of `runtime.serving.settings.ServeSettings`.
        `runtime.serving.async_server.AsyncServer` does the same for asyncio.
        """
        from runtime.serving.serve import serve
        from runtime.serving.settings import ServeSettings

        return serve(self, requests, tokenizer, ServeSettings(**settings))

    def check_integrity(self) -> None:
        """Assert that every slot has one owner and that resident + free = capacity."""
        if self._gpu is not None:
            self._gpu.check_integrity()
        for pool in dict.fromkeys(self._pools):
            pool.cache.check_integrity()

    @property
    def decode_path(self) -> str:
        """Either "graph": decode steps run as captured CUDA graphs, or why they do not."""
        if self._gpu is None:
            return "the model is not on a CUDA device"
        return self._gpu.why or "graph"

    @property
    def prefetching(self) -> str:
        """Whether decode steps prefetch; under prefetch="auto" with the times that decided it."""
        if self._gpu is None:
            return "prefetching is off: the model is not on a CUDA device"
        return self._gpu.prefetching

    def detach(self) -> nn.Module:
        """Restore and return the original model, all experts in memory. Idempotent."""
        self._attachment.undo()
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    # ------------------------------------------------------------------ for runtime.serving

    @property
    def predictor(self) -> PredictorFile | None:
        """The predictor that steps run with, if any."""
        forecaster = None if self._observer is None else self._observer.forecaster
        return None if forecaster is None else forecaster.file

    @property
    def route_log(self) -> RouteLog | None:
        """What keeps the routes of what runs, if anything does."""
        return None if self._observer is None else self._observer.route_log

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def key_value_storage(self) -> Storage | None:
        """The key/value cache that captured steps share, where there are any."""
        decoder = None if self._gpu is None else self._gpu.decoder
        return None if decoder is None else decoder.storage

    def row_decoder(self, cache: RowCache) -> RowDecoder | None:
        """Captured steps over the rows of `cache`, where the model's experts have kernels."""
        return None if self._gpu is None else self._gpu.row_decoder(cache)

    def seconds_per_load(self) -> float:
        """What loading one expert takes; 0 where that is not known yet."""
        return self._stats.seconds_per_load() if self._gpu is None else self._gpu.seconds_per_load

    @property
    def resident_LE(self) -> np.ndarray:
        """Bool [L, E]: the experts that are in slots, of the predicted stack where there is one."""
        shape = (self._stats.num_layers, self._stats.num_experts)
        tables = [pool.cache.slot_of_key for pool in self._pools]
        if self._gpu is not None and self._gpu.slot_of_key is not None:
            tables = [self._gpu.slot_of_key] * len(tables)
        resident_LE = np.array([table.reshape(shape)[i] != FREE for i, table in enumerate(tables)])
        return resident_LE if self._observer is None else resident_LE[self._observer.stack.rows]

    def tracked(self, routes_TLK: np.ndarray) -> np.ndarray:
        """Of routes of all layers, what `run_packed` would give."""
        if self._observer is None:
            return routes_TLK[:, :0, :0]
        return routes_TLK[:, self._observer.stack.rows]

    def run_ragged(self, forecast: Forecast | None, **inputs: Any) -> tuple[Tensor, np.ndarray]:
        """One step over tokens of several sequences side by side, [1, T].

        Returns the logits, and the routes [T, L, K] of the predicted stack, NO_EXPERT where there
        is none ([T, 0, 0] with neither a predictor nor a recorder).
        """
        self._packed = (forecast,)
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            self._packed = None
        num_tokens = inputs["input_ids"].shape[1]
        if self._observer is None:
            return logits, np.zeros((num_tokens, 0, 0), np.int64)
        return logits, self._observer.routes(num_tokens)

    # ------------------------------------------------------------------ attach

    def _attach(self, device: torch.device) -> None:
        changes, model, gpu = self._attachment, self.model, self._gpu
        before = next(model.parameters()).device
        changes.add(lambda: model.to(before))
        if self.route_log is not None:
            changes.add(self.route_log.close)
        if gpu is not None:
            changes.add(gpu.close)
        for module in model.modules():
            changes.keep(module, "training")
        for index, layer in enumerate(self._layers):
            self._store.take(index)
            changes.add(partial(self._store.restore, index))
            changes.put(layer.module, "forward", partial(self._run_layer, index))
        changes.put(model, "expertflow", self)
        changes.put(model, "save_pretrained", _refuse_to_save)
        hooks = [
            model.register_forward_pre_hook(self._begin_step, with_kwargs=True),
            model.register_forward_hook(self._end_step),
        ]
        if gpu is not None:
            hooks.append(model.register_forward_hook(gpu.end_forward, always_call=True))
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            encoder = model.get_encoder()  # type: ignore[operator]
            hooks.append(encoder.register_forward_pre_hook(self._begin_encoding))
        changes.add(*(hook.remove for hook in hooks))
        self._disable_compile()
        if gpu is not None and gpu.path is not None:
            changes.put(model, "generate", gpu.path.generate)
        model.to(device).eval()

    def _disable_compile(self) -> None:
        """Keep generate from compiling the step: it would only break at every experts call."""
        config = getattr(self.model, "generation_config", None)
        if config is not None:
            self._attachment.keep(config, "disable_compile")
            config.disable_compile = True

    # ------------------------------------------------------------------ one step

    def _begin_step(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step_start = time.perf_counter()
        mask_BT = None if self._gpu is None else self._gpu.mask_BT
        self._inputs = read_inputs(self.model, args, kwargs, mask_BT)
        if self._gpu is not None:
            self._gpu.begin_forward()
        self._policy.begin_step(self._forecast(self._inputs))

    def _begin_encoding(self, *_: Any) -> None:
        self._policy.begin_step(None)

    def _forecast(self, inputs: StepInputs) -> Forecast | None:
        if self._observer is None:
            return None
        self._observer.begin_step()
        if self._packed is not None:
            return self._packed[0] and self._observer.stack.spread(self._packed[0])
        return self._observer.predict(inputs)

    def _run_layer(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layers[index]
        if self._gpu is not None and self._gpu.is_capturing:
            return self._gpu.run_captured(index, *bound_call(layer, args, kwargs))
        hidden_TH, routes = read_call(layer, args, kwargs)
        if self._observer is not None:
            self._observer.see(index, args, kwargs)
        if self._gpu is not None:
            return self._gpu.run_layer(layer, index, hidden_TH, routes)
        return run_experts(layer, hidden_TH, routes, partial(self._pools[index].serve, index))

    def _end_step(self, *_: Any) -> None:
        inputs, self._inputs = self._inputs, None
        assert inputs is not None
        if self._observer is not None and not self._packed:
            self._observer.end_step(inputs)
        self._stats.steps += 1
        self._stats.tokens += inputs.num_tokens
        self._stats.seconds["step"] += time.perf_counter() - self._step_start


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "an offloaded model would be saved without its experts; save model.expertflow.detach()"
    )
