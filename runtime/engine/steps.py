"""The steps of an engine: forward passes of the model, and the experts calls within them.

One thread at a time has the turn (`turns`), and whatever a step keeps is local to it: a forward
pass may begin within another one, in a hook or between the tokens of `generate`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing.layers import read_call
from runtime.cache.forecast import Forecast
from runtime.engine.backend import Backend
from runtime.engine.experts import call_kernels, with_bias
from runtime.engine.gradients import LayerCall, in_backward, refuse_transforms
from runtime.engine.observer import Observer
from runtime.engine.step_inputs import StepInputs, read_inputs
from runtime.engine.turns import Turns
from runtime.weights.source import Source


class RaggedStep:
    """What a step over tokens of several sequences brings along, and its routes [T, L, K]."""

    def __init__(self, forecast: Forecast | None) -> None:
        self.forecast = forecast
        self.routes_TLK = np.zeros((0, 0, 0), np.int64)


class Steps:
    """Runs forward passes of the model of `source` on `backend`.

    on_backward: told of every backward pass that reaches experts.
    """

    def __init__(
        self,
        source: Source,
        backend: Backend,
        observer: Observer,
        on_backward: Callable[[], None],
    ) -> None:
        self.turns = Turns(backend.guard)
        self.is_open = True
        """False once the engine is detached or closed."""
        self._model, self._layers = source.model, source.layers
        self._backend, self._observer, self._on_backward = backend, observer, on_backward
        self._calls = [self._call(index) for index in range(len(source.layers))]
        self._reading = threading.Lock()
        self._ragged: RaggedStep | None = None
        """The ragged step that is about to run."""
        self._is_running, self._is_ragged, self._in_experts = False, False, False

    def close(self) -> None:
        """End the steps; whoever waits for a turn runs the model as it is then."""
        with self._reading:
            self.is_open = False
        self._calls = []  # which refer to the steps: whoever drops the model frees it

    # ------------------------------------------------------------------ a forward pass

    @torch.compiler.disable
    def forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One step; own: the model's forward. A checkpointed model that runs again is none."""
        refuse_transforms()
        if in_backward():
            return own(*args, **kwargs)
        with self.turns:
            if not self.is_open:
                return self._model.forward(*args, **kwargs)
            return self._run(own, args, kwargs)

    def generate(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A whole generation as one turn; own: what generates."""
        with self.turns:
            if not self.is_open:
                return self._model.generate(*args, **kwargs)  # type: ignore[operator]
            return own(*args, **kwargs)

    def run_ragged(self, forecast: Forecast | None, **inputs: Any) -> tuple[Tensor, np.ndarray]:
        """One step over tokens of several sequences: logits, and routes as of `Observer.routes`."""
        self._ragged = ragged = RaggedStep(forecast)
        try:
            logits: Tensor = self._model(**inputs).logits
        finally:
            self._ragged = None
        return logits, ragged.routes_TLK

    def _run(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        self._refuse_within()
        ragged, self._ragged = self._ragged, None
        inputs = read_inputs(self._model, args, kwargs, self._backend.mask_BT)
        outer, self._is_running = self._is_running, True
        self._is_ragged = ragged is not None
        outer_routes = self._observer.begin_step()
        self._backend.begin_forward()
        try:
            self._backend.begin_step(self._forecast(inputs, ragged))
            output = own(*args, **kwargs)
            self._account(inputs, ragged, start, getattr(output, "past_key_values", None))
        finally:
            self._backend.end_forward()
            self._observer.resume(outer_routes)
            self._is_running, self._is_ragged = outer, False
        return output

    def _refuse_within(self) -> None:
        """Raise ValueError within a step whose attention is over rows of other sequences."""
        if self._is_ragged or self._backend.is_capturing:
            raise ValueError(
                "the model was called from within a step of serve or a captured step (by a hook?), "
                "whose key/value cache it would use; call it between tokens, as on_token= of "
                "model.expertflow.serve does, or remove the hook"
            )

    def _forecast(self, inputs: StepInputs, ragged: RaggedStep | None) -> Forecast | None:
        if ragged is not None:
            return self._observer.spread(ragged.forecast)
        return self._observer.predict(inputs)

    def _account(
        self, inputs: StepInputs, ragged: RaggedStep | None, start: float, cache: Any
    ) -> None:
        if ragged is None:
            self._observer.end_step(inputs, cache)
        else:
            ragged.routes_TLK = self._observer.routes(inputs.positions_BT.size)
        stats = self._backend.stats
        stats.steps += 1
        stats.tokens += inputs.num_tokens
        stats.seconds["step"] += time.perf_counter() - start

    @torch.compiler.disable
    def begin_encoding(self, *_: Any) -> None:
        """The encoder is about to run, on its own or within a step."""
        if not in_backward():
            with self.turns:
                self._backend.begin_step(None)

    # ------------------------------------------------------------------ an experts call

    @torch.compiler.disable
    def run_layer(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        """The experts call of layer `index`, within a step or without one."""
        layer = self._layers[index]
        refuse_transforms()
        if in_backward():
            return with_bias(layer, self._call(index)(*read_call(layer, args, kwargs)))
        with self.turns:
            if not self.is_open:
                output: Tensor = layer.module.forward(*args, **kwargs)
                return output
            if self._backend.is_capturing:
                return call_kernels(layer, args, kwargs, partial(self._backend.run_captured, index))
            hidden, routes = read_call(layer, args, kwargs)
            if not self._is_running:
                return with_bias(layer, self._alone(index)(hidden, routes))
            self._observer.see(index, args, kwargs)
            return with_bias(layer, self._calls[index](hidden, routes))

    def _alone(self, index: int) -> LayerCall:
        """Outside of a step: a part of the model was called, not the model."""
        call = self._calls[index]

        def run(*inputs: Any) -> Tensor:
            self._backend.begin_forward()
            try:
                return call.run(*inputs)
            finally:
                self._backend.end_forward()

        return call._replace(run=run)

    def _call(self, index: int) -> LayerCall:
        return LayerCall(
            self._layers[index],
            partial(self._run_slots, index),
            partial(self._read, index),
            self._on_backward,
        )

    def _run_slots(self, index: int, *inputs: Any) -> Tensor:
        if self._in_experts:
            raise ValueError(
                "the model was called from within one of its own experts calls, whose slots are in "
                "use; call it between tokens, or give all prompts to model.expertflow.serve"
            )
        self._in_experts = True
        try:
            return self._backend.run_layer(self._layers[index], index, *inputs)
        finally:
            self._in_experts = False

    def _read(self, index: int, expert: int) -> dict[str, Tensor]:
        with self._reading:
            if not self.is_open:
                raise ValueError(
                    "the engine was detached or closed between a forward pass and its backward "
                    "pass; run backward first"
                )
            return self._backend.read_expert(index, expert)
