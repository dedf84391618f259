"""Captured steps over any rows of the key/value cache: what `engine.serve` decodes with.

    launch -> (the host predicts, revise) -> finish

The tokens of a step lie side by side, [1, B], each with its row and position; rows beyond the batch
repeat the last one, which writes the same keys and values once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.cache.forecast import Forecast
from runtime.cuda.compiling.blueprint import StepKey
from runtime.cuda.decode.decoder import Decoder, StepInFlight, StepResult
from runtime.cuda.decode.graph_step import CapturedStep, StepExperts
from runtime.cuda.prefetching import SERVING
from runtime.cuda.single_tokens import SingleTokens, attend_singles
from runtime.engine.backend import FindRoutes
from runtime.engine.next_tokens import NextTokens
from runtime.kv.own_attention import Attention
from runtime.kv.pages.places import Paged, Spilled
from runtime.kv.row_cache import RowCache
from runtime.kv.token_layout import RaggedTokens


class TokensOfRows(SingleTokens, RaggedTokens):
    """Single tokens of any rows."""

    def __init__(self, batch: int, device: torch.device, *, stacked: bool) -> None:
        self.inputs_3B = torch.zeros(3, batch, dtype=torch.int64, device=device)
        """Token ids, rows, positions."""
        RaggedTokens.__init__(self, *self.inputs_3B[1:], stacked=stacked)

    @property
    def ids(self) -> Tensor:
        """The token ids as the model takes them."""
        return self.shaped(self.inputs_3B[0])

    @property
    def positions(self) -> Tensor:
        """The positions as the model takes them."""
        return self.shaped(self.positions_B)

    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        chunk: int | None = None,
        seen: Tensor | None = None,
        gathered: bool = False,
        spilled: Spilled | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one token of each row; `function` has what no kernel has."""
        rows_B, positions_B, places = self.rows_B, self.positions_B, self.places
        if seen is not None:
            if not gathered:
                key, value = self.gathered(key), self.gathered(value)
            return function(module, query, key, value, seen, **kwargs)[0]
        if gathered:
            rows_B = torch.arange(len(rows_B), device=rows_B.device)
        real_RC = None if chunk is None else self._of_chunk(key, chunk)
        tokens = rows_B, positions_B, places, real_RC, spilled
        return attend_singles(query, key, value, *tokens, **kwargs)

    def _of_chunk(self, key: Tensor, chunk: int) -> Tensor:
        """Bool [R, context]: the tokens of each row that are in the new token's chunk."""
        num_rows, context = key.shape[0], key.shape[2]
        if isinstance(self.places, Paged):
            num_rows, context = len(self.places.table_RN), self.places.context
        columns_C = torch.arange(context, device=key.device)
        first_B = self.positions_B - self.positions_B % chunk
        real_RC = torch.ones(num_rows, context, dtype=torch.bool, device=key.device)
        real_RC[self.rows_B] = columns_C >= first_B[:, None]
        return real_RC


class RowStep(CapturedStep):
    """A captured step of `batch` tokens, each of its own sequence. forward: the model's, compiled
    or not.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        cache: RowCache,
        experts: StepExperts,
        *,
        batch: int,
        device: torch.device,
        stream: torch.cuda.Stream,
    ) -> None:
        super().__init__(experts, stream)
        self._forward, self._cache = forward, cache
        self._tokens = TokensOfRows(batch, device, stacked=cache.stacks)
        self._pinned_3B = torch.zeros(3, batch, dtype=torch.int64).pin_memory()

    @property
    def batch(self) -> int:
        return self._tokens.inputs_3B.shape[1]

    def save(self) -> list[Tensor]:
        return self._cache.states_of(self._tokens.rows_B)

    def restore(self, saved: list[Tensor]) -> None:
        self._cache.set_states(self._tokens.rows_B, saved)

    def set_inputs(
        self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Set what runs next. The step before has ended, so nobody reads the pinned memory."""
        num_rows, given_3B = len(tokens), self._pinned_3B.numpy()
        for given_B, values in zip(given_3B, (tokens, rows, positions), strict=True):
            given_B[:num_rows] = values
        given_3B[:, num_rows:] = given_3B[:, num_rows - 1 : num_rows]
        self._tokens.inputs_3B.copy_(self._pinned_3B, non_blocking=True)

    def forward(self) -> Tensor:
        given = {} if (mask := self._cache.mask(self._tokens)) is None else {"attention_mask": mask}
        with self._cache.attending(self._tokens):
            output = self._forward(
                input_ids=self._tokens.ids,
                position_ids=self._tokens.positions,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **given,
            )
        logits_BV: Tensor = output.logits.flatten(0, 1)
        return logits_BV

    def advance(self, next_B: Tensor) -> None:
        """Nothing: the host says which rows come next."""


class Run(NamedTuple):
    """A step that was launched."""

    flight: StepInFlight
    start: float


