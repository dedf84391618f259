"""The engine: attached to an unmodified Hugging Face model, it runs the experts out of slots.

Each forward pass of the model is one step: predict, schedule (the cache's policy), run, account.
Nothing of the model's own code changes: the experts containers get an instance-level `forward`, the
model a hook before and after its own. Where and how the experts run is the backend's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from routing.layers import bound_call, read_call
from routing.predictor_file.reader import PredictorFile
from runtime.cache.forecast import Forecast
from runtime.cache.stats import Stats
from runtime.engine.attachment import Attachment
from runtime.engine.backend import Backend, RowDecoder
from runtime.engine.guards.guard import guard
from runtime.engine.observer import build_observer
from runtime.engine.step_inputs import StepInputs, read_inputs
from runtime.kv.row_cache import RowCache
from runtime.kv.static_cache import Storage
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.layer_map import LayerMap
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import Source

if TYPE_CHECKING:
    from queue import Queue

    from runtime.serving.request import Request, Result


class Engine:
    """The offloading of one model, at `model.expertflow`. Also a context manager that ends it.

    One generation at a time: the slots and the predictor's state belong to one caller.
    """

    def __init__(
        self,
        source: Source,
        backend: Backend,
        forecaster: Forecaster | None,
        route_log: RouteLog | None,
        device: torch.device,
    ) -> None:
        self.model = source.model
        self.topology = source.topology
        self._layers = source.layers
        self._store = source.store
        self._backend = backend
        stack = source.topology.stack() if forecaster is None else forecaster.file.stack
        layer_map = LayerMap(source.layers, stack)
        self._observer = build_observer(source.layers, layer_map, backend, forecaster, route_log)
        self._inputs: StepInputs | None = None
        self._given: tuple[Forecast | None] | None = None
        """The forecast that a ragged step brings along, while it runs."""
        self._step_start = 0.0
        self._attachment = Attachment()
        try:
            self._attach(device)
        except BaseException:
            self.detach()
            raise

    def __repr__(self) -> str:
        stats = self._backend.stats
        return (
            f"<Engine of {type(self.model).__name__}: {stats.policy}, {stats.num_slots} of "
            f"{stats.total_experts} experts fit>"
        )

    # ------------------------------------------------------------------ what users call

    def stats(self) -> Stats:
        """Counts since loading or the last `stats().reset()`."""
        return self._backend.stats

    def report(self) -> str:
        """One line about the run so far."""
        return self._backend.stats.report()

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
        settings: fields of `runtime.serving.settings.ServeSettings`; on a GPU, `batch` and
            `context` are by default what was reserved when the model was loaded.
        `runtime.serving.async_server.AsyncServer` does the same for asyncio.
        """
        from runtime.serving.serve import serve  # lazy on purpose: serving is above the engine
        from runtime.serving.settings import ServeSettings

        within = ServeSettings.within(self.key_value_storage, **settings)
        return serve(self, requests, tokenizer, within)

    def check_integrity(self) -> None:
        """Assert that every slot has one owner and that resident + free = capacity."""
        self._backend.check_integrity()

    @property
    def decode_path(self) -> str:
        """Either "graph": decode steps run as captured CUDA graphs, or why they do not."""
        return self._backend.decode_path

    @property
    def prefetching(self) -> str:
        """Whether experts are prefetched; under prefetch="auto" with the times that decided it."""
        return self._backend.prefetching

    def detach(self) -> nn.Module:
        """Restore and return the original model, all experts in memory. Idempotent."""
        self._attachment.undo()
        return self.model

    def close(self) -> None:
        """Free slots, pinned memory and threads at once, without waiting for the collector.

        A model that was given in memory is detached. One that was loaded from files has no experts
        from then on: it can only be dropped. Idempotent.
        """
        if self._store.owns_experts:
            self.detach()
            return
        self._attachment.release()
        for layer in self._layers:
            layer.module.__dict__["forward"] = _refuse_to_run

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
        forecaster = self._observer.forecaster
        return None if forecaster is None else forecaster.file

    @property
    def route_log(self) -> RouteLog | None:
        """The log of the routes of what runs, if one is kept."""
        return self._observer.route_log

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def key_value_storage(self) -> Storage | None:
        """The key/value cache that captured steps share, where there are any."""
        return self._backend.key_value_storage

    def row_decoder(self, cache: RowCache) -> RowDecoder | None:
        """Captured steps over the rows of `cache`, where the model's experts have kernels."""
        return self._backend.row_decoder(cache)

    def seconds_per_load(self) -> float:
        """Time to load one expert; 0 where that is not known yet."""
        return self._backend.seconds_per_load()

    @property
    def resident_LE(self) -> np.ndarray:
        """Bool [L, E]: the experts in slots, of the predicted stack where there is one."""
        return self._observer.of_stack(self._backend.resident_LE(), 0)

    def tracked(self, routes_TLK: np.ndarray) -> np.ndarray:
        """Of routes of all layers, those that `run_ragged` gives."""
        return self._observer.observed(routes_TLK)

    def run_ragged(self, forecast: Forecast | None, **inputs: Any) -> tuple[Tensor, np.ndarray]:
        """One step over tokens of several sequences side by side, [1, T].

        Returns the logits, and the routes [T, L, K] of the predicted stack, NO_EXPERT where there
        is none ([T, 0, 0] with neither a predictor nor a route log).
        """
        self._given = (forecast,)
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            self._given = None
        return logits, self._observer.routes(inputs["input_ids"].shape[1])

    # ------------------------------------------------------------------ attach

    def _attach(self, device: torch.device) -> None:
        changes, model, backend = self._attachment, self.model, self._backend
        before = next(model.parameters()).device
        changes.add(lambda: model.to(before))
        if self.route_log is not None:
            changes.add(self.route_log.close, holds=True)
        changes.add(backend.close, holds=True)
        for module in model.modules():
            changes.keep(module, "training")
        for index, layer in enumerate(self._layers):
            self._store.take(index)
            changes.add(partial(self._store.restore, index))
            changes.put(layer.module, "forward", partial(self._run_layer, index))
        changes.put(model, "expertflow", self)
        self._add_hooks()
        self._disable_compile()
        if backend.generate is not None:
            changes.put(model, "generate", backend.generate)
        model.to(device).eval()
        guard(model, self._layers, self._store, changes)

    def _add_hooks(self) -> None:
        model = self.model
        hooks = [
            model.register_forward_pre_hook(self._begin_step, with_kwargs=True),
            model.register_forward_hook(self._end_step),
            model.register_forward_hook(self._backend.end_forward, always_call=True),
        ]
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            encoder = model.get_encoder()  # type: ignore[operator]
            hooks.append(encoder.register_forward_pre_hook(self._begin_encoding))
        self._attachment.add(*(hook.remove for hook in hooks), holds=True)

    def _disable_compile(self) -> None:
        """Keep generate from compiling the step: it would only break at every experts call."""
        config = getattr(self.model, "generation_config", None)
        if config is not None:
            self._attachment.keep(config, "disable_compile")
            config.disable_compile = True

    # ------------------------------------------------------------------ one step

    @torch.compiler.disable
    def _begin_step(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step_start = time.perf_counter()
        self._inputs = read_inputs(self.model, args, kwargs, self._backend.mask_BT)
        self._backend.begin_forward()
        self._backend.begin_step(self._forecast(self._inputs))

    @torch.compiler.disable
    def _begin_encoding(self, *_: Any) -> None:
        self._backend.begin_step(None)

    def _forecast(self, inputs: StepInputs) -> Forecast | None:
        self._observer.begin_step()
        if self._given is not None:
            return self._observer.spread(self._given[0])
        return self._observer.predict(inputs)

    def _run_layer(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        if self._backend.is_capturing:
            layer = self._layers[index]
            return self._backend.run_captured(index, *bound_call(layer, args, kwargs))
        return self._run_in_step(index, *args, **kwargs)

    @torch.compiler.disable
    def _run_in_step(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layers[index]
        hidden_TH, routes = read_call(layer, args, kwargs)
        self._observer.see(index, args, kwargs)
        return self._backend.run_layer(layer, index, hidden_TH, routes)

    @torch.compiler.disable
    def _end_step(self, *_: Any) -> None:
        inputs, self._inputs = self._inputs, None
        assert inputs is not None
        if self._given is None:
            self._observer.end_step(inputs)
        stats = self._backend.stats
        stats.steps += 1
        stats.tokens += inputs.num_tokens
        stats.seconds["step"] += time.perf_counter() - self._step_start


def _refuse_to_run(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("this model's engine is closed and its experts are gone; load the model again")
