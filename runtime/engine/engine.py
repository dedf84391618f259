"""The engine: attached to an unmodified Hugging Face model, it runs the experts out of slots.

Each forward pass is one step: predict, schedule (the cache's policy), run, account. No model code
changes: experts containers and model get an instance-level `forward`, the model a `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from routing.predictor_file.reader import PredictorFile
from runtime.cache.forecast import Forecast
from runtime.cache.stats import Stats
from runtime.engine.attachment import Attachment
from runtime.engine.backend import Backend, FindRoutes, RowDecoder
from runtime.engine.gradients import ConstantExperts
from runtime.engine.guards.guard import guard
from runtime.engine.observer import Observer
from runtime.engine.steps import Steps
from runtime.engine.turns import Turns
from runtime.kv.row_cache import RowCache
from runtime.kv.storage import Storage
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.layer_map import LayerMap
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import Source
from runtime.weights.store import expert_parameters

if TYPE_CHECKING:
    from queue import Queue

    from runtime.serving.request import Result


class Engine:
    """The offloading of one model, at `model.expertflow`. Also a context manager that ends it.

    Threads take turns: each pass, generation or step of `serve` has slots and predictor to itself.
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
        backend.stats.encoding, backend.stats.loss = source.encoding, source.store.loss
        stack = source.topology.stack() if forecaster is None else forecaster.file.stack
        layer_map = LayerMap(source.layers, stack)
        self._observer = Observer(source.layers, layer_map, backend, forecaster, route_log)
        owned = source.layers if source.store.owns_experts else []
        experts = (one for layer in owned for one in expert_parameters(layer).values())
        self._constants = ConstantExperts(source.model, experts)
        self._steps = Steps(source, backend, self._observer, self._constants.warn)
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
        requests: Iterable[Any] | Queue[Any],
        *,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Iterator[Result]:
        """Continue many prompts together, joining and leaving between steps; results as they end.

        requests: an iterable, taken as they can be scheduled, or a queue that None ends; of
            `Request`, of dicts of its fields or of prompts alone. One by itself will do.
        tokenizer: for prompts of text and for the text of results; by default the one beside the
            model's weights, and without any, prompts are token ids and results have no text.
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
        with self._steps.turns:
            self._backend.check_integrity()

    @property
    def encoding(self) -> str:
        """How experts are kept: "plain", an encoding, or a line about what a lossy one lost."""
        return self.stats().loss or self.stats().encoding or "plain"

    @property
    def decode_path(self) -> str:
        """Either "graph": decode steps run as captured CUDA graphs, or why they do not."""
        return self._backend.decode_path

    @property
    def prefetching(self) -> str:
        """Whether experts are prefetched; under prefetch="auto" with the times that decided it."""
        return self._backend.prefetching

    @property
    def cpu_share(self) -> str:
        """Whether the CPU computes missed experts beside a GPU, and why."""
        return self._backend.cpu_share

    def detach(self) -> nn.Module:
        """Restore and return the original model, all experts in memory. Idempotent.

        Waits for what other threads run. Raises ValueError within a forward pass or a generation.
        """
        with self._last_turn():
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
        with self._last_turn():
            self._attachment.release()
            for layer in self._layers:
                layer.module.__dict__["forward"] = _refuse_to_run

    def _last_turn(self) -> Turns:
        if self._steps.turns.is_mine:
            raise ValueError(
                "the model is running: detach or close its engine when the forward pass, generate "
                "or step of serve has ended"
            )
        return self._steps.turns

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block has the model to itself; other threads wait.

        Raises ValueError once the engine is detached or closed.
        """
        with self._steps.turns:
            if not self._steps.is_open:
                raise ValueError(
                    "this model's engine is detached or closed; runtime.load the model again"
                )
            yield

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
    def watchers(self) -> set[object]:
        """Who wants routes of `run_ragged` and `tracked`, whether or not anything else does."""
        return self._observer.watchers

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

    def tracked(self, find: FindRoutes, num_tokens: int) -> np.ndarray:
        """Of the routes of all layers that `find` gives, those that `run_ragged` gives."""
        return self._observer.observed(find, num_tokens)

    def run_ragged(self, forecast: Forecast | None, **inputs: Any) -> tuple[Tensor, np.ndarray]:
        """One step over tokens of several sequences side by side, [1, T].

        Returns the logits, and the routes [T, L, K] of the predicted stack, NO_EXPERT where there
        is none ([T, 0, 0] with no predictor, no route log and nobody who watches).
        """
        with self.turn():
            return self._steps.run_ragged(forecast, **inputs)

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
            changes.put(layer.module, "forward", partial(self._steps.run_layer, index))
        changes.put(model, "expertflow", self)
        self._take_turns()
        self._disable_compile()
        changes.add(self._constants.close, self._steps.close, holds=True)
        model.to(device).eval()
        guard(model, self._layers, self._store, changes)

    def _take_turns(self) -> None:
        """Make steps of the model's forward passes, and a turn of each generation.

        Not by hooks: some callers go past them, and an interrupt would.
        """
        model, steps, changes = self.model, self._steps, self._attachment
        forward, generate = model.forward, getattr(model, "generate", None)
        if "forward" in model.__dict__:
            changes.add(partial(model.__dict__.__setitem__, "forward", forward), holds=True)
        changes.put(model, "forward", wraps(forward)(partial(steps.forward, forward)))
        if generate is not None:
            run = partial(steps.generate, self._backend.generate or generate)
            changes.put(model, "generate", wraps(generate)(run))
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            encoder = model.get_encoder()  # type: ignore[operator]
            changes.add(encoder.register_forward_pre_hook(steps.begin_encoding).remove, holds=True)

    def _disable_compile(self) -> None:
        """Keep generate from compiling the step: it would only break at every experts call."""
        if (config := getattr(self.model, "generation_config", None)) is not None:
            self._attachment.keep(config, "disable_compile")
            config.disable_compile = True


def _refuse_to_run(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("this model's engine is closed and its experts are gone; load the model again")