def next_tokens(flight: StepInFlight, result: StepResult) -> NextTokens:
    """The B next tokens of a finished step; -1 where logits are not finite."""
    logits_BV = flight.step.logits_BV
    assert logits_BV is not None
    greedy_B = np.where(np.isnan(result.best_B), -1, result.tokens_B).tolist()
    return NextTokens(greedy_B, logits_BV[: flight.num_rows])


class ManyRows(Protocol):
    """Steps of more rows than the kernels of a few tokens are made for: `cuda.wide` has them."""

    def take_on(self, cache: RowCache) -> None:
        """Go on with the rows of another cache, in the same memory."""

    def fits(self, num_rows: int) -> bool:
        """Whether so many sequences can decode in one captured step now."""

    def launch(self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Run:
        """Enqueue one step: a token of each sequence, with its row and position."""

    def finish(self, run: Run) -> tuple[NextTokens, FindRoutes]:
        """Wait for a step: the B next tokens, and what finds the routes [B, L, K] of all layers."""


class RowDecoder:
    """Runs captured steps over the rows of `cache`. wide: those of more rows than most."""

    attend_singles = staticmethod(attend_singles)

    def __init__(self, decoder: Decoder, cache: RowCache, wide: ManyRows) -> None:
        self._decoder, self._cache, self._wide = decoder, cache, wide
        self._steps: dict[tuple[int, bool], RowStep] = {}
        self._epoch = cache.epoch

    def take_on(self, cache: RowCache) -> bool:
        """Go on with the rows of another cache; False where they are not the same memory."""
        if cache.num_rows != self._cache.num_rows:
            return False
        self._cache = cache  # for steps that are captured from here on
        self._wide.take_on(cache)
        self._epoch = -1
        return True

    def use(self, cache: RowCache) -> None:
        """Attend to the rows of `cache`, as they are now, in the next step: loops take turns."""
        if cache is not self._cache:
            self.take_on(cache)
        cache.send_pages(self._decoder.model.device)

    def fits(self, num_rows: int) -> bool:
        """Whether so many sequences can decode in one captured step."""
        return self._is_narrow(num_rows) or self._wide.fits(num_rows)

    def _is_narrow(self, num_rows: int) -> bool:
        decoder = self._decoder
        return (
            num_rows <= decoder.model.batch and decoder.most_experts(num_rows) <= decoder.num_slots
        )

    @property
    def is_starved(self) -> bool:
        """Whether most experts have no slot: then the link is the bound."""
        stats = self._decoder.stats
        return 2 * stats.num_slots < stats.total_experts

    def launch(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        forecast: Forecast | None,
    ) -> Run:
        """Enqueue one step: a token of each sequence, with its row and position."""
        if not self._is_narrow(len(tokens)):
            return self._wide.launch(tokens, rows, positions)
        start, decoder = time.perf_counter(), self._decoder
        prefetch = decoder.prefetching.in_next_step(SERVING)
        step = self._step_for(len(tokens), prefetch=prefetch)
        decoder.take_over()
        decoder.driver.begin_served_step(forecast)
        step.set_inputs(tokens, rows, positions)
        run = Run(decoder.enqueue(step, len(tokens)), start)
        key = self._key(step.batch)
        decoder.model.forwards.seen(key, partial(decoder.model.shape, key, self._cache))
        return run

    def revise(self, forecast: Forecast | None) -> None:
        """Take a better forecast of the running step; it serves the layers that are left."""
        self._decoder.driver.revise(forecast)

    def finish(self, run: Run) -> tuple[NextTokens, FindRoutes]:
        """Wait for a step: the B next tokens, and what finds the routes [B, L, K] of all layers."""
        if not self._is_narrow(run.flight.num_rows):
            return self._wide.finish(run)
        decoder, flight = self._decoder, run.flight
        result = decoder.finish(flight)
        decoder.count(flight, result.ledger)
        decoder.driver.end_served_step(result.routes_LBK)
        seconds = time.perf_counter() - run.start
        decoder.count_time(flight, SERVING, seconds)
        return next_tokens(flight, result), result.routes_BLK

    def _step_for(self, num_rows: int, *, prefetch: bool) -> RowStep:
        if self._epoch != self._cache.epoch:
            self._switch()
        key = self._decoder.model.bucket(num_rows), prefetch
        if key not in self._steps:
            self._steps[key] = self._build(*key)
        return self._steps[key]

    def _key(self, bucket: int) -> StepKey:
        return StepKey(SERVING, bucket, self._cache.num_rows)

    def _switch(self) -> None:
        """All rows were free since the last step: steps that are compiled by now may take over."""
        self._epoch = self._cache.epoch
        for bucket, prefetch in list(self._steps):
            if self._decoder.model.forwards.switches(self._key(bucket)):
                self._steps.pop((bucket, prefetch))
                self._steps.pop((bucket, not prefetch), None)

    def _build(self, bucket: int, prefetch: bool) -> RowStep:
        model = self._decoder.model
        experts = self._decoder.experts_call(bucket, prefetch=prefetch)
        forward = model.forwards.of(self._key(bucket))
        return RowStep(
            forward, self._cache, experts, batch=bucket, device=model.device, stream=model.stream,
        )  # fmt: skip
