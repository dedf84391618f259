"""The serving loop's choices over recorded texts: scheduler and cache are the runtime's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from benchmarks.ordering.texts import Foretold, true_forecast
from routing.topology import Stack
from runtime.cache.belady import Calls
from runtime.cache.expert_cache import FREE
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.prediction.sequence_forecaster import SequenceForecast, join
from runtime.serving.request import Request
from runtime.serving.scheduling.ordering import Fifo, Ordering
from runtime.serving.scheduling.predicted import MOST_USED, Predicted
from runtime.serving.scheduling.scheduler import Scheduler
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings
from runtime.simulation.replay import Simulation, slots_of

FEW, CHUNKS = 32, (512, 8192)
"""Sequences up to which a step takes the fewer prompt tokens, and the prompt tokens."""
WAITING = ServeSettings.lookahead
"""Requests that wait."""
NEVER_RESTS_S = 1e3
"""Seconds of a load, for which ordering never rests."""
SERVED = "served"
"""The order that rests where it does not pay."""


class Order(NamedTuple):
    """A way to choose the sequences of a step."""

    name: str
    batch: int
    rows: int
    foretell: Callable[[Foretold, int], SequenceForecast]

    @classmethod
    def of(cls, name: str, batch: int) -> Order:
        """The order of that name. Raises ValueError for another."""
        orders = {
            "arrival": (batch, batch, Foretold.forecast),
            "predicted": (batch, 2 * batch, Foretold.forecast),
            "true": (batch, 2 * batch, true_forecast),
            "twice": (2 * batch, 2 * batch, Foretold.forecast),
            SERVED: (batch, 2 * batch, Foretold.forecast),
        }
        if name not in orders:
            raise ValueError(f"order={name!r} is not one of {', '.join(orders)}")
        return cls(name, *orders[name])

    def ordering(self, load_s: float) -> Ordering:
        """load_s: seconds of a load, for what it saves."""
        if self.batch == self.rows:
            return Fifo()
        served = self.name == SERVED
        return Predicted(
            lambda: load_s if served else NEVER_RESTS_S, burst=self.rows - self.batch,
            batch=self.batch, most_used=MOST_USED if served else 1.0,
        )  # fmt: skip


@dataclass
class Counted:
    """What the counted steps took."""

    steps: int = 0
    tokens: int = 0
    loads: int = 0
    seconds: float = 0.0
    """Of the CPU, for choosing."""
    decode_steps: int = 0
    """Steps without a prompt."""
    used: float = 0.0
    """The sum of the shares of all experts that these used."""
    foretold: float = 0.0
    """The same as the forecasts have it."""

    def add(self, other: Counted) -> None:
        """Count these steps too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class OrderedRun:
    """Sequences in flight under one order, over a cache that only counts."""

    def __init__(
        self, texts: Sequence[Foretold], order: Order, stack: Stack, *, residency: float,
        load_s: float, horizon: int, output_tokens: Sequence[int], seed: int,
    ) -> None:  # fmt: skip
        chunk = CHUNKS[order.batch > FEW]
        settings = ServeSettings(
            batch=order.batch, rows=order.rows, context=texts[0].length, chunk=chunk
        )  # fmt: skip
        self._texts, self._order, self._chunk = texts, order, chunk
        self._scheduler, self._load_s = Scheduler(order.ordering(load_s), settings), load_s
        shape = stack.num_layers, stack.num_experts
        self._num_experts = stack.num_layers * stack.num_experts
        policy = PredictedReuse(*shape, horizon=horizon)
        self._cache = Simulation(policy, *shape, slots_of(residency, shape))
        self._random, self._numbers = np.random.default_rng(seed), count()
        self._turn = self._random.permutation(len(texts))
        self._lengths = output_tokens
        self._waiting: list[ServedSequence] = []
        self._active: list[ServedSequence] = []
        self.ended = 0

    def step(self) -> Counted:
        """One step: admit, compose, run, advance."""
        loads, seconds = self._cache.loads, 0.0
        while len(self._waiting) < WAITING:
            self._waiting.append(self._next())
        missing_K = (self._cache.cache.slot_of_key == FREE).astype(np.float32)
        seconds += self._admit(missing_K)
        ready = [one for one in self._active if one.is_ready]
        began = time.process_time()
        decoding = [(one, 1) for one in self._scheduler.compose(ready, missing_K)]
        seconds += time.process_time() - began
        parts = list(decoding)
        left = self._chunk
        for one in self._active:
            if not one.num_generated and (tokens := min(one.num_pending, left)):
                parts.append((one, tokens))
                left -= tokens
        (calls, foretold), tokens = self._run(parts), 0
        for one, number in parts:
            tokens += self._advance(one, number)
        loads = self._cache.loads - loads
        counted = Counted(1, tokens, loads, seconds)
        if len(parts) == len(decoding):
            self._scheduler.ordering.observe(len(decoding), loads * self._load_s)
            used = sum(len(experts) for _, experts in calls) / self._num_experts
            counted.decode_steps, counted.used, counted.foretold = 1, used, foretold
        return counted

    def _next(self) -> ServedSequence:
        number = next(self._numbers)
        text = self._text(number)
        tokens = text.recorded.token_ids_T[: text.num_prompt].tolist()
        new = int(self._random.integers(self._lengths[0], self._lengths[1] + 1))
        request = Request(id=str(number), prompt=tokens, max_tokens=new, ignore_eos=True)
        sequence = ServedSequence(request, tokens, None, number)
        sequence.num_waiting_at_arrival = WAITING
        return sequence

    def _text(self, number: int) -> Foretold:
        return self._texts[self._turn[number % len(self._texts)]]

    def _foretell(self, one: ServedSequence) -> None:
        one.forecast = self._order.foretell(self._text(one.number), one.num_generated)

    def _admit(self, missing_K: np.ndarray) -> float:
        """Give free rows to those that wait; the CPU seconds of the choice."""
        free = self._order.rows - len(self._active)
        if not free:
            return 0.0
        for one in self._waiting:
            if one.forecast is None:
                self._foretell(one)
        began = time.process_time()
        admitted = self._scheduler.admit(self._waiting, self._active, free, missing_K)
        seconds = time.process_time() - began
        for one in admitted:
            self._waiting.remove(one)
            one.row = 0
            self._active.append(one)
        return seconds

    def _run(self, parts: Sequence[tuple[ServedSequence, int]]) -> tuple[Calls, float]:
        """The expert calls of the step, served by the cache under the predicted routes; the share
        of all experts that these say will be used.
        """
        forecast = join([self._text(one.number).forecast(one.num_generated) for one, _ in parts])
        routes_TLK = np.concatenate(
            [
                self._text(one.number).recorded.experts_TLK[one.num_cached : one.num_cached + n]
                for one, n in parts
            ]
        )
        calls = [
            (layer, np.unique(routes_TLK[:, layer]).astype(np.int64))
            for layer in range(routes_TLK.shape[1])
        ]
        self._cache.step(forecast, calls)
        return calls, 0.0 if forecast is None else float(forecast.this_LE.mean())

    def _advance(self, one: ServedSequence, number: int) -> int:
        """The new token of a sequence, if it has one: 1, else 0."""
        one.num_cached += number
        if one.num_pending:
            return 0
        one.token_ids.append(int(self._text(one.number).recorded.token_ids_T[one.num_cached]))
        if one.num_generated == one.request.max_tokens:
            self._active.remove(one)
            self.ended += 1
        else:
            self._foretell(one)
        return 1
