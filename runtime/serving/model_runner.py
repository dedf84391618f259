"""Model runners: a step's parts run through the model; next tokens and routes come back.

ModelRunner     all parts side by side in one forward pass
CapturedRunner  on a GPU: decoding sequences in a captured step, prompts after it; or all in one
                pass where experts are fetched for a prompt anyway
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cache.forecast import Forecast
from runtime.engine.backend import RowDecoder
from runtime.engine.engine import Engine
from runtime.engine.next_tokens import NextTokens
from runtime.kv.row_cache import RowCache, row_cache
from runtime.kv.token_layout import Span, TokenLayout
from runtime.prediction.sequence_forecaster import join
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings
from runtime.sizing.cache_tokens import fewer_than

Ran = tuple[NextTokens, np.ndarray]


class Part(NamedTuple):
    """The part of one sequence that a step runs."""

    sequence: ServedSequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """True when the next token can be chosen after this step."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_read(self) -> int:
        """Tokens, the last ones, whose logits are read."""
        return self.num_tokens if self.sequence.scores_prompt else int(self.completes)


class ModelRunner:
    """One forward pass over everything."""

    overlaps = False
    """Whether predictions are made while a step runs, or before it."""
    attend_singles: Callable[..., Tensor] | None = None
    """A kernel for the decoding sequences' attention; None: each by itself, as a prompt."""

    def __init__(self, engine: Engine, cache: RowCache) -> None:
        self._engine, self._cache = engine, cache

    def run(self, parts: Sequence[Part], renew: Callable[[], None]) -> Ran:
        """The next tokens of the parts that complete, and routes [T, L, K] of all tokens.

        renew: updates the forecasts of the parts, where `overlaps`.
        """
        return self._pack(parts)

    def _pack(self, parts: Sequence[Part]) -> Ran:
        """Run the parts: in one pass, or in as many as the model's kinds of state take."""
        if not self._cache.stacks:
            return self._pass(parts)
        singles = [part for part in parts if part.sequence.is_ready]
        passes = [singles] * bool(singles) + [[part] for part in parts if part not in singles]
        ran = [self._pass(one, stacked=one is singles) for one in passes]
        following, routes = zip(*ran, strict=True)
        return NextTokens.joined(following), np.concatenate(routes)

    @torch.no_grad()
    def _pass(self, parts: Sequence[Part], *, stacked: bool = False) -> Ran:
        """One forward pass. stacked: single tokens, as a batch."""
        device = self._engine.device
        spans = [Span(sequence.row, sequence.num_cached, count) for sequence, count in parts]
        layout = TokenLayout(spans, device, self.attend_singles, stacked=stacked)
        tokens = [token for part in parts for token in _tokens(part)]
        ends = np.cumsum([part.num_tokens for part in parts])
        read = [np.arange(end - part.num_read, end) for part, end in zip(parts, ends, strict=True)]
        given = {} if (mask := self._cache.mask(layout)) is None else {"attention_mask": mask}
        kept = torch.zeros(1) if stacked else torch.from_numpy(np.concatenate(read))
        kept = kept.to(device, torch.int64)
        with self._cache.attending(layout):
            logits, routes_TLK = self._engine.run_ragged(
                _forecast(part.sequence for part in parts),
                input_ids=layout.shaped(torch.tensor(tokens, device=device)),
                position_ids=layout.shaped(layout.positions_B),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=kept,
                **given,
            )
        self._count_spilled([part.sequence for part in parts])
        if logits.shape[1] != len(kept):  # some models pay no heed to the request
            logits = logits[:, kept]
        return NextTokens.of(_next_logits(parts, logits.flatten(0, 1))), routes_TLK

    def _count_spilled(self, sequences: Iterable[ServedSequence]) -> None:
        """Count what a pass has read of keys and values in host memory."""
        if self._cache.pages is not None and self._cache.pages.num_spilled:
            found = (self._cache.spilled_bytes(one.row, one.num_cached) for one in sequences)
            self._engine.stats().bytes_spilled += sum(found)


class CapturedRunner(ModelRunner):
    """Sequences that decode run in a captured step, while the host predicts for them."""

    overlaps = True

    def __init__(self, engine: Engine, cache: RowCache, rows: RowDecoder) -> None:
        super().__init__(engine, cache)
        self._rows, self.attend_singles = rows, rows.attend_singles

    def run(self, parts: Sequence[Part], renew: Callable[[], None]) -> Ran:
        decoding = [sequence for sequence, _ in parts if sequence.is_ready]
        prompts = parts[len(decoding) :]
        if not self._captures(decoding, prompts):
            renew()
            return self._pack(parts)
        decoded, routes_TLK = self._decode(decoding, renew)
        if not prompts:
            return decoded, routes_TLK
        begun, prompt_routes = self._pack(prompts)
        return NextTokens.joined([decoded, begun]), np.concatenate([routes_TLK, prompt_routes])

    def _captures(self, decoding: Sequence[ServedSequence], prompts: Sequence[Part]) -> bool:
        """Whether to capture: a prompt uses nearly every expert, and fetches it for the others in
        its pass, if they can be in it.
        """
        if not decoding or not self._rows.fits(len(decoding)):
            return False
        return not (prompts and self._rows.is_starved) or self._cache.stacks

    @torch.no_grad()
    def _decode(self, sequences: Sequence[ServedSequence], renew: Callable[[], None]) -> Ran:
        self._rows.use(self._cache)
        run = self._rows.launch(
            [sequence.token_ids[-1] for sequence in sequences],
            [sequence.row for sequence in sequences],
            [sequence.num_cached for sequence in sequences],
            _forecast(sequences),
        )
        renew()
        self._rows.revise(_forecast(sequences))
        following, find_routes = self._rows.finish(run)
        self._count_spilled(sequences)
        return following, self._engine.tracked(find_routes, len(sequences))


def _next_logits(parts: Sequence[Part], logits_NV: Tensor) -> Tensor:
    """The logits of the parts that complete; those of prompts go to the sequences that ask.

    logits_NV: those that are read, part by part.
    """
    if not any(part.sequence.scores_prompt for part in parts):
        return logits_NV
    lasts = []
    for part, logits_TV in zip(
        parts, logits_NV.split([part.num_read for part in parts]), strict=True
    ):
        if part.sequence.scores_prompt:
            part.sequence.score_prompt(logits_TV)
        lasts += [logits_TV[-1:]] if part.completes else []
    return torch.cat(lasts) if lasts else logits_NV[:0]


def _tokens(part: Part) -> list[int]:
    start = part.sequence.num_cached
    return part.sequence.token_ids[start : start + part.num_tokens]


def _forecast(sequences: Iterable[ServedSequence]) -> Forecast | None:
    return join([one.forecast for one in sequences if one.forecast is not None])


def open_rows(engine: Engine, settings: ServeSettings, num_rows: int) -> RowCache:
    """A cache of rows for `num_rows` sequences: the engine's own where it has one, as far as it
    goes. settings: fitting that one.
    """
    storage = engine.key_value_storage
    if storage is not None:
        num_rows = min(num_rows, storage.batch)
    tokens = fewer_than(num_rows * settings.context, settings.cache_tokens)
    return row_cache(engine.model, num_rows, settings.context, storage, tokens)


def open_runner(engine: Engine, cache: RowCache) -> ModelRunner:
    """What runs the steps: captured ones where the model's experts have kernels."""
    rows = engine.row_decoder(cache)
    return ModelRunner(engine, cache) if rows is None else CapturedRunner(engine, cache, rows)
