"""Captured steps of many rows: more sequences than the kernels of a few tokens are made for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runtime.cuda.decode.decoder import Decoder
from runtime.cuda.decode.row_decoder import RowStep, Run, next_tokens
from runtime.cuda.options import WIDE_SIZES
from runtime.cuda.prefill.grouped_experts import GroupedExperts
from runtime.cuda.wide.wide_call import WideCall
from runtime.engine.backend import FindRoutes
from runtime.engine.next_tokens import NextTokens
from runtime.kv.row_cache import RowCache

SPARE = 2.0
"""Rows of a step over those that are in use, up to which a captured one serves: another capture
takes as long as some steps."""


class WideRows:
    """Runs captured steps over many rows of `cache`, whose experts `grouped` runs."""

    def __init__(self, decoder: Decoder, cache: RowCache, grouped: GroupedExperts) -> None:
        self._decoder, self._cache, self._grouped = decoder, cache, grouped
        self._steps: dict[int, RowStep] = {}

    def take_on(self, cache: RowCache) -> None:
        """Go on with the rows of another cache, in the same memory."""
        self._cache = cache

    def fits(self, num_rows: int) -> bool:
        """Whether so many sequences can decode in one captured step now."""
        return self._decoder.model.batch < num_rows <= min(
            WIDE_SIZES[-1], self._cache.num_rows
        ) and self._grouped.captures(num_rows)

    def launch(self, tokens: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Run:
        """Enqueue one step: a token of each sequence, with its row and position."""
        start = time.perf_counter()
        self._decoder.hand_over()
        self._grouped.prepare()
        step = self._step_for(len(tokens))
        step.set_inputs(tokens, rows, positions)
        run = Run(self._decoder.enqueue(step, len(tokens)), start)
        self._decoder.stats.catch_up()  # the device is busy
        return run

    def _step_for(self, num_rows: int) -> RowStep:
        """A captured one of at most `SPARE` times as many rows, if there is one."""
        size = min(next(size for size in WIDE_SIZES if size >= num_rows), self._cache.num_rows)
        fitting = [known for known in self._steps if size <= known <= SPARE * num_rows]
        if fitting:
            return self._steps[min(fitting)]
        self._steps[size] = self._build(size)
        return self._steps[size]

    def _build(self, size: int) -> RowStep:
        model, stats = self._decoder.model, self._decoder.stats
        call = WideCall(self._grouped, stats.num_layers, size, model.top_k)
        plain = model.forwards.plain
        return RowStep(
            plain, self._cache, call, batch=size, device=model.device, stream=model.stream
        )

    def finish(self, run: Run) -> tuple[NextTokens, FindRoutes]:
        """Wait for a step: the B next tokens, and what finds the routes [B, L, K] of all layers."""
        result = self._decoder.finish(run.flight)
        self._grouped.count_captured(result.chosen_LBK)
        self._decoder.stats.add_time("step", time.perf_counter() - run.start)
        return next_tokens(run.flight, result), result.routes_BLK
