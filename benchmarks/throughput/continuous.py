"""Transformers' continuous batching, timed: all requests wait, the first that end are counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.throughput.settings import ThroughputSettings

WARM_UP_TOKENS = 8
POLL_S = 0.05
STOP_S = 20.0
PAGES = 2
"""Pages of the key/value cache for each sequence, of 256 tokens each."""


def serve_continuously(
    model: Any, prompts: Sequence[list[int]], settings: ThroughputSettings, batch: int
) -> tuple[float, int, int, int]:
    """Seconds until the last counted request ended; its and the others' new tokens, prompt tokens
    and number. Raises RuntimeError with transformers' own reason where it fails.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    options = ContinuousBatchingConfig(
        max_requests_per_batch=batch, max_batch_tokens=max(settings.chunk, batch),
        num_blocks=PAGES * batch, allow_block_sharing=False,
    )  # fmt: skip
    greedy = GenerationConfig(
        max_new_tokens=settings.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with _Errors() as errors:
        manager = model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=options
        )
        manager.start()
        try:
            warm_up = prompts[: min(batch, settings.warm_up)]
            _serve(manager, warm_up, WARM_UP_TOKENS, settings.arm_seconds, errors)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return _serve(manager, prompts, settings.tokens, settings.arm_seconds, errors)
        finally:
            manager.stop(block=True, timeout=STOP_S, hard_stop=True)


def _serve(
    manager: Any, prompts: Sequence[list[int]], tokens: int, most_s: float, errors: list[str]
) -> tuple[float, int, int, int]:
    start, seconds = time.perf_counter(), 0.0
    new, prompt, ended = 0, 0, 0
    sent = manager.add_requests([list(one) for one in prompts], max_new_tokens=tokens)
    lengths = dict(zip(sent, map(len, prompts), strict=True))
    while ended < len(prompts) and time.perf_counter() - start < most_s:
        result = manager.get_result(timeout=POLL_S)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"its thread ended: {'; '.join(errors) or 'no reason given'}")
            continue
        if result.error is not None:
            raise RuntimeError(f"a request failed: {result.error}")
        if result.is_finished() and result.request_id in lengths:
            seconds = time.perf_counter() - start
            new += len(result.generated_tokens)
            prompt += lengths[result.request_id]
            ended += 1
    if not ended:
        raise RuntimeError(f"no request ended within {most_s:.0f} s")
    return seconds, new, prompt, ended


class _Errors(logging.Handler):
    """Keeps what transformers logs as errors: its thread tells of them nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._texts: list[str] = []
        self._logger = logging.getLogger("transformers")

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage()[:300])

    def __enter__(self) -> list[str]:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)
        self._logger.addHandler(self)
        return self._texts

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
